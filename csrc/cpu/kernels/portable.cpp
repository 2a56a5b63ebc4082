// The portable target: 16-byte vectors, which every machine of the architecture has.
#include "cpu/kernels/table.h"
#include "cpu/targets.h"

namespace rnnfast::cpu {

constinit const Target kPortable = RNNFAST_TARGET::make_target();

}  // namespace rnnfast::cpu
