// Builds the table of micro-kernels of one instruction set from the headers of this folder.
#pragma once

#include "cpu/kernels/cell_functions.h"
#include "cpu/kernels/dots.h"
#include "cpu/kernels/int8.h"
#include "cpu/kernels/norm.h"
#include "cpu/tuning.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

// The dense format for tensors of S, whose words are Op's.
template <class Op, class S>
constexpr WeightFormat dense_format() {
  using A = typename Op::Compute;
  WeightFormat format{};
  format.name = Op::kPerWord > 1 ? "bf16 pairs" : "dense";
  format.step = Op::kPerWord;
  format.row_step_bytes = sizeof(A);
  format.panel_step_bytes = kLanes<A> * int(sizeof(typename Op::Weight));
  format.word = Op::kPerWord;
  format.row_cycles = 1;
  format.min_rows = 1;
  format.weight_bytes = sizeof(typename Op::Weight);
  format.chain = kChain;
  format.long_chain = kLongChain;
  fill_tiles<Op, std::is_same_v<S, A>>(format);
  format.pack_gates = pack_gates<Op, S>;
  format.pack_columns = pack_columns<Op, S>;
  format.load_lhs = load_lhs<Op, S>;
  format.transpose_lhs = transpose_lhs<Op>;
  format.sum_lhs = sum_lhs<Op>;
  return format;
}
template <class Op, class S>
inline constexpr WeightFormat kDenseFormat = dense_format<Op, S>();

// Frozen weights of a half type W, for tensors of float.
template <class W>
constexpr WeightFormat narrow_format() {
  WeightFormat format{};
  format.name = std::is_same_v<W, bf16> ? "bfloat16" : "float16";
  format.step = format.word = 1;
  format.row_step_bytes = sizeof(float);
  format.panel_step_bytes = kLanes<float> * int(sizeof(W));
  format.row_cycles = 1;
  format.min_rows = 1;
  format.weight_bytes = sizeof(W);
  format.chain = kChain;
  fill_tiles<NarrowOperand<W>, false>(format);
  format.load_lhs = load_lhs<NarrowOperand<W>, float>;
  return format;
}
template <class W>
inline constexpr WeightFormat kNarrowFormat = narrow_format<W>();

template <class Op>
constexpr Int8Kernels make_int8_kernels() {
  Int8Kernels k{.format = int8::make_format<Op>(), .steps = {}};
#define RNNFAST_CELL(C) k.steps[int(CellKind::k##C)] = steps<C, float, Int8RowProduct<Op>>;
  RNNFAST_FOR_EACH_CELL(RNNFAST_CELL)
#undef RNNFAST_CELL
  return k;
}

// A built-in cell: unlike a user's, it has steps for frozen weights.
template <class C, class S, class Op>
constexpr CellFunctions make_cell_with_frozen() {
  CellFunctions functions = make_cell<C, S, Op>();
  if constexpr (std::is_same_v<S, float>) {
    const auto set = [&](WeightType type, StepsFunction run) { functions.steps[int(type)] = run; };
    set(WeightType::kBFloat16, steps<C, S, RowProduct<NarrowOperand<bf16>>>);
    set(WeightType::kFloat16, steps<C, S, RowProduct<NarrowOperand<f16>>>);
    set(WeightType::kInt8, steps<C, S, Int8RowProduct<int8::Int16Pairs>>);
  }
  return functions;
}
// The kernels for tensors of S with products by Op, whose Element is E.
template <class S, class Op>
constexpr MicroKernels make_kernels(Dtype dtype) {
  using A = Compute<S>;
  using E = typename Op::Element;
  MicroKernels k{};
  k.target = RNNFAST_TARGET_NAME;
  k.dtype = dtype;
  k.lanes = kLanes<A>;
  k.storage_bytes = sizeof(S), k.compute_bytes = sizeof(A), k.element_bytes = sizeof(E);
  k.state_align = Op::kPerWord;
  k.dot_rows = kDotRows;
  k.dense = &kDenseFormat<Op, S>;
  if constexpr (std::is_same_v<S, float>) {
    k.frozen[int(WeightType::kFloat32)] = k.dense;
    k.frozen[int(WeightType::kBFloat16)] = &kNarrowFormat<bf16>;
    k.frozen[int(WeightType::kFloat16)] = &kNarrowFormat<f16>;
    k.frozen[int(WeightType::kInt8)] = &int8::kFormat<int8::Int16Pairs>;
    k.gather_frozen_tokens[int(WeightType::kFloat32)] = gather_tokens<float, S>;
    k.gather_frozen_tokens[int(WeightType::kBFloat16)] = gather_tokens<bf16, S>;
    k.gather_frozen_tokens[int(WeightType::kFloat16)] = gather_tokens<f16, S>;
    k.gather_frozen_tokens[int(WeightType::kInt8)] = gather_tokens<int8_t, S>;
  }
  k.load = convert_row<A, S>, k.store = convert_row<S, A>;
  k.load_state = convert_row<E, S>, k.store_state = convert_row<S, E>;
  k.round_state = round_row<E, S>;
  k.add = add_row<A>, k.add_elements = add_elements<E>;
  k.store_sum = store_sum<S>, k.gather_grad = gather_grad<E, S>;
  k.pack_bias = pack_bias<S>;
  k.gather_tokens = gather_tokens<S, S>, k.gather_gates = gather_gates<A>;
  k.dots = dots<S, E>, k.outer_few = outer_few<S, E>;
  k.normalize_gates = normalize_gates<S>;
  k.normalize_gates_backward = normalize_gates_backward<S, E>;
#define RNNFAST_CELL(C) k.cells[int(CellKind::k##C)] = make_cell_with_frozen<C, S, Op>();
  RNNFAST_FOR_EACH_CELL(RNNFAST_CELL)
#undef RNNFAST_CELL
  return k;
}

constexpr Target make_target() {
  Target target{};
  target.kernels[int(Dtype::kFloat64)] =
      make_kernels<double, DenseOperand<double>>(Dtype::kFloat64);
  target.kernels[int(Dtype::kFloat32)] = make_kernels<float, DenseOperand<float>>(Dtype::kFloat32);
  target.kernels[int(Dtype::kBFloat16)] = make_kernels<bf16, DenseOperand<float>>(Dtype::kBFloat16);
  target.kernels[int(Dtype::kFloat16)] = make_kernels<f16, DenseOperand<float>>(Dtype::kFloat16);
  return target;
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
