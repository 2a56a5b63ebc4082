// How many cores this process may use.
#pragma once

#include <cstdint>
#include <string>

namespace rnnfast::cpu {

// The number of cores that the process's threads may use at once: the calling thread's affinity,
// limited by the control group's CPU quota. The value is cached: a new affinity is seen after
// 50 ms, a new quota after 2 s.
int usable_cores();

// The number of usable cores that other processes leave free, estimated from the time that this
// process's threads were ready to run and did not. A barrier beside busy processes takes many times
// as long, since each thread waits for its turn on a core. So this number falls when threads lose
// much time, and rises again from time to time to see whether more threads would now help.
int free_cores();
// Reports that the threads of a team lost `lost` nanoseconds in sum while `elapsed` nanoseconds
// passed.
void note_losses(int threads, int64_t lost, int64_t elapsed);

// Makes usable_cores and free_cores return this number; 0 restores the measured ones. For tests
// with more threads than cores. The environment variable RNNFAST_ASSUME_CORES sets the initial
// value.
void assume_cores(int cores);

// The CPU quota of the process's control groups, in cores; infinity if there is none. `root` is
// prepended to the path of every file read, for tests.
double quota_cores(const std::string& root);

}  // namespace rnnfast::cpu
