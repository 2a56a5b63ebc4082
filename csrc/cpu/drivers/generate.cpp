#include "cpu/drivers/generate.h"

namespace rnnfast::cpu {

Generate::Generate(const Context& context, const GenerateArgs& args, Arena& arena)
    : context_(context),
      args_(args),
      head_(context, *context.kernels.dense, 1, args.V, args.H, Packing::kOnce) {
  const int64_t states = args.layers * args.B, pitch = context.state_pitch(args.H);
  layers_.reserve(size_t(args.layers));
  for (int64_t l = 0; l < args.layers; ++l) {
    const auto weights = [&](const void* w, Packing packing) {
      GateWeights result(context, *context.kernels.dense, context.cell.gates, args.H, args.H,
                         packing);
      result.set(w);
      result.take(arena, 1);
      return result;
    };
    // W_ih of the first layer is a table of tokens: it is looked up, not multiplied.
    layers_.push_back({weights(args.layer[l].w_ih, l > 0 ? Packing::kOnce : Packing::kNone),
                       weights(args.layer[l].w_hh, Packing::kOnce)});
  }
  head_.set(args.head_weight);
  head_.take(arena, 1);
  for (Rows& h : h_) {
    const int64_t bytes = context.element(pitch);
    h = {arena.take<char>(states * bytes), bytes};
  }
  const int64_t c_bytes = context.compute(pitch);
  if (context.cell.has_c) c_ = {arena.take<char>(states * c_bytes), c_bytes};
  const int64_t score_bytes = context.compute(head_.count() * head_.width());
  scores_ = {arena.take<char>(args.B * score_bytes), score_bytes};
}

void Generate::start(const Team& team) {
  const int64_t H = args_.H;
  for (int64_t l = 0; l < args_.layers; ++l) {
    auto& [input, hidden] = layers_[size_t(l)];
    const Span panels = team.share(hidden.count());
    input.pack(args_.layer[l].b_ih, panels);
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
  const Span rows = team.share(B), panels = team.share(layers_[0].hidden.count());
  for (int64_t step = 0; step < steps.count; ++step) {
    const int64_t* tokens = steps.tokens + step * B;
    for (int64_t b = 0; b < B; ++b)
      if (tokens[b] < 0) return;
    const int64_t parity = (steps.done + step) & 1;
    for (int64_t l = 0; l < args_.layers; ++l) {
      advance(l, parity, tokens, panels);
      team.barrier();
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

// One step of one layer, from the states h_[parity] to the other ones.
void Generate::advance(int64_t layer, int64_t parity, const int64_t* tokens, Span panels) {
  const auto& [input, hidden] = layers_[size_t(layer)];
  const int64_t H = args_.H;
  const void* table = args_.layer[0].w_ih;
  TileBuffer from_x, from_h;
  bool good = true;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    for_row_tiles(args_.B, hidden.tile_rows(p), [&](int64_t first, int n) {
      const void *below[kMaxTileRows], *before[kMaxTileRows];
      ForwardRow tile[kMaxTileRows];
      for (int i = 0; i < n; ++i) {
        before[i] = h(layer, parity, first + i);
        below[i] = layer > 0
                       ? h(layer - 1, parity ^ 1, first + i)
                       : at(table, context_.storage(tokens[first + i] * context_.cell.gates * H));
        char* c = c_ ? c_[layer * args_.B + first + i] : nullptr;
        tile[i] = {.h_prev = before[i],
                   .c_prev = c,
                   .h = h(layer, parity ^ 1, first + i),
                   .c = c,
                   .saved = nullptr,
                   .c_copy = nullptr};
      }
      if (layer > 0)
        input.multiply(input.panel(p, good), below, n, from_x.data, input.width(), input.options());
      else
        context_.kernels.gather_tokens(input.shape(), below, n, input.bias_at(p), p, from_x.data);
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
