// The cells of this process: those that are built in, and those that users have defined and
// compiled (rnnfast.cell in Python).
#pragma once

#include <string>

#include "cpu/microkernels.h"

namespace rnnfast::cpu {

// The functions of a cell for the tensors of these kernels. Throws std::runtime_error if they are
// of a user's cell and have not been compiled for the instruction set in use.
const CellFunctions& cell_functions(const MicroKernels& kernels, CellKind kind);

// Adds a user's cell, whose kind is the next after all that exist. norm_eps and recurrent are those
// of Cell.
CellKind add_user_cell(const std::string& name, double norm_eps, bool recurrent);
// Sets the functions of a user's cell that were compiled in the namespace `target` (see
// MicroKernels) for tensors of a dtype. They must live as long as the process.
void set_cell_functions(CellKind kind, const std::string& target, Dtype dtype,
                        const CellFunctions& functions);
bool has_cell_functions(CellKind kind, const MicroKernels& kernels);

}  // namespace rnnfast::cpu
