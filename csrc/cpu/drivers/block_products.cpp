#include "cpu/drivers/block_products.h"

#include <algorithm>
#include <compare>
#include <vector>

namespace rnnfast::cpu {
namespace {

constexpr int kSamePlace[] = {0, 1, 2, 3, 4, 5, 6, 7};
static_assert(std::size(kSamePlace) == kMaxGradBlocks);

}  // namespace

BlockProducts::BlockProducts(const Context& context, const BackwardArgs& args, const Plan& plan,
                             const History& history, const StepRows& d_gates, const StepRows& d_h,
                             const StepRows& unprojected, Arena& arena)
    : context_(context),
      args_(args),
      history_(history),
      d_gates_(d_gates),
      d_h_(d_h),
      unprojected_(unprojected),
      hidden_element_((context.cell.grad_blocks - context.cell.gates) * args.size.H),
      hidden_(context, context.format(plan.block_split_precision), args.h_size),
      input_(context, context.format(plan.block_split_precision), args.size.I),
      units_(context, *context.kernels.dense, args.size.H),
      panelwise_(plan.input == Packing::kPanelwise) {
  const int64_t rows = plan.block_steps * args.size.B, H = args.size.H;
  const int64_t depth = context.cell.gates * H;
  const WeightFormat& format = hidden_.format();
  if (args.grad_x) {
    const int64_t panels = panelwise_ ? plan.threads : input_.count();
    w_ih_ = arena.take<char>(panels * input_.panel_bytes(depth));
    if (format.converts_lhs) {
      const int64_t bytes = format.row_bytes(depth);
      lhs_rows_ = {arena.take<char>(rows * bytes), bytes};
    }
  }
  lhs_ = take_transposed(arena, context.gradient_blocks() * H, rows, format);
  x_ = arena.take<char>(input_.bytes(rows));
  h_ = arena.take<char>(hidden_.bytes(rows));
  if (!args.grad_w_hr) return;
  projection_lhs_ = take_transposed(arena, args.h_size, rows, units_.format());
  packed_unprojected_ = arena.take<char>(units_.bytes(rows));
}

BlockProducts::Transposed BlockProducts::take_transposed(Arena& arena, int64_t elements,
                                                         int64_t rows,
                                                         const WeightFormat& format) const {
  // Rows have an extra vector: rows at multiples of 4 KiB would compete for the same sets of L1.
  const int64_t whole = context_.kernels.lanes * format.word;
  const int64_t bytes = format.converts_lhs ? format.row_bytes(rows)
                                            : format.row_bytes((ceil_div(rows, whole) + 1) * whole);
  return {{arena.take<char>(elements * bytes), bytes}, &format};
}

void BlockProducts::pack(const Team& team) {
  if (!args_.grad_x || panelwise_) return;
  const Span own = team.share(input_.count());
  const int64_t bytes = input_.panel_bytes(context_.cell.gates * args_.size.H);
  for (int64_t p = own.begin; p < own.end; ++p) pack_w_ih(p, w_ih_ + p * bytes);
}

void BlockProducts::run(const Block& block, const Team& team) const {
  grad_input(block, team);
  grad_parameters(block, team);
}

void BlockProducts::pack_w_ih(int64_t panel, char* to) const {
  const int64_t H = args_.size.H, row_bytes = context_.storage(args_.size.I);
  input_.pack_all(context_.cell.gates * H, panel, to, [&](int64_t k) {
    return at(args_.w_ih, (context_.cell.input_gate[k / H] * H + k % H) * row_bytes);
  });
}

// Whether the blocks of gate gradients have the order of the gates in w_ih.
bool BlockProducts::gates_in_order() const {
  for (int j = 0; j < context_.cell.gates; ++j)
    if (context_.cell.input_gate[j] != j) return false;
  return true;
}

// grad_x[t] = d_gates[t] W_ih. Threads split the rows of the block or, if W_ih is packed panelwise,
// its panels.
void BlockProducts::grad_input(const Block& block, const Team& team) const {
  if (!args_.grad_x) return;
  const auto [T, B, I, H] = args_.size;
  const int64_t depth = context_.cell.gates * H, row_bytes = context_.storage(I);
  const auto target = [&](int64_t step, int64_t b) {
    return at(args_.grad_x, history_.batch.row(history_.time(step), b) * row_bytes);
  };
  const WeightFormat& format = input_.format();
  const Span own = panelwise_ ? Span{0, block.count} : team.share(block.count);
  const Span panels = panelwise_ ? team.share(input_.count()) : Span{0, input_.count()};
  if (lhs_rows_) {
    const Span converted = panelwise_ ? team.share(block.count) : own;
    for (int64_t r = converted.begin; r < converted.end; ++r)
      format.load_lhs(lhs_rows_[r], d_gates_(block.rows[r]), depth);
    if (panelwise_) team.barrier();
  }
  const TileOptions options{.chain = format.long_chain};
  const auto lhs_row = [&](int64_t r) -> const void* {
    return lhs_rows_ ? lhs_rows_[r] : d_gates_(block.rows[r]);
  };
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const auto store = [&](int64_t first, int64_t n, const char* d_x) {
      const BlockRow* rows = block.rows + first;
      for (int64_t i = 0; i < n; ++i)
        context_.kernels.store(
            target(rows[i].step, rows[i].b) + context_.storage(p * input_.width()),
            d_x + context_.compute(i * input_.width()), input_.columns(p));
    };
    if (panelwise_ && gates_in_order() && input_.reads_in_place(p, block.count)) {
      InPlaceBuffer buffer;
      for (int64_t r = 0; r < block.count; ++r) buffer.lhs[r] = lhs_row(r);
      input_.multiply_in_place(p, block.count, depth, buffer.lhs, args_.w_ih, buffer.data,
                               options.chain);
      store(0, block.count, buffer.data);
      continue;
    }
    char* packed = w_ih_ + (panelwise_ ? team.index() : p) * input_.panel_bytes(depth);
    if (panelwise_) pack_w_ih(p, packed);
    for_row_tiles(own.size(), input_.tile_rows(p), [&](int64_t r, int n) {
      TileBuffer d_x;
      const void* lhs[kMaxTileRows];
      for (int i = 0; i < n; ++i) lhs[i] = lhs_row(own.begin + r + i);
      input_.multiply(p, n, depth, lhs, packed, d_x.data, input_.width(), options);
      store(own.begin + r, n, d_x.data);
    });
  }
  if (!history_.batch.is_ragged() || history_.batch.is_packed()) return;
  const Span cleared = team.share(B);
  for (int64_t step = block.steps.begin; step < block.steps.end; ++step)
    for (int64_t b = cleared.begin; b < cleared.end; ++b)
      if (history_.time(step) >= history_.batch.length(b))
        std::memset(target(step, b), 0, size_t(row_bytes));
}

