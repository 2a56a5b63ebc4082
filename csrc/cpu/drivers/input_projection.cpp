#include "cpu/drivers/input_projection.h"

namespace rnnfast::cpu {
namespace {

bool whole_rows_pay(const Context& context, const Sizes& size) {
  const int64_t G = context.cell.gates, lanes = context.kernels.lanes;
  const int64_t vectors = G * ceil_div(size.H, lanes);
  const int64_t words = ceil_div(size.I, context.kernels.dense->word);
  return (vectors - ceil_div(G * size.H, lanes)) * words > kWholeRowsGain * vectors;
}

}  // namespace

InputProjection::InputProjection(const Context& context, const ForwardArgs& args, const Plan& plan,
                                 const Batch& batch, int64_t block_rows, Arena& arena)
    : context_(context),
      args_(args),
      batch_(batch),
      by_units_(context, context.format(plan, plan.input, plan.block_split_precision),
                context.cell.gates, args.size.H, args.size.I, plan.input),
      block_rows_(block_rows),
      max_width_(by_units_.width() * ceil_div(by_units_.count(), plan.unit_shares)) {
  if (!plan.by_units() && !plan.block_split_precision && plan.input != Packing::kFrozen &&
      !args.tokens && whole_rows_pay(context, args.size))
    whole_rows_.emplace(context, by_units_.format(), 1, context.cell.gates * args.size.H,
                        args.size.I, plan.input);
  if (args.tokens) {
    table_.emplace(context, args.size.H, plan.input);
    table_->set(args.w_ih, args.b_ih);
  } else {
    GateWeights& own = whole_rows_ ? *whole_rows_ : by_units_;
    own.set(args.w_ih);
    own.take(arena, plan.threads);
  }
  projected_ = arena.take<char>(plan.threads * block_rows * context.compute(max_width_));
  inputs_ = arena.take<const void*>(plan.threads * block_rows);
  const WeightFormat& format = by_units_.format();
  const int64_t bytes = format.row_bytes(args.size.I);
  // x can be read in place if S is E and its rows need no zeros to fill the last word.
  const bool as_it_lies = !format.converts_lhs &&
                          context.kernels.storage_bytes == context.kernels.element_bytes &&
                          bytes == context.storage(args.size.I);
  if (!args.tokens && !as_it_lies)
    x_ = {arena.take<char>(plan.threads * block_rows * bytes), bytes};
}

void InputProjection::take_own(int thread) {
  (whole_rows_ ? *whole_rows_ : by_units_).take_own(thread);
  projected_ += thread * block_rows_ * context_.compute(max_width_);
  inputs_ += thread * block_rows_;
  if (x_) x_.data += thread * block_rows_ * x_.pitch;
}

void InputProjection::pack(const Team& team) {
  if (table_) return;  // it is not multiplied
  GateWeights& w = whole_rows_ ? *whole_rows_ : by_units_;
  good_ &= w.pack(args_.b_ih, team.share(w.count()));
}

const char* InputProjection::input(int64_t t, int64_t b) const {
  const int64_t offset = batch_.offset(t, b, args_.x_stride_t, args_.x_stride_b);
  return table_ ? table_->row(args_.tokens[offset]) : at(args_.x, context_.storage(offset));
}

void InputProjection::run(Span steps, Span rows, Span panels) {
  own_ = panels;
  int64_t count = 0;
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    const int64_t t = args_.reverse ? args_.size.T - 1 - step : step;
    const Span active = batch_.active(t, rows);
    for (int64_t b = active.begin; b < active.end; ++b) inputs_[count++] = input(t, b);
  }
  if (table_) return;
  const WeightFormat& format = by_units_.format();
  for (int64_t r = 0; x_ && r < count; ++r)
    good_ &= format.load_lhs(x_[r], inputs_[r], args_.size.I);

  const GateWeights& w = weights();
  const Span own = whole_rows_ ? Span{0, w.count()} : own_;
  const int64_t stride = row_stride();
  TileOptions options = w.options();
  for (int64_t p = own.begin; p < own.end; ++p) {
    const GateWeights::Panel panel = w.panel(p, good_);
    const int64_t next = p + 1 < own.end ? p + 1 : -1;
    char* out = projected_ + context_.compute((p - own.begin) * w.width());
    for_row_tiles(count, panel.tile_rows, [&](int64_t r, int n) {
      const void* copies[kMaxTileRows];
      for (int i = 0; x_ && i < n; ++i) copies[i] = x_[r + i];
      w.prefetch_part(options, next, r, n, count);
      w.multiply(panel, x_ ? copies : inputs_ + r, n, out + context_.compute(r * stride), stride,
                 options);
    });
  }
}

InputProjection::Projected InputProjection::rows(int64_t first, int count, int64_t panel,
                                                 void* to) const {
  const int64_t stride = row_stride(), width = by_units_.width();
  if (table_) {
    table_->gather(inputs_ + first, count, panel, to);
    return {to, width};
  }
  if (whole_rows_) {
    const void* from[kMaxTileRows];
    for (int i = 0; i < count; ++i) from[i] = projected_ + context_.compute((first + i) * stride);
    context_.kernels.gather_gates(by_units_.shape(), from, count, panel, to);
    return {to, width};
  }
  const int64_t offset = first * stride + (panel - own_.begin) * width;
  return {projected_ + context_.compute(offset), stride};
}

}  // namespace rnnfast::cpu
