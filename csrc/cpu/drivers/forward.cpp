#include "cpu/drivers/forward.h"

#include "cpu/drivers/formats.h"

namespace rnnfast::cpu {
namespace {

bool converts_lhs(const GateWeights& weights) { return weights.format().converts_lhs; }

}  // namespace

Forward::Forward(const Context& context, const ForwardArgs& args, const Plan& plan, Arena& arena)
    : context_(context),
      args_(args),
      plan_(plan),
      batch_(args),
      hidden_(context, context.format(plan, plan.hidden, plan.step_split_precision),
              context.cell.gates, args.size.H, context.hidden_columns(args.h_size), plan.hidden),
      max_rows_(ceil_div(args.size.B, plan.row_shares)),
      input_(context, args, plan, batch_, plan.block_steps * max_rows_, arena),
      parameters_(context, args.parameters, args.size.H, arena) {
  const auto [T, B, I, H] = args.size;
  hidden_.set(args.w_hh);
  hidden_.take(arena, plan.threads);
  const int64_t others = plan.threads - 1;
  const auto take_rows = [&](int64_t count, int64_t bytes) {
    return Rows{arena.take<char>(count * bytes + others * kApartBytes), bytes};
  };
  for (Rows& h : h_) h = take_rows(B, context.element(context.state_pitch(args.h_size)));
  const int64_t c_bytes = context.compute(context.state_pitch(context.c_size(H)));
  if (args.w_hr) {
    const Packing packing = plan.hidden == Packing::kPanelwise ? Packing::kOnce : plan.hidden;
    projection_.emplace(context, context.format(plan, packing, false), 1, args.h_size, H, packing);
    projection_->set(args.w_hr);
    projection_->take(arena, plan.threads);
    unprojected_ = take_rows(B, context.element(context.state_pitch(H)));
  }
  tile_rows_ =
      reinterpret_cast<ForwardRow*>(take_rows(plan.threads * max_rows_, sizeof(ForwardRow)).data);
  if (context.cell.cells > 0) c_ = take_rows(plan.threads * max_rows_, c_bytes);
  if (converts_lhs(hidden_) || (projection_ && converts_lhs(*projection_))) {
    const int64_t bytes =
        std::max(hidden_.format().row_bytes(args.h_size),
                 projection_ ? projection_->format().row_bytes(projection_->K()) : 0);
    lhs_ = {arena.take<char>(plan.threads * max_rows_ * bytes), bytes};
  }
  if (context.normalizes()) {
    const int64_t bytes = context.compute(hidden_.count() * hidden_.width());
    // one vector more: rows at multiples of 4 KiB would compete for the same sets of L1
    sums_ = take_rows(plan.threads * max_rows_, bytes + context.compute(context.kernels.lanes));
    norm_weight_ = arena.take<char>(bytes), norm_bias_ = arena.take<char>(bytes);
  }
  if (batch_.has_resets()) zeros_ = arena.take<char>(h_[0].pitch);
}

StepShape Forward::step_shape(const Context& context, const Sizes& size,
                              const WeightFormat& format) {
  const GateWeights weights(context, format, context.cell.gates, size.H,
                            context.hidden_columns(size.H), Packing::kNone);
  const int vectors = weights.vectors(0);
  StepShape shape = cpu::step_shape(context, format, size.B, weights.count(), size.H, vectors,
                                    vectors * kCellCycles);
  shape.whole_rows = context.normalizes();
  return shape;
}

// Moves the pointers to this thread's part of the workspace. Threads that split the units of the
// same rows share h; everything else is a thread's own.
void Forward::take_own(const Team& team) {
  for (Rows& h : h_) h.data += team.row_index() * kApartBytes;
  if (unprojected_) unprojected_.data += team.row_index() * kApartBytes;
  input_.take_own(team.index());
  hidden_.take_own(team.index());
  if (lhs_) lhs_.data += team.index() * max_rows_ * lhs_.pitch;
  const int64_t rows = team.index() * max_rows_;
  tile_rows_ = reinterpret_cast<ForwardRow*>(reinterpret_cast<char*>(tile_rows_ + rows) +
                                             team.index() * kApartBytes);
  if (c_) c_.data += rows * c_.pitch + team.index() * kApartBytes;
  if (sums_) sums_.data += rows * sums_.pitch + team.index() * kApartBytes;
}

bool Forward::run(const Team& team, const Progress* upstream, Progress& done) {
  const int64_t T = args_.size.T;
  rows_ = team.share_rows(args_.size.B);
  panels_ = team.share_units(hidden_.count());
  take_own(team);
  pack(team);
  // Each row of h is loaded and stored by one of the threads that share it.
  const auto part = [&](Span of) {
    const Span own = team.share_units(of.size());
    return Span{of.begin + own.begin, of.begin + own.end};
  };
  load_h(part(rows_));
  load_c();
  if (team.index() == 0) load_parameters();
  if (zeros_ && team.index() == 0) std::memset(zeros_, 0, size_t(h_[0].pitch));
  team.barrier();
  const StepsFunction run_at_once = steps_of_one_row();
  for (int64_t s = 0; s < T; s += plan_.block_steps) {
    const Span steps{s, std::min(T, s + plan_.block_steps)};
    if (upstream) upstream->wait_for(steps.end);
    const bool projects = run_at_once && input_.is_cheap();  // the steps do it
    if (!projects) input_.run(steps, rows_, panels_);
    if (run_at_once) {
      run_steps(run_at_once, steps, projects);
      team.barrier();
      if (team.index() == 0) done.reach(steps.end);
      continue;
    }
    int64_t first = 0;  // index of the step's first row in the block
    Outputs before{steps.begin, {0, 0}};
    for (int64_t step = steps.begin; step < steps.end; ++step) {
      const Span active = batch_.active(time(step), rows_);
      if (sums_)
        advance_normalized(step, active, first, before);
      else
        advance(step, active, first, before);
      if (projection_) {
        team.unit_barrier();
        project_state(step, active, team.share_units(projection_->count()));
      }
      first += active.size();
      team.unit_barrier();
      before = {step, part(active)};  // these rows of h are complete now
      clear(step, part({active.end, rows_.end}));
    }
    write(before);
    team.barrier();
    if (team.index() == 0) done.reach(steps.end);
  }
  store_h(part(rows_));
  store_c();
  return good_ && input_.good();
}

void Forward::pack(const Team& team) {
  input_.pack(team);
  good_ &= hidden_.pack(args_.b_hh, team.share(hidden_.count()));
  if (projection_) projection_->pack(nullptr, team.share(projection_->count()));
}

void Forward::load_parameters() {
  parameters_.load();
  if (!sums_) return;
  const int64_t H = args_.size.H, own = context_.cell.parameters * H,
                gates = context_.cell.gates * H;
  const auto pack = [&](int64_t from, char* to) {
    context_.kernels.pack_bias(hidden_.shape(), at(args_.parameters, context_.storage(from)), 0,
                               hidden_.count(), to);
  };
  pack(own, norm_weight_);
  pack(own + gates, norm_bias_);
}

void Forward::load_h(Span rows) {
  const int64_t H = args_.size.H, P = args_.h_size;
  // Fills the last word of a row with zeros.
  const auto complete = [&](const Rows& to, int64_t b, int64_t n) {
    const int64_t rest =
        ceil_div(n, context_.kernels.state_align) * context_.kernels.state_align - n;
    std::memset(to[b] + context_.element(n), 0, size_t(context_.element(rest)));
  };
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    context_.kernels.load_state(h_[0][b], at(args_.h0, context_.storage(batch_.place(b) * P)), P);
    for (const Rows& h : h_) complete(h, b, P);
    if (unprojected_) complete(unprojected_, b, H);
    // In the reverse direction a short sequence starts late, maybe at an odd step.
    if (batch_.is_ragged()) std::memcpy(h_[1][b], h_[0][b], size_t(context_.element(P)));
  }
}

