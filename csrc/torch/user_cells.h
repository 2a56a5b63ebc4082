// Cells that users define in Python (rnnfast.cell): their names, sizes and ops. cpu/user_cells.h
// has their kernels.
#pragma once

#include "torch/layer.h"

namespace rnnfast {

// Throws if there is no such cell.
const CellInfo& user_cell_info(CellKind kind);
// Makes sure that there are kernels of a cell for tensors of a dtype: those of a user's cell are
// compiled for the instruction set in use, unless that has been done. Returns why there are none,
// or an empty text. It may call Python.
std::string prepare_kernels(const CellInfo& cell, Dtype dtype);

// Registers the ops of a cell with torch.
void add_ops(const CellInfo& cell);  // in ops.cpp
// Their derivatives and autocast.
void add_autograd(const CellInfo& cell);  // in autograd.cpp

}  // namespace rnnfast
