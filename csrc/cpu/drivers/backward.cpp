#include "cpu/drivers/backward.h"

#include "cpu/drivers/formats.h"

namespace rnnfast::cpu {

Backward::Backward(const Context& context, const BackwardArgs& args, const Plan& plan, Arena& arena)
    : context_(context),
      args_(args),
      plan_(plan),
      history_(context, args, arena),
      parameters_(context, args.parameters, args.size.H, arena),
      recompute_(context, args, plan, history_, parameters_, arena),
      products_(context, args, plan, history_, d_gates_, d_h_rows_, unprojected_, arena),
      hidden_(context, context.format(plan.step_split_precision), args.h_size),
      units_(context, *context.kernels.dense, args.size.H),
      block_rows_(plan.block_steps * args.size.B),
      gate_depth_(hidden_.format().converts_lhs
                      ? ceil_div(args.size.H, hidden_.format().step) * hidden_.format().step
                      : args.size.H),
      depth_(context.cell.gates * gate_depth_) {
  const int64_t B = args.size.B, H = args.size.H, P = args.h_size;
  w_hh_ = arena.take<char>((packs_at_once() ? hidden_.count() : plan.threads) *
                           hidden_.panel_bytes(depth_));
  const int64_t c_bytes = context.compute(context.padded_c_size(H));
  if (context.cell.cells > 0) d_c_ = {arena.take<char>(B * c_bytes), c_bytes};
  const int64_t h_bytes = context.compute(context.state_pitch(P));
  d_h_ = {arena.take<char>(B * h_bytes), h_bytes};
  // Rows of two blocks are kept, used alternately: so no thread waits for the products of the block
  // before. With recomputed gates all threads wait anyway, and the rows of one block and of the
  // step before it suffice.
  slots_ = recomputes() ? plan.block_steps + 1 : 2 * plan.block_steps;
  const int64_t vector = context.kernels.lanes * context.kernels.state_align;
  d_gates_ =
      StepRows::take(arena, slots_, B, context.element(context.gradient_blocks() * H + vector));
  tile_rows_ = arena.take<BackwardRow>(B);
  block_ = arena.take<BlockRow>(2 * block_rows_);
  block_counts_ = arena.take<int64_t>(2);
  if (hidden_.format().converts_lhs) {
    const int64_t bytes = hidden_.format().row_bytes(depth_);
    for (Rows& lhs : lhs_) lhs = {arena.take<char>(B * bytes), bytes};
  }
  if (!projects()) return;
  w_hr_ = arena.take<char>(units_.bytes(P));
  d_h_rows_ = StepRows::take(arena, slots_, B, context.element(context.state_pitch(P)));
  unprojected_ = StepRows::take(arena, slots_, B, context.storage(H));
}

StepShape Backward::step_shape(const Context& context, const Sizes& size, bool split_precision) {
  const WeightFormat& format = context.format(split_precision);
  const Columns columns(context, format, size.H);
  const int gates = context.cell.gates;
  StepShape shape = cpu::step_shape(context, format, size.B, columns.count(), gates * size.H,
                                    kMaxTileVectors, kMaxTileVectors * kCellCycles * gates);
  shape.whole_rows = context.normalizes();
  return shape;
}

void Backward::run(const Team& team) {
  const auto [T, B, I, H] = args_.size;
  if (!packs_at_once()) w_hh_ += team.index() * hidden_.panel_bytes(depth_);
  pack(team);
  history_.load(team);
  if (team.index() == 0) parameters_.load();
  load_state(team.share(B));
  team.barrier();
  rows_ = team.share_rows(B);
  panels_ = team.share_units(hidden_.count());
  unit_panels_ = team.share_units(units_.count());
  for (int64_t n = 0; n < T; n += plan_.block_steps) {
    const Span steps{n, std::min(T, n + plan_.block_steps)};
    // The lists in block_ alternate: threads may still read the one of the block before.
    const int64_t half = n / plan_.block_steps % 2;
    const BlockRow* block = block_ + half * block_rows_;
    if (team.index() == 0) list_rows(steps, half);
    if (recomputes()) {
      team.barrier();
      recompute_.run(block, block_counts_[half], team);
      team.barrier();
    }
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      step_back(step, team);
      if (step + 1 < steps.end) team.unit_barrier();
    }
    team.barrier();
    products_.run({steps, block, block_counts_[half]}, team);
  }
  const Span last = history_.active(T - 1, rows_);
  finish(T, last);
  if (!args_.reverse) finish(0, {last.end, rows_.end});
}

