// How many cores this process may use.
#pragma once

#include <cstdint>
#include <string>

namespace rnnfast::cpu {

// How many cores the threads of this process may use at once: those that the calling thread may run
// on, and no more than its control group lets the process have. It is kept, and found again now and
// then: a change of affinity counts after 50 ms, one of the control group after 2 s.
int usable_cores();

// How many of them other processes leave to this one, by the time that its threads could have run
// and did not. Threads that wait for each other beside busy processes take many times as long: each
// of them waits for its turn, one after the other. So fewer work then, and more are tried from time
// to time.
int free_cores();
// What so many threads of a team have lost together in so much time, in nanoseconds.
void note_losses(int threads, int64_t lost, int64_t elapsed);

// Makes both return this number; with 0, what it finds. For tests with more threads than
// cores. The environment variable RNNFAST_ASSUME_CORES does the same from the start.
void assume_cores(int cores);

// What the control groups allow, in cores; infinity where nothing is limited. `root` is put before
// the paths of all files that are read.
double quota_cores(const std::string& root);

}  // namespace rnnfast::cpu
