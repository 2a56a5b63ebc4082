#include "cpu/drivers/generate.h"

namespace rnnfast::cpu {

Generate::Generate(const Context& context, const GenerateArgs& args, const Plan& plan, Arena& arena)
    : context_(context),
      args_(args),
      table_(context, args.H, plan.input),
      head_(context, *context.kernels.dense, 1, args.V, args.H, Packing::kOnce) {
  const int64_t states = args.layers * args.B, pitch = context.state_pitch(args.H);
  const Packing packing = plan.hidden == Packing::kFrozen ? Packing::kFrozen : Packing::kOnce;
  const WeightFormat& format = context.format(plan, packing, false);
  table_.set(args.layer[0].w_ih, args.layer[0].b_ih);
  layers_.reserve(size_t(args.layers));
  for (int64_t l = 0; l < args.layers; ++l) {
    layers_.push_back({{context, format, context.cell.gates, args.H, args.H, packing},
                       {context, format, context.cell.gates, args.H, args.H, packing}});
    auto& [input, hidden] = layers_.back();
    if (l > 0) {  // W_ih of the first layer is looked up, not multiplied
      input.set(args.layer[l].w_ih);
      input.take(arena, 1);
    }
    hidden.set(args.layer[l].w_hh);
    hidden.take(arena, 1);
  }
  head_.set(args.head_weight);
  head_.take(arena, 1);
  for (Rows& h : h_) {
    const int64_t bytes = context.element(pitch);
    h = {arena.take<char>(states * bytes), bytes};
  }
  if (format.converts_lhs) {
    const int64_t bytes = format.row_bytes(args.H);
    lhs_ = {arena.take<char>(plan.threads * states * bytes), bytes};
  }
  const int64_t c_bytes = context.compute(pitch);
  if (context.cell.cells > 0) c_ = {arena.take<char>(states * c_bytes), c_bytes};
  const int64_t score_bytes = context.compute(head_.count() * head_.width());
  scores_ = {arena.take<char>(args.B * score_bytes), score_bytes};
}

void Generate::start(const Team& team) {
  const int64_t H = args_.H;
  for (int64_t l = 0; l < args_.layers; ++l) {
    auto& [input, hidden] = layers_[size_t(l)];
    const Span panels = team.share(hidden.count());
    if (l > 0) input.pack(args_.layer[l].b_ih, panels);
    hidden.pack(args_.layer[l].b_hh, panels);
  }
  head_.pack(args_.head_bias, team.share(head_.count()));
  const Span rows = team.share(args_.layers * args_.B);
  const int64_t align = context_.kernels.state_align;
  const int64_t rest = context_.element(ceil_div(H, align) * align - H);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    context_.kernels.load_state(h_[0][row], at(args_.h0, context_.storage(row * H)), H);
    // Fill the last word of the row with zeros.
    for (const Rows& h : h_) std::memset(h[row] + context_.element(H), 0, size_t(rest));
    if (c_) context_.kernels.load(c_[row], at(args_.c0, context_.storage(row * H)), H);
  }
}

void Generate::run(const GenerateSteps& steps, Sampler* samplers, const Team& team) {
  const int64_t B = args_.B;
  const Span rows = team.share(B);
  for (int64_t l = 0; l < args_.layers; ++l) load_lhs(l, steps.done & 1, team);
  for (int64_t step = 0; step < steps.count; ++step) {
    const int64_t* tokens = steps.tokens + step * B;
    for (int64_t b = 0; b < B; ++b)
      if (tokens[b] < 0) return;
    const int64_t parity = (steps.done + step) & 1;
    for (int64_t l = 0; l < args_.layers; ++l) {
      advance(l, parity, tokens, team);
      team.barrier();
      load_lhs(l, parity ^ 1, team);
    }
    score(parity ^ 1, team.share(head_.count()));
    team.barrier();
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      Sampler& sampler = samplers[team.index()];
      const double uniform = steps.uniforms[step * B + b];
      const char* scores = scores_[b];
      steps.tokens[(step + 1) * B + b] =
          context_.kernels.compute_bytes == sizeof(double)
              ? sampler(args_.sampling, reinterpret_cast<const double*>(scores), args_.V, uniform)
              : sampler(args_.sampling, reinterpret_cast<const float*>(scores), args_.V, uniform);
    }
    team.barrier();
  }
}

// Makes lhs rows of a layer's h: this layer reads them in the next step, and the one above in this
// step. Each thread makes its own, which saves a barrier.
void Generate::load_lhs(int64_t layer, int64_t parity, const Team& team) {
  if (!lhs_) return;
  const int64_t first = layer * args_.B, own = team.index() * args_.layers * args_.B;
  for (int64_t row = first; row < first + args_.B; ++row)
    layers_[size_t(layer)].hidden.format().load_lhs(lhs_[own + row], h_[parity][row], args_.H);
}

// One step of one layer, from the states h_[parity] to the other ones.
void Generate::advance(int64_t layer, int64_t parity, const int64_t* tokens, const Team& team) {
  const auto& [input, hidden] = layers_[size_t(layer)];
  const Span panels = team.share(hidden.count());
  const int64_t H = args_.H, own = team.index() * args_.layers * args_.B;
  const auto lhs = [&](int64_t of_layer, int64_t of_parity, int64_t b) {
    return lhs_ ? lhs_[own + of_layer * args_.B + b] : h(of_layer, of_parity, b);
  };
  TileBuffer from_x, from_h;
  bool good = true;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    for_row_tiles(args_.B, hidden.tile_rows(p), [&](int64_t first, int n) {
      const void *below[kMaxTileRows], *before[kMaxTileRows];
      ForwardRow tile[kMaxTileRows];
      for (int i = 0; i < n; ++i) {
        before[i] = lhs(layer, parity, first + i);
        below[i] =
            layer > 0 ? lhs(layer - 1, parity ^ 1, first + i) : table_.row(tokens[first + i]);
        char* c = c_ ? c_[layer * args_.B + first + i] : nullptr;
        tile[i] = {.h_prev = h(layer, parity, first + i),
                   .c_prev = c,
                   .h = h(layer, parity ^ 1, first + i),
                   .c = c,
                   .saved = nullptr,
                   .c_copy = nullptr};
      }
      if (layer > 0)
        input.multiply(input.panel(p, good), below, n, from_x.data, input.width(), input.options());
      else
        table_.gather(below, n, p, from_x.data);
      hidden.multiply(hidden.panel(p, good), before, n, from_h.data, hidden.width(),
                      hidden.options());
      context_.functions.forward({.H = H,
                                  .first_unit = p * hidden.units(),
                                  .units = hidden.units(p),
                                  .rows = tile,
                                  .count = n,
                                  .from_x = from_x.data,
                                  .x_stride = hidden.width(),
                                  .from_h = from_h.data,
                                  .h_stride = hidden.width()});
    });
  }
}

// The scores of all tokens, from the last layer's h.
void Generate::score(int64_t parity, Span panels) {
  bool good = true;
  const int64_t stride = head_.count() * head_.width();
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const GateWeights::Panel panel = head_.panel(p, good);
    for_row_tiles(args_.B, panel.tile_rows, [&](int64_t first, int n) {
      const void* from[kMaxTileRows];
      for (int i = 0; i < n; ++i) from[i] = h(args_.layers - 1, parity, first + i);
      head_.multiply(panel, from, n, scores_[first] + context_.compute(p * head_.width()), stride,
                     head_.options());
    });
  }
}

}  // namespace rnnfast::cpu