// Lists the rows of a block in the order of the batch, whatever their order in the threads' shares:
// so sums over them do not depend on the number of threads.
void Backward::list_rows(Span steps, int64_t half) {
  BlockRow* next = block_ + half * block_rows_;
  for (int64_t step = steps.begin; step < steps.end; ++step) {
    for (int64_t place = 0; place < args_.size.B; ++place) {
      const int64_t b = history_.batch.row_at(place);
      if (history_.time(step) < history_.batch.length(b)) *next++ = {int32_t(step), int32_t(b)};
    }
  }
  block_counts_[half] = next - (block_ + half * block_rows_);
}

// The saved blocks of a step and a sequence, S [saved][H].
const void* Backward::gates(int64_t step, int64_t b) const {
  return recomputes() ? recompute_.gates(step, b)
                      : history_.row(args_.gates, step, b,
                                     context_.storage(context_.saved_blocks() * args_.size.H));
}

char* Backward::w_hh_panel(int64_t panel) const {
  return packs_at_once() ? w_hh_ + panel * hidden_.panel_bytes(depth_) : w_hh_;
}
void Backward::pack_w_hh(int64_t panel) const {
  const int64_t H = args_.size.H, row_bytes = context_.storage(args_.h_size);
  const void* next = args_.w_hh;
  int64_t unit = 0;  // of the next row: each gate has H rows, and zeros up to gate_depth_
  hidden_.pack_all(depth_, panel, w_hh_panel(panel), [&](int64_t) {
    const void* row = unit < H ? next : nullptr;
    if (row) next = at(next, row_bytes);
    unit = unit + 1 < gate_depth_ ? unit + 1 : 0;
    return row;
  });
}

void Backward::pack(const Team& team) {
  recompute_.pack(team);
  products_.pack(team);
  const bool needs_w_hh = context_.cell.recurrent && (args_.size.T > 1 || args_.grad_h0);
  const Span own = team.share(packs_at_once() && needs_w_hh ? hidden_.count() : 0);
  for (int64_t p = own.begin; p < own.end; ++p) pack_w_hh(p);
  const int64_t P = args_.h_size, row_bytes = context_.storage(args_.size.H);
  const Span own_units = team.share(projects() ? units_.count() : 0);
  for (int64_t p = own_units.begin; p < own_units.end; ++p)
    units_.pack_all(P, p, w_hr_ + p * units_.panel_bytes(P),
                    [&](int64_t k) { return at(args_.w_hr, k * row_bytes); });
}

void Backward::load_state(Span rows) {
  const int64_t H = args_.size.H, P = args_.h_size, align = context_.kernels.state_align;
  // Writes the zeros after a row of n elements that fill the last word of an lhs of `depth`
  // elements, which ends with the row.
  const auto complete = [&](const StepRows& to, int64_t b, int64_t n, int64_t depth) {
    const int64_t rest = ceil_div(depth, align) * align - depth;
    for (int64_t step = 0; rest > 0 && step < slots_; ++step)
      std::memset(to(step, b) + context_.element(n), 0, size_t(context_.element(rest)));
  };
  const auto load = [&](const Rows& to, int64_t b, const void* from, int64_t n) {
    if (from) from = at(from, context_.storage(history_.batch.place(b) * n));
    context_.kernels.load(to[b], from, n);
  };
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    complete(d_gates_, b, context_.cell.grad_blocks * H, context_.cell.gates * H);
    if (projects()) complete(d_h_rows_, b, P, P);
    load(d_h_, b, args_.grad_h_n, P);
    if (d_c_) load(d_c_, b, args_.grad_c_n, context_.c_size(H));
  }
}