void Forward::store_h(Span rows) const {
  const int64_t P = args_.h_size;
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const int64_t steps = args_.reverse ? args_.size.T : batch_.length(b);
    context_.kernels.store_state(at(args_.h_n, context_.storage(batch_.place(b) * P)),
                                 h_[steps & 1][b], P);
  }
}

// For each block of each row of this thread's part of c, calls f(byte offset in a tensor S (B,
// C*H), address in c_, number of units).
template <class F>
void Forward::for_c(F&& f) const {
  const int64_t begin = panels_.begin * hidden_.units();
  const int64_t count = std::min(args_.size.H, panels_.end * hidden_.units()) - begin;
  const int64_t H = args_.size.H;
  for (int64_t b = rows_.begin; c_ && count > 0 && b < rows_.end; ++b)
    for (int64_t first = begin; first < context_.c_size(H); first += H)
      f(context_.storage(batch_.place(b) * context_.c_size(H) + first),
        c(b) + context_.compute(first), count);
}
void Forward::load_c() {
  for_c([&](int64_t from, char* to, int64_t count) {
    context_.kernels.load(to, at(args_.c0, from), count);
  });
}
void Forward::store_c() const {
  for_c([&](int64_t to, const char* from, int64_t count) {
    context_.kernels.store(at(args_.c_n, to), from, count);
  });
}