BlockProducts::WeightGrad BlockProducts::grad_of_w_ih() const {
  return {args_.grad_w_ih, context_.cell.gates, context_.cell.input_gate, args_.size.H, input_};
}
BlockProducts::WeightGrad BlockProducts::grad_of_w_hh() const {
  return {args_.grad_w_hh, context_.cell.gates, kSamePlace, args_.size.H, hidden_};
}
BlockProducts::WeightGrad BlockProducts::grad_of_w_hr() const {
  return {args_.grad_w_hr, 1, kSamePlace, args_.h_size, units_};
}

// The gradients of weights and biases. The threads together transpose d_gates and pack x and h
// once; after a barrier they split the products.
void BlockProducts::grad_parameters(const Block& block, const Team& team) const {
  if (args_.tokens && args_.grad_w_ih) grad_table(block, team);
  const bool of_x = args_.grad_w_ih && !args_.tokens;
  const bool any_weight = of_x || args_.grad_w_hh || args_.grad_w_hr;
  if (!any_weight && !args_.grad_b_ih && !args_.grad_b_hh && !args_.grad_parameters) return;
  const auto x = [&](BlockRow row) { return history_.x(row.step, row.b); };
  const auto h = [&](BlockRow row) { return history_.h_before(row.step, row.b); };
  const Span own = share_vectors(team, context_.gradient_blocks() * args_.size.H);
  if (block.count > 0 && block.count <= kFewRows) {
    grad_vectors(block, own, [&](int64_t m, int64_t n, void* sums) {
      const void* rows[kFewRows];
      for (int64_t k = 0; k < block.count; ++k) rows[k] = d_gates_(block.rows[k]);
      context_.kernels.add_elements(sums, rows, block.count, m, n, false);
    });
    if (of_x) sum_few(block, team, d_gates_, x, 0, grad_of_w_ih());
    if (args_.grad_w_hh) sum_few(block, team, d_gates_, h, hidden_element_, grad_of_w_hh());
    if (args_.grad_w_hr) sum_few(block, team, d_h_, unprojected_, 0, grad_of_w_hr());
    return;
  }
  transpose(block, own, d_gates_, lhs_);
  grad_vectors(block, own, [&](int64_t m, int64_t n, void* sums) {
    lhs_.format->sum_lhs(lhs_.rows[m], lhs_.rows.pitch, n, block.count, sums);
  });
  if (!any_weight) return;
  if (of_x) pack_rows(block, team, input_, x, x_);
  if (args_.grad_w_hh) pack_rows(block, team, hidden_, h, h_);
  if (args_.grad_w_hr) {
    transpose(block, share_vectors(team, args_.h_size), d_h_, projection_lhs_);
    pack_rows(block, team, units_, unprojected_, packed_unprojected_);
  }
  team.barrier();
  if (of_x) accumulate(block, team, lhs_, x_, grad_of_w_ih());
  if (args_.grad_w_hh) accumulate(block, team, lhs_.from(hidden_element_), h_, grad_of_w_hh());
  if (args_.grad_w_hr)
    accumulate(block, team, projection_lhs_, packed_unprojected_, grad_of_w_hr());
}