// The gate gradients of a step and a row, as an lhs row of the product with W_hh.
const void* Backward::weights_lhs(int64_t step, int64_t b) const {
  if (const Rows& converted = lhs_[step & 1]) return converted[b];
  const int64_t first = (context_.cell.grad_blocks - context_.cell.gates) * args_.size.H;
  return d_gates_(step, b) + context_.element(first);
}

// The gradient of the state before `step` that passes through W_hh, for the rows of a tile and one
// panel of columns. Steps count in the order of the backward.
void Backward::through_weights(int64_t step, int64_t panel, int64_t b, int rows, char* out,
                               const TileOptions& options) const {
  const void* lhs[kMaxTileRows];
  for (int i = 0; i < rows; ++i) lhs[i] = weights_lhs(step, b + i);
  hidden_.multiply(panel, rows, depth_, lhs, w_hh_panel(panel), out, hidden_.width(), options);
}

// Sets up the rows `now` that are active at a step for the cell's backward. Rows from `both` on
// begin here: the forward has no step after this one for them.
void Backward::set_rows(int64_t step, Span now, int64_t both) {
  const Cell& cell = context_.cell;
  for (int64_t b = now.begin; b < now.end; ++b) {
    const bool begins = b >= both;
    const bool from_next = cell.recurrent && !begins && !history_.cut(step - 1, b);
    const int64_t y_offset =
        history_.batch.offset(history_.time(step), b, args_.grad_y_stride_t, args_.grad_y_stride_b);
    tile_rows_[b] = {
        .saved = gates(step, b),
        .h =
            cell.reads_h ? history_.row(args_.y, step, b, context_.storage(args_.h_size)) : nullptr,
        .h_prev = cell.direct ? history_.h_before(step, b) : nullptr,
        .c = cell.cells > 0 ? history_.row(args_.cells, step, b, history_.c_bytes()) : nullptr,
        .c_prev = cell.cells > 0 ? history_.c_before(step, b) : nullptr,
        .grad_c = history_.row(args_.grad_cells, step, b, history_.c_bytes()),
        .grad_y = args_.grad_y ? at(args_.grad_y, context_.storage(y_offset)) : nullptr,
        .d_h_rest = begins || cell.direct ? d_h_[b] : nullptr,
        .takes_weights = from_next,
        .cut = history_.cut(step, b),
        .d_gates = d_gates_(step, b),
        .d_c = d_c_ ? d_c_[b] : nullptr,
        .d_h_direct = cell.direct ? d_h_[b] : nullptr,
        .output = args_.grad_w_hr ? unprojected_(step, b) : nullptr};
  }
}

// Runs the cell's backward on `count` rows from b on and one panel of units.
void Backward::apply_cell(int64_t step, int64_t panel, const BackwardRow* rows, int64_t b,
                          int count, const void* from_weights) const {
  const int64_t H = args_.size.H, first = panel * units_.width(), units = units_.columns(panel);
  context_.functions.backward({.H = H,
                               .first_unit = first,
                               .units = units,
                               .rows = rows,
                               .count = count,
                               .from_weights = from_weights,
                               .weights_stride = units_.width(),
                               .parameters = parameters_.data()});
  if (!context_.normalizes()) convert(step, rows, b, count, first, units);
}

// The gradients of the gates before they were normalised, for whole rows.
void Backward::pass_norm(int64_t step, Span rows) const {
  const int64_t H = args_.size.H, gates = context_.cell.gates * H;
  const int64_t own = context_.cell.parameters * H;
  const char* weight = at(parameters_.data(), context_.compute(own));
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    char* d_gates = d_gates_(step, b);
    char* d_weight = d_gates + context_.element(gates + own);
    context_.kernels.normalize_gates_backward(
        gates, d_gates, at(tile_rows_[b].saved, context_.storage(context_.cell.saved * H)), weight,
        context_.cell.norm_eps, d_weight, d_weight + context_.element(gates));
    convert(step, tile_rows_ + b, b, 1, 0, H);
  }
}