// Copies rows of y from h. Each thread writes whole rows: if it wrote only its units, threads would
// write close to each other (see kApartBytes).
void Forward::write(const Outputs& outputs) const {
  const int64_t P = args_.h_size, t = time(outputs.step);
  for (int64_t b = outputs.rows.begin; b < outputs.rows.end; ++b)
    context_.kernels.store_state(at(args_.y, context_.storage(batch_.row(t, b) * P)),
                                 h_after(outputs.step, b), P);
}

// Writes zeros as the outputs of sequences that are too short to have this step.
void Forward::clear(int64_t step, Span rows) const {
  if (batch_.is_packed()) return;
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const int64_t row = batch_.row(time(step), b);
    const int64_t y_bytes = context_.storage(args_.h_size),
                  c_bytes = context_.compute(context_.c_size(args_.size.H));
    std::memset(at(args_.y, row * y_bytes), 0, size_t(y_bytes));
    if (args_.cells) std::memset(at(args_.cells, row * c_bytes), 0, size_t(c_bytes));
  }
}

// The epilogue of a tile of the recurrent product: the cell's forward. It runs at once or, if the
// weight format defers, in pieces between the steps of the next tile's product.
class Forward::CellWork : public Deferred {
 public:
  explicit CellWork(const Forward& all)
      : Deferred{&do_some, 0},
        context_(all.context_),
        tile_{.H = all.args_.size.H,
              .first_unit = 0,
              .units = 0,
              .rows = nullptr,
              .count = 0,
              .from_x = nullptr,
              .x_stride = 0,
              .from_h = nullptr,
              .h_stride = all.context_.cell.recurrent ? all.hidden_.width() : 0,
              .parameters = all.parameters_.data()} {}

  void take(int64_t first_unit, int64_t units, const ForwardRow* rows, int count,
            const InputProjection::Projected& from_x, const void* from_h) {
    tile_.first_unit = first_unit, tile_.units = units;
    tile_.rows = rows, tile_.count = count;
    tile_.from_x = from_x.first, tile_.x_stride = from_x.stride;
    tile_.from_h = from_h;
    left = ceil_div(count, kPiece);
  }
  void finish() {
    if (left > 0) context_.functions.forward(tile_);
    left = 0;
  }

 private:
  static constexpr int kPiece = 3;  // rows

  static void do_some(Deferred& deferred, int64_t pieces) {
    CellWork& work = static_cast<CellWork&>(deferred);
    ForwardTile& tile = work.tile_;
    const int rest = tile.count;
    tile.count = int(std::min<int64_t>(rest, pieces * kPiece));
    work.context_.functions.forward(tile);
    const auto& context = work.context_;
    tile.rows += tile.count;
    tile.from_x = at(tile.from_x, context.compute(tile.count * tile.x_stride));
    tile.from_h = at(tile.from_h, context.compute(tile.count * tile.h_stride));
    tile.count = rest - tile.count;
    work.left = ceil_div(tile.count, kPiece);
  }

  const Context& context_;
  ForwardTile tile_;
};

// Sets up, for each of these rows, where the cell reads and writes its states.
void Forward::set_rows(int64_t step, Span rows) {
  const int64_t t = time(step), H = args_.size.H;
  const int64_t saved_bytes = context_.storage(context_.saved_blocks() * H);
  for (int64_t b = rows.begin; b < rows.end; ++b) {
    const int64_t row = batch_.row(t, b);
    const bool reset = batch_.resets(t, b);
    char* own_c = c_ ? c(b) : nullptr;
    tile_rows_[b - rows_.begin] = {
        .h_prev = reset ? zeros_ : h_[step & 1][b],
        .c_prev = reset ? nullptr : own_c,
        .h = unprojected_ ? unprojected_[b] : h_after(step, b),
        .c = own_c,
        .saved = args_.gates ? at(args_.gates, row * saved_bytes) : nullptr,
        .c_copy =
            args_.cells ? at(args_.cells, row * context_.compute(context_.c_size(H))) : nullptr};
  }
}

