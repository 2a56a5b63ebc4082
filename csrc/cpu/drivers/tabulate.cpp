#include "cpu/drivers/tabulate.h"

namespace rnnfast::cpu {
namespace {

// So many tokens use a panel of weights while it is in cache.
constexpr int64_t kTokensAtOnce = 48;

}  // namespace

Tabulate::Tabulate(const Context& context, const TabulateArgs& args, const Plan& plan, Arena& arena)
    : context_(context),
      args_(args),
      weights_(context, context.format(plan, Packing::kFrozen, false), context.cell.gates, args.H,
               args.I, Packing::kFrozen) {
  weights_.set(args.w_ih);
  const WeightFormat& format = weights_.format();
  if (!format.converts_lhs) return;
  const int64_t bytes = format.row_bytes(args.I);
  lhs_ = {arena.take<char>(plan.threads * kTokensAtOnce * bytes), bytes};
}

void Tabulate::run(const Team& team) const {
  const int64_t H = args_.H, G = context_.cell.gates, width = weights_.width();
  const Span own = team.share(args_.tokens);
  const TileOptions options = weights_.options();
  TileBuffer out;
  bool good = true;
  for (int64_t begin = own.begin; begin < own.end; begin += kTokensAtOnce) {
    const int64_t count = std::min(own.end - begin, kTokensAtOnce);
    const void* rows[kTokensAtOnce];
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = args_.x + (begin + i) * args_.I;
      if (!lhs_) continue;
      char* copy = lhs_[team.index() * kTokensAtOnce + i];
      weights_.format().load_lhs(copy, rows[i], args_.I);
      rows[i] = copy;
    }
    for (int64_t p = 0; p < weights_.count(); ++p) {
      const GateWeights::Panel panel = weights_.panel(p, good);
      const int64_t unit = p * weights_.units(), bytes = context_.compute(weights_.units(p));
      for_row_tiles(count, panel.tile_rows, [&](int64_t first, int n) {
        weights_.multiply(panel, rows + first, n, out.data, width, options);
        for (int i = 0; i < n; ++i)
          for (int64_t gate = 0; gate < G; ++gate)
            std::memcpy(args_.table + ((begin + first + i) * G + gate) * H + unit,
                        out.data + context_.compute(i * width + gate * (width / G)), size_t(bytes));
      });
    }
  }
}

}  // namespace rnnfast::cpu