// Converts gate gradients of units [first, first + units) to lhs rows where the format needs that.
void Backward::convert(int64_t step, const BackwardRow* rows, int64_t b, int count, int64_t first,
                       int64_t units) const {
  const Rows& converted = lhs_[step & 1];
  if (!converted) return;
  const int64_t H = args_.size.H;
  const WeightFormat& format = hidden_.format();
  const int G = context_.cell.gates, D = context_.cell.grad_blocks;
  for (int i = 0; i < count; ++i) {
    for (int g = 0; g < G; ++g) {
      const int64_t to = format.steps(g * gate_depth_ + first) * format.row_step_bytes;
      format.load_lhs(converted[b + i] + to,
                      at(rows[i].d_gates, context_.element((D - G + g) * H + first)), units);
    }
  }
}

// The epilogue of a tile of the product with W_hh: the cell's backward. It runs at once or, if the
// weight format defers, row by row between the steps of the next tile's product.
class Backward::CellWork : public Deferred {
 public:
  CellWork(const Backward& all, int64_t step) : Deferred{&do_some, 0}, all_(all), step_(step) {}
  void take(int64_t panel, int64_t first, int count, const char* from_weights) {
    panel_ = panel, first_ = first, from_weights_ = from_weights;
    left = count;
  }
  void finish() {
    if (left > 0) run(int(left));
  }

 private:
  static void do_some(Deferred& deferred, int64_t pieces) {
    CellWork& work = static_cast<CellWork&>(deferred);
    work.run(int(std::min(pieces, work.left)));
  }
  void run(int count) {
    const BackwardRow* rows = all_.tile_rows_ + first_;
    const int64_t row_bytes = all_.context_.compute(all_.hidden_.width());
    if (!all_.projects()) {
      all_.apply_cell(step_, panel_, rows, first_, count, from_weights_);
    } else {
      const int64_t unit = panel_ * all_.hidden_.width();
      const auto& context = all_.context_;
      for (int i = 0; i < count; ++i) {
        const BackwardRow& row = rows[i];
        const bool weights = from_weights_ && row.takes_weights;
        context.kernels.gather_grad(
            all_.d_h_rows_(step_, first_ + i) + context.element(unit),
            row.grad_y ? at(row.grad_y, context.storage(unit)) : nullptr,
            weights ? from_weights_ + i * row_bytes : nullptr,
            row.d_h_rest ? at(row.d_h_rest, context.compute(unit)) : nullptr,
            all_.hidden_.columns(panel_));
      }
    }
    first_ += count;
    if (from_weights_) from_weights_ += count * row_bytes;
    left -= count;
  }

  const Backward& all_;
  const int64_t step_;
  int64_t panel_ = 0, first_ = 0;
  const char* from_weights_ = nullptr;
};

void Backward::step_back(int64_t step, const Team& team) {
  const Span now = history_.active(step, rows_);
  // The rows active in the step before. Rows only in `now` begin here; rows only in `before` have
  // just ended.
  const Span before = step > 0 ? history_.active(step - 1, rows_) : Span{rows_.begin, rows_.begin};
  const int64_t both = std::min(now.end, before.end);
  set_rows(step, now, both);
  const bool defers = hidden_.format().defers;
  TileBuffer from_weights[2];
  CellWork cell(*this, step);
  TileOptions options{.chain = hidden_.format().chain};
  options.deferred = &cell;
  int64_t count = 0;
  const auto run_rows = [&](int64_t p, Span part, bool begins, const char* next) {
    for_row_tiles(part.size(), hidden_.tile_rows(p), [&](int64_t r, int n) {
      const int64_t first = part.begin + r;
      char* out = from_weights[defers ? count++ % 2 : 0].data;
      if (!begins && context_.cell.recurrent) {
        prefetch_part(options, next, hidden_.panel_bytes(depth_), r, n, part.size());
        through_weights(step - 1, p, first, n, out, options);
      }
      cell.finish();
      cell.take(p, first, n, begins ? nullptr : out);
      if (!defers) cell.finish();
    });
  };
  // Panels are walked in alternating directions, as in the forward.
  const int64_t way = step % 2 ? -1 : 1, first = way > 0 ? panels_.begin : panels_.end - 1;
  for (int64_t i = 0; i < panels_.size(); ++i) {
    const int64_t p = first + way * i;
    const bool last = i + 1 == panels_.size();
    run_rows(p, {rows_.begin, both}, false, last ? nullptr : w_hh_panel(p + way));
    run_rows(p, {both, now.end}, true, nullptr);
  }
  cell.finish();
  if (context_.normalizes()) pass_norm(step, now);
  if (projects()) {
    team.unit_barrier();
    through_projection(step, now);
  }
  const int64_t over = step > 0 ? both : now.end;
  if (args_.reverse) finish(step, {over, step > 0 ? before.end : rows_.end});
}