// One step of the recurrence: the product with W_hh, with the cell as the epilogue of each tile. It
// also writes the outputs of the step before, a few rows after each tile: written all at once, they
// would stall on memory.
void Forward::advance(int64_t step, Span rows, int64_t first_row, Outputs before) {
  const int64_t tiles = panels_.size() * count_tiles(rows.size(), hidden_.max_tile_rows());
  const int64_t at_once = tiles > 1 ? ceil_div(before.rows.size(), tiles) : before.rows.size();
  const auto write_some = [&] {
    if (before.rows.size() == 0) return;
    const int64_t end = std::min(before.rows.begin + at_once, before.rows.end);
    write({before.step, {before.rows.begin, end}});
    before.rows.begin = end;
  };
  set_rows(step, rows);
  ForwardRow* tile_rows = tile_rows_ + (rows.begin - rows_.begin);
  const bool converts = converts_lhs(hidden_);
  for (int64_t r = 0; converts && r < rows.size(); ++r)
    good_ &= hidden_.format().load_lhs(lhs_[r], tile_rows[r].h_prev, hidden_.K());

  const bool defers = hidden_.format().defers;
  TileBuffer from_h[2], from_x[2];
  CellWork cell(*this);
  TileOptions options = hidden_.options();
  options.deferred = &cell;
  int64_t count = 0;
  // Panels are walked in alternating directions: a step begins with those that the last step left
  // in cache.
  const int64_t way = step % 2 ? -1 : 1, first = way > 0 ? panels_.begin : panels_.end - 1;
  for (int64_t i = 0; i < panels_.size(); ++i) {
    const int64_t p = first + way * i;
    const GateWeights::Panel panel = hidden_.panel(p, good_);
    const int64_t next = i + 1 < panels_.size() ? p + way : -1;
    for_row_tiles(rows.size(), panel.tile_rows, [&](int64_t r, int n) {
      const void* lhs[kMaxTileRows];
      for (int i = 0; i < n; ++i) lhs[i] = converts ? lhs_[r + i] : tile_rows[r + i].h_prev;
      const int buffer = defers ? count++ % 2 : 0;
      if (context_.cell.recurrent) {
        hidden_.prefetch_part(options, next, r, n, rows.size());
        hidden_.multiply(panel, lhs, n, from_h[buffer].data, hidden_.width(), options);
      }
      cell.finish();
      cell.take(p * hidden_.units(), hidden_.units(p), tile_rows + r, n,
                input_.rows(first_row + r, n, p, from_x[buffer].data),
                context_.cell.recurrent ? from_h[buffer].data : kZeroGates);
      if (!defers) cell.finish();
      write_some();
    });
  }
  cell.finish();
  write(before);
}

// A step of a cell whose gates are normalised. The sums of all gates of a row are complete before
// the cell runs.
void Forward::advance_normalized(int64_t step, Span rows, int64_t first_row, Outputs before) {
  set_rows(step, rows);
  ForwardRow* tile_rows = tile_rows_ + (rows.begin - rows_.begin);
  const bool converts = converts_lhs(hidden_);
  for (int64_t r = 0; converts && r < rows.size(); ++r)
    good_ &= hidden_.format().load_lhs(lhs_[r], tile_rows[r].h_prev, hidden_.K());
  const int64_t H = args_.size.H, width = hidden_.width();
  const int64_t stride = sums_.pitch / context_.kernels.compute_bytes;
  TileOptions options = hidden_.options();
  TileBuffer from_x;
  const int64_t way = step % 2 ? -1 : 1, first = way > 0 ? panels_.begin : panels_.end - 1;
  for (int64_t i = 0; i < panels_.size(); ++i) {
    const int64_t p = first + way * i, place = context_.compute(p * width);
    const GateWeights::Panel panel = hidden_.panel(p, good_);
    const int64_t next = i + 1 < panels_.size() ? p + way : -1;
    for_row_tiles(rows.size(), panel.tile_rows, [&](int64_t r, int n) {
      const void* lhs[kMaxTileRows];
      for (int k = 0; k < n; ++k) lhs[k] = converts ? lhs_[r + k] : tile_rows[r + k].h_prev;
      hidden_.prefetch_part(options, next, r, n, rows.size());
      hidden_.multiply(panel, lhs, n, sums_[r] + place, stride, options);
      const auto projected = input_.rows(first_row + r, n, p, from_x.data);
      for (int k = 0; k < n; ++k)
        context_.kernels.add(sums_[r + k] + place,
                             at(projected.first, context_.compute(k * projected.stride)),
                             hidden_.vectors(p) * context_.kernels.lanes, true);
    });
  }
  for (int64_t r = 0; r < rows.size(); ++r) {
    void* saved = tile_rows[r].saved;
    context_.kernels.normalize_gates(
        hidden_.shape(), sums_[r], norm_weight_, norm_bias_, context_.cell.norm_eps,
        saved ? at(saved, context_.storage(context_.cell.saved * H)) : nullptr);
  }
  for (int64_t p = panels_.begin; p < panels_.end; ++p)
    context_.functions.forward({.H = H,
                                .first_unit = p * hidden_.units(),
                                .units = hidden_.units(p),
                                .rows = tile_rows,
                                .count = int(rows.size()),
                                .from_x = sums_.data + context_.compute(p * width),
                                .x_stride = stride,
                                .from_h = kZeroGates,
                                .h_stride = 0,
                                .parameters = parameters_.data()});
  write(before);
}

