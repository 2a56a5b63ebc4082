// How many threads a call may use.
#pragma once

namespace rnnfast {

// torch's number of threads, or the number of usable cores (cpu/cores.h) where there are fewer:
// more threads than cores wait for each other's time slices. But 1 in a process that was forked off
// one with several threads: the forking thread's OpenMP team has stayed behind, and to call it
// would wait for ever. There torch's own number is set to 1 as well, and the first call warns, for
// which it takes Python's lock.
int usable_threads();

}  // namespace rnnfast