void Backward::through_projection(int64_t step, Span rows) {
  const int64_t P = args_.h_size;
  TileBuffer d_output;
  const TileOptions options{.chain = units_.format().chain};
  for (int64_t p = unit_panels_.begin; p < unit_panels_.end; ++p) {
    for_row_tiles(rows.size(), units_.tile_rows(p), [&](int64_t r, int n) {
      const int64_t first = rows.begin + r;
      const void* lhs[kMaxTileRows];
      BackwardRow tile[kMaxTileRows];
      for (int i = 0; i < n; ++i) {
        lhs[i] = d_h_rows_(step, first + i);
        // d_h_rows_ already has the whole gradient of h.
        tile[i] = tile_rows_[first + i];
        tile[i].grad_y = tile[i].d_h_rest = nullptr;
        tile[i].takes_weights = true;
      }
      units_.multiply(p, n, P, lhs, w_hr_ + p * units_.panel_bytes(P), d_output.data,
                      units_.width(), options);
      apply_cell(step, p, tile, first, n, d_output.data);
    });
  }
}

// Stores the gradients of the initial states of rows whose last step was the one before `step`.
// With step 0: of rows whose sequences have no steps.
void Backward::finish(int64_t step, Span rows) const {
  if (rows.size() <= 0) return;
  const int64_t H = args_.size.H, P = args_.h_size, width = hidden_.width();
  const TileOptions options{.chain = hidden_.format().chain};
  const bool uses_once = step > 0 && context_.cell.recurrent && !packs_at_once();
  for (int64_t p = panels_.begin; args_.grad_h0 && p < panels_.end; ++p) {
    // d_h: what passes through W_hh, for n rows from `first` on
    const auto store = [&](int64_t first, int64_t n, const char* d_h) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t b = first + i;
        const bool weights = step > 0 && context_.cell.recurrent && !history_.cut(step - 1, b);
        const bool rest = step == 0 || context_.cell.direct;
        context_.kernels.store_sum(
            at(args_.grad_h0, context_.storage(history_.batch.place(b) * P + p * width)),
            weights ? d_h + context_.compute(i * width) : nullptr,
            rest ? d_h_[b] + context_.compute(p * width) : nullptr, hidden_.columns(p));
      }
    };
    if (uses_once && hidden_.reads_in_place(p, rows.size())) {
      InPlaceBuffer buffer;
      for (int64_t i = 0; i < rows.size(); ++i)
        buffer.lhs[i] = weights_lhs(step - 1, rows.begin + i);
      hidden_.multiply_in_place(p, rows.size(), depth_, buffer.lhs, args_.w_hh, buffer.data,
                                options.chain);
      store(rows.begin, rows.size(), buffer.data);
      continue;
    }
    if (uses_once) pack_w_hh(p);
    for_row_tiles(rows.size(), hidden_.tile_rows(p), [&](int64_t r, int n) {
      TileBuffer d_h;
      if (step > 0 && context_.cell.recurrent)
        through_weights(step - 1, p, rows.begin + r, n, d_h.data, options);
      store(rows.begin + r, n, d_h.data);
    });
  }
  const int64_t first = unit_panels_.begin * units_.width();
  const int64_t count = std::min(H, unit_panels_.end * units_.width()) - first;
  const int64_t size = context_.c_size(H);
  for (int64_t b = rows.begin; args_.grad_c0 && count > 0 && b < rows.end; ++b)
    for (int64_t unit = first; unit < size; unit += H)
      context_.kernels.store(
          at(args_.grad_c0, context_.storage(history_.batch.place(b) * size + unit)),
          d_c_[b] + context_.compute(unit), count);
}

}  // namespace rnnfast::cpu
