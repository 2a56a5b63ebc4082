// How many threads a call may use.
#pragma once

namespace rnnfast {

// torch's number of threads. But 1 in a process that was forked off one with several threads: the
// forking thread's OpenMP team has stayed behind, and to call it would wait for ever. The first
// such call warns, sets torch's own number to 1 as well, and needs Python's lock for that.
int usable_threads();

}  // namespace rnnfast