// Adds a few rows to a weight gradient without packing them, which would take longer than the
// product.
template <class Lhs, class Rhs>
void BlockProducts::sum_few(const Block& block, const Team& team, Lhs&& lhs, Rhs&& rhs,
                            int64_t first_element, const WeightGrad& grad) const {
  const void *lhs_rows[kFewRows], *rhs_rows[kFewRows];
  for (int64_t k = 0; k < block.count; ++k) {
    lhs_rows[k] = lhs(block.rows[k]);
    rhs_rows[k] = rhs(block.rows[k]);
  }
  const int64_t height = grad.height, N = grad.columns.N();
  const Span own = share_vectors(team, grad.count * height);
  for (int64_t j = own.begin / height; j * height < own.end; ++j) {
    const int64_t begin = std::max(own.begin, j * height),
                  end = std::min(own.end, (j + 1) * height);
    const int64_t row = grad.place[j] * height + begin - j * height;
    context_.kernels.outer_few(lhs_rows, rhs_rows, int(block.count), first_element + begin,
                               end - begin, N, at(grad.grad, context_.compute(row * N)),
                               !block.is_first());
  }
}

// Adds the gate gradients of each row to its token's row of the table. Rows of the same token are
// summed before they are added, kLongChain at a time: one chain over all of them would err more
// than the product with one-hot vectors. Threads split the columns, so that no two add to the same
// element.
void BlockProducts::grad_table(const Block& block, const Team& team) const {
  const int64_t H = args_.size.H, G = context_.cell.gates;
  const Span own = share_vectors(team, G * H);
  struct TokenRow {
    int64_t token, k;  // the k-th row of the block has this token
    auto operator<=>(const TokenRow&) const = default;
  };
  std::vector<TokenRow> sorted;
  sorted.reserve(size_t(block.count));
  for (int64_t k = 0; k < block.count; ++k)
    sorted.push_back({history_.token(block.rows[k].step, block.rows[k].b), k});
  std::sort(sorted.begin(), sorted.end());

  for (size_t next = 0; next < sorted.size();) {
    const int64_t token = sorted[next].token;
    const void* d_gates[kLongChain];
    int64_t count = 0;
    for (; count < kLongChain && next < sorted.size() && sorted[next].token == token; ++next)
      d_gates[count++] = d_gates_(block.rows[sorted[next].k]);
    for (int64_t j = own.begin / H; j * H < own.end; ++j) {
      const int64_t begin = std::max(own.begin, j * H), end = std::min(own.end, (j + 1) * H);
      const int64_t to = (token * G + context_.cell.input_gate[j]) * H + begin - j * H;
      context_.kernels.add_elements(at(args_.grad_w_ih, context_.compute(to)), d_gates, count,
                                    begin, end - begin, true);
    }
  }
}

