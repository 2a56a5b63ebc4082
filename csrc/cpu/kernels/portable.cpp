// What every machine of the architecture has: 16-byte vectors.
#include "cpu/kernels/table.h"
#include "cpu/targets.h"

namespace rnnfast::cpu {

constinit const Target kPortable = RNNFAST_TARGET::make_target();

}  // namespace rnnfast::cpu
