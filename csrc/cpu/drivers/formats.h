// Chooses the weight formats for the products of a layer, and tells the planner about the product
// of a step. The choice uses sizes alone, because results must not depend on the number of threads.
#pragma once

#include "cpu/drivers/weights.h"

namespace rnnfast::cpu {

struct ForwardFormats {
  bool pack;  // whether weights are packed
  bool x_split, h_split;  // whether products with x and with h use split precision
};

inline ForwardFormats choose_forward_formats(const Context& context, const Sizes& size) {
  const int64_t G = context.cell.gates, H = size.H;
  const bool pack = pays_to_pack(size.T, size.B, context.storage(G * H * H),
                                 context.kernels.converts(), context.kernels.state_align > 1);
  const bool split = context.kernels.split && pack;
  return {pack, split && split_pays_at_once(size.T * size.B, size.I, G * H),
          split && split_pays_in_steps(size.B, size.T, H, G * H)};
}

struct BackwardFormats {
  bool block_split, step_split;  // whether products over a block and of a step use split precision
};

inline BackwardFormats choose_backward_formats(const Context& context, const Sizes& size) {
  const int64_t G = context.cell.gates, H = size.H;
  const bool split = context.kernels.split;
  return {split && split_pays_in_gradients(size.T * size.B, G * H, H + size.I),
          split && split_pays_in_steps(size.B, size.T - 1, G * H, H)};
}

// The product of one step: `rows` rows times `panels` panels of `vectors` vectors of columns, with
// sums over K elements. The gate maths of a row and a panel takes `cell_cycles`.
inline StepShape step_shape(const Context& context, const WeightFormat& format, int64_t rows,
                            int64_t panels, int64_t K, int vectors, double cell_cycles) {
  return {.rows = rows,
          .panels = panels,
          .depth = ceil_div(K, format.word),
          .vectors = vectors,
          .tile_rows = format.tile_rows[vectors - 1],
          .min_rows = format.min_rows,
          .element_bytes = context.kernels.compute_bytes,
          .weight_bytes = format.weight_bytes,
          .lanes = context.kernels.lanes,
          .row_cycles = format.row_cycles,
          .cell_cycles = cell_cycles,
          .exchange_cycles = format.exchange_cycles};
}

}  // namespace rnnfast::cpu