// Adds to the gradients of biases and of the cell's parameters. sums(m, n, to) computes the sums
// over the block's rows of n gradients from the m-th on.
template <class Sums>
void BlockProducts::grad_vectors(const Block& block, Span own, Sums&& sums) const {
  if (!args_.grad_b_ih && !args_.grad_b_hh && !args_.grad_parameters) return;
  constexpr int64_t kAtOnce = 256;
  alignas(64) char buffer[kAtOnce * sizeof(double)];
  const int64_t H = args_.size.H, G = context_.cell.gates, D = context_.cell.grad_blocks;
  for (int64_t m = own.begin; m < own.end;) {
    const int64_t j = m / H, unit = m % H;
    const int64_t n = std::min({kAtOnce, H - unit, own.end - m});
    sums(m, n, buffer);
    const auto add = [&](void* grad, int64_t gate) {
      context_.kernels.add(at(grad, context_.compute(gate * H + unit)), buffer, n,
                           !block.is_first());
    };
    if (args_.grad_b_ih && j < G) add(args_.grad_b_ih, context_.cell.input_gate[j]);
    if (args_.grad_b_hh && j >= D - G && j < D) add(args_.grad_b_hh, j - (D - G));
    if (args_.grad_parameters && j >= D) add(args_.grad_parameters, j - D);
    m += n;
  }
}

// A thread's part of `elements` elements, in whole vectors.
Span BlockProducts::share_vectors(const Team& team, int64_t elements) const {
  const int64_t lanes = context_.kernels.lanes;
  const Span vectors = team.share(ceil_div(elements, lanes));
  return {vectors.begin * lanes, std::min(vectors.end * lanes, elements)};
}

// Transposes elements `own` of the rows of a block into lhs rows.
template <class Source>
void BlockProducts::transpose(const Block& block, Span own, Source&& source,
                              const Transposed& to) const {
  const WeightFormat& format = *to.format;
  const void* rows[kPackedRows];
  for (int64_t k = 0; k < block.count; k += kPackedRows) {
    const int64_t n = std::min(kPackedRows, block.count - k);
    for (int64_t i = 0; i < n; ++i) rows[i] = source(block.rows[k + i]);
    format.transpose_lhs(rows, n, own.begin, own.end,
                         to.rows[own.begin] + format.steps(k) * format.row_step_bytes,
                         to.rows.pitch);
  }
}

template <class Source>
void BlockProducts::pack_rows(const Block& block, const Team& team, const Columns& columns,
                              Source&& source, char* to) const {
  const Span own = team.share(columns.count());
  const void* rows[kPackedRows];
  for (int64_t k = 0; own.size() > 0 && k < block.count; k += kPackedRows) {
    const int64_t n = std::min(kPackedRows, block.count - k);
    for (int64_t i = 0; i < n; ++i) rows[i] = source(block.rows[k + i]);
    for (int64_t p = own.begin; p < own.end; ++p)
      columns.pack(rows, k, n, p, to + p * columns.panel_bytes(block.count));
  }
}

