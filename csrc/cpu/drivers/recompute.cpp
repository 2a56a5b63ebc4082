#include "cpu/drivers/recompute.h"

namespace rnnfast::cpu {

Recompute::Recompute(const Context& context, const BackwardArgs& args, const Plan& plan,
                     const History& history, const CellParameters& parameters, Arena& arena)
    : context_(context),
      args_(args),
      history_(history),
      parameters_(parameters),
      // The forward's formats: others would sum in another order.
      formats_(choose_forward_formats(context, args.size)),
      input_(context, context.format(formats_.x_split), context.cell.gates, args.size.H,
             args.size.I, formats_.pack ? Packing::kOnce : Packing::kNone),
      hidden_(context, context.format(formats_.h_split), context.cell.gates, args.size.H,
              context.hidden_columns(args.h_size), formats_.pack ? Packing::kOnce : Packing::kNone),
      table_(context, args.size.H, Packing::kNone),
      block_steps_(plan.block_steps) {
  if (!wanted(context, args)) return;
  const int64_t block_rows = plan.block_steps * args.size.B;
  const int64_t gate_bytes = context.storage(context.cell.saved * args.size.H);
  gates_ = {arena.take<char>(block_rows * gate_bytes), gate_bytes};
  if (args.tokens) {
    table_.set(args.w_ih, args.b_ih);
  } else {
    input_.set(args.w_ih);
    input_.take(arena, plan.threads);
  }
  hidden_.set(args.w_hh);
  hidden_.take(arena, plan.threads);
  good_ = arena.take<bool>(plan.threads);
  const auto copies = [&](const GateWeights& w) {
    const int64_t bytes = w.format().row_bytes(w.K());
    const bool as_they_lie = context.kernels.storage_bytes == context.kernels.element_bytes &&
                             bytes == context.storage(w.K());
    return as_they_lie ? Rows{} : Rows{arena.take<char>(block_rows * bytes), bytes};
  };
  if (!args.tokens) x_ = copies(input_);
  h_ = copies(hidden_);
}

void Recompute::pack(const Team& team) {
  if (!wanted(context_, args_)) return;
  const Span panels = team.share(hidden_.count());
  bool good = true;
  if (!args_.tokens) good &= input_.pack(args_.b_ih, panels);
  good &= hidden_.pack(args_.b_hh, panels);
  good_[team.index()] = good;
}

void Recompute::run(const BlockRow* rows, int64_t count, const Team& team) const {
  const int64_t I = args_.size.I;
  const Span own = team.share(count);
  const auto x = [&](int64_t i) { return history_.x(rows[i].step, rows[i].b); };
  const auto h = [&](int64_t i) { return history_.h_before(rows[i].step, rows[i].b); };
  bool good = true;
  for (int i = 0; i < team.size(); ++i) good &= good_[i];
  for (int64_t i = own.begin; i < own.end; ++i) {
    if (x_) good &= input_.format().load_lhs(x_[i], x(i), I);
    if (h_) good &= hidden_.format().load_lhs(h_[i], h(i), hidden_.K());
  }
  // An lhs row. The row is read in place if there are no copies, or if a number cannot be
  // represented in them.
  const auto lhs = [&](const Rows& copies, int64_t i, const char* row) {
    return copies && good ? copies[i] : row;
  };
  const auto multiply = [&](const GateWeights& w, int64_t p, const void* const* from, int n,
                            char* out) {
    bool packed = good;
    const GateWeights::Panel panel = good ? w.panel(p, packed) : w.unpacked_panel(p);
    for_row_tiles(n, panel.tile_rows, [&](int64_t first, int part) {
      w.multiply(panel, from + first, part, at(out, context_.compute(first * w.width())), w.width(),
                 w.options());
    });
  };
  // The copies that the cell can read as h_prev: rows of E, which those in split precision are not.
  const Rows& states = formats_.h_split ? Rows{} : h_;
  TileBuffer from_x, from_h;
  for (int64_t p = 0; p < hidden_.count(); ++p) {
    for_row_tiles(own.size(), hidden_.max_tile_rows(), [&](int64_t r, int n) {
      const void *from[kMaxTileRows], *before[kMaxTileRows];
      ForwardRow tile[kMaxTileRows];
      for (int i = 0; i < n; ++i) {
        const int64_t index = own.begin + r + i;
        const BlockRow row = rows[index];
        from[i] =
            args_.tokens ? table_.row(history_.token(row.step, row.b)) : lhs(x_, index, x(index));
        before[i] = lhs(h_, index, h(index));
        tile[i] = {.h_prev = lhs(states, index, h(index)),
                   .c_prev = context_.cell.cells > 0 ? history_.c_before(row.step, row.b) : nullptr,
                   .h = nullptr,
                   .c = nullptr,
                   .saved = gates(row.step, row.b),
                   .c_copy = nullptr};
      }
      if (args_.tokens)
        table_.gather(from, n, p, from_x.data);
      else
        multiply(input_, p, from, n, from_x.data);
      multiply(hidden_, p, before, n, from_h.data);
      context_.functions.forward({.H = args_.size.H,
                                  .first_unit = p * hidden_.units(),
                                  .units = hidden_.units(p),
                                  .rows = tile,
                                  .count = n,
                                  .from_x = from_x.data,
                                  .x_stride = hidden_.width(),
                                  .from_h = from_h.data,
                                  .h_stride = hidden_.width(),
                                  .parameters = parameters_.data()});
    });
  }
}

}  // namespace rnnfast::cpu
