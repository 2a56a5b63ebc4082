// The number of threads that a call may use.
#pragma once

namespace rnnfast {

// Returns torch's number of threads, but no more than there are free cores (cpu/cores.h): with more
// threads than cores, threads wait for each other's time slices.
//
// In a process that was forked from one with several threads the result is 1. The forking thread's
// OpenMP team does not exist there, and calling it would hang. torch's own number is then set to 1
// as well, and the first call warns, for which it takes the GIL.
int usable_threads();

}  // namespace rnnfast