// The function for many steps at once, if this thread has a single row and nothing that function
// does not know; else null.
StepsFunction Forward::steps_of_one_row() const {
  const bool plain = context_.cell.recurrent && !projection_ && !batch_.is_ragged() &&
                     !batch_.has_resets() && !sums_;
  if (rows_.size() != 1 || plan_.by_units() || plan_.step_split_precision || !plain ||
      !hidden_.has_all_panels() || !input_.is_by_units())
    return nullptr;
  const WeightType type =
      plan_.hidden == Packing::kFrozen ? plan_.frozen : WeightType::kFloat32;  // the dense format
  return context_.functions.steps[int(type)];
}

void Forward::run_steps(StepsFunction run, Span steps, bool projects) {
  const int64_t b = rows_.begin, H = args_.size.H;
  const int64_t first = batch_.row(time(steps.begin), b);
  const int64_t rows = args_.reverse ? -args_.size.B : args_.size.B;  // from one step to the next
  const int64_t saved = context_.saved_blocks() * H;
  const GateWeights::Panel weights = hidden_.panel(0, good_);
  Steps all{.count = steps.size(),
            .H = H,
            .weights = weights.packed,
            .panels = hidden_.count(),
            .panel_bytes = hidden_.panel_bytes(),
            .last_vectors = hidden_.vectors(hidden_.count() - 1),
            .chain = hidden_.format().chain,
            .bias = weights.bias,
            .from_x = nullptr,
            .from_x_stride = 0,
            .x = nullptr,
            .x_stride = 0,
            .I = args_.size.I,
            .w_ih = nullptr,
            .b_ih = nullptr,
            .w_ih_panel_bytes = 0,
            .h = {h_[steps.begin & 1][b], h_[(steps.begin + 1) & 1][b]},
            .lhs = lhs_ ? lhs_[0] : nullptr,
            .c = c_ ? c(b) : nullptr,
            .y = at(args_.y, context_.storage(first * H)),
            .y_stride = rows * H,
            .saved = args_.gates ? at(args_.gates, context_.storage(first * saved)) : nullptr,
            .saved_stride = rows * saved,
            .c_copy = args_.cells ? at(args_.cells, context_.compute(first * context_.c_size(H)))
                                  : nullptr,
            .c_copy_stride = rows * context_.c_size(H),
            .parameters = parameters_.data()};
  if (projects) {
    const GateWeights::Panel input = input_.first_panel();
    all.x = input_.input(time(steps.begin), b);
    all.x_stride = args_.reverse ? -args_.x_stride_t : args_.x_stride_t;
    all.w_ih = input.packed, all.b_ih = input.bias;
    all.w_ih_panel_bytes = input_.panel_bytes();
  } else {
    const InputProjection::Projected from_x = input_.rows(0, 1, 0, nullptr);
    all.from_x = from_x.first, all.from_x_stride = from_x.stride;
  }
  run(all);
}

// h = W_hr times the h that the cells computed.
void Forward::project_state(int64_t step, Span rows, Span panels) {
  TileBuffer h;
  const TileOptions options = projection_->options();
  const int64_t width = projection_->width();
  const bool converts = converts_lhs(*projection_);
  for (int64_t r = 0; converts && r < rows.size(); ++r)
    good_ &=
        projection_->format().load_lhs(lhs_[r], unprojected_[rows.begin + r], projection_->K());
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const GateWeights::Panel panel = projection_->panel(p, good_);
    for_row_tiles(rows.size(), panel.tile_rows, [&](int64_t r, int n) {
      const void* lhs[kMaxTileRows];
      for (int i = 0; i < n; ++i)
        lhs[i] = converts ? lhs_[r + i] : unprojected_[rows.begin + r + i];
      projection_->multiply(panel, lhs, n, h.data, width, options);
      for (int i = 0; i < n; ++i)
        context_.kernels.round_state(
            h_after(step, rows.begin + r + i) + context_.element(p * width),
            h.data + context_.compute(i * width), projection_->units(p));
    });
  }
}

}  // namespace rnnfast::cpu