// Adds to a weight gradient. Its rows are cut into bands, and bands times panels of columns are
// split across threads. There is one band per thread; fewer if bands would be too low for the
// tiles, more if a band would not stay in L2 while the panels are read.
void BlockProducts::accumulate(const Block& block, const Team& team, const Transposed& lhs,
                               const char* packed, const WeightGrad& grad) const {
  const Columns& columns = grad.columns;
  const int64_t height = grad.height, rows = grad.count * height, depth = block.count;
  const int64_t panels = columns.count();
  const int64_t tile_rows = columns.format().tile_rows[kMaxTileVectors - 1];
  const int64_t tiles = ceil_div(rows, tile_rows);
  const int64_t max_tiles = std::max(kMinBandTiles, kBandBytes / (tile_rows * lhs.rows.pitch));
  const int64_t threads = std::clamp<int64_t>(tiles / kMinBandTiles, 1, team.size());
  const int64_t bands = ceil_div(tiles, threads * max_tiles) * threads;
  const int64_t at_once =
      std::max<int64_t>(kPanelGroupBytes / std::max<int64_t>(columns.panel_bytes(depth), 1), 1);
  const Span own = team.share(bands * panels);
  for (int64_t i = own.begin; i < own.end;) {
    const int64_t band = i / panels, p = i % panels;
    Span group{p, std::min(p + at_once, std::min(panels, p + own.end - i))};
    // A narrow last panel whose tiles are of another height is a group of its own.
    if (columns.tile_rows(group.end - 1) != columns.tile_rows(p)) --group.end;
    const int64_t begin = tiles * band / bands * tile_rows;
    const int64_t end = std::min(rows, tiles * (band + 1) / bands * tile_rows);
    for (int64_t j = begin / height; j * height < end; ++j) {
      const Span part{std::max(begin, j * height), std::min(end, (j + 1) * height)};
      const int64_t row = grad.place[j] * height + part.begin - j * height;
      outer_product(lhs.from(part.begin), part.size(), depth, packed, columns, group,
                    !block.is_first(), at(grad.grad, context_.compute(row * columns.N())));
    }
    i += group.size();
  }
}

// to[m][columns of the panels] (= or +=) the sum over k of lhs[m][k] packed[k]. Tiles of all these
// panels are equally high.
void BlockProducts::outer_product(const Transposed& lhs, int64_t rows, int64_t depth,
                                  const char* packed, const Columns& columns, Span panels, bool add,
                                  char* to) const {
  const WeightFormat& format = columns.format();
  const int64_t N = columns.N(), lanes = context_.kernels.lanes;
  TileOptions options{.chain = format.long_chain};
  for_row_tiles(rows, columns.tile_rows(panels.begin), [&](int64_t m, int n) {
    const void* from[kMaxTileRows];
    for (int i = 0; i < n; ++i) from[i] = lhs.rows[m + i];
    options.prefetch = lhs.rows[m + n];
    options.prefetch_bytes = n * lhs.rows.pitch;
    for (int64_t p = panels.begin; p < panels.end; ++p) {
      const char* panel = packed + p * columns.panel_bytes(depth);
      char* target = to + context_.compute(m * N + p * columns.width());
      // With so few terms a tile would wait for the lines that it writes: prefetch those of the
      // next.
      if (depth <= kLongChain && p + 1 < panels.end)
        fetch_tile(target + context_.compute(columns.width()), n, columns, p + 1);
      const bool whole = columns.vectors(p) * lanes <= N - p * columns.width();
      if (whole) {
        // AMX would wait for the lines that it adds to.
        if (add && format.defers && format.converts_lhs) fetch_tile(target, n, columns, p);
        options.add = add;
        columns.multiply(p, n, depth, from, panel, target, N, options);
      } else {
        TileBuffer edge;
        options.add = false;
        columns.multiply(p, n, depth, from, panel, edge.data, columns.width(), options);
        for (int i = 0; i < n; ++i)
          context_.kernels.add(target + context_.compute(i * N),
                               edge.data + context_.compute(i * columns.width()),
                               columns.columns(p), add);
      }
      options.prefetch = nullptr;
    }
  });
}

void BlockProducts::fetch_tile(const char* to, int rows, const Columns& columns,
                               int64_t panel) const {
  const int64_t row_bytes = context_.compute(columns.N());
  const int64_t tile_bytes = context_.compute(columns.vectors(panel) * context_.kernels.lanes);
  for (int i = 0; i < rows; ++i)
    for (int64_t byte = 0; byte < tile_bytes; byte += kLineBytes)
      __builtin_prefetch(to + i * row_bytes + byte, 1, 2);
}

}  // namespace rnnfast::cpu
