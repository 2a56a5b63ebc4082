// The rhs of products: GateWeights for a weight matrix in panels of units, Columns for any other
// matrix. TokenTable is what is looked up in place of a product.
#pragma once

#include "cpu/drivers/context.h"
#include "cpu/frozen.h"

namespace rnnfast::cpu {

// A weight matrix (G*H, K) and its bias in panels of units (see GateShape), packed or read in
// place.
class GateWeights {
 public:
  GateWeights(const Context& context, const WeightFormat& format, int gates, int64_t H, int64_t K,
              Packing packing)
      : kernels_(context.kernels),
        format_(format),
        shape_{H, gates, gates == 1 ? kMaxTileVectors : 1},
        K_(K),
        packing_(packing),
        lanes_(context.kernels.lanes),
        vectors_(gates * shape_.unit_vectors),
        units_(int64_t(shape_.unit_vectors) * lanes_),
        width_(int64_t(vectors_) * lanes_),
        panel_bytes_(format.panel_bytes(vectors_, K)),
        count_(ceil_div(H, units_)),
        last_vectors_(gates > 1 ? vectors_ : int(ceil_div(H - (count_ - 1) * units_, lanes_))) {}

  // One panel, ready to be multiplied.
  struct Panel {
    int64_t index;
    const TileFunction* tiles;  // indexed by rows - 1
    int tile_rows;
    const char* packed;  // null if the weights are read in place
    const char* bias;
  };

  const WeightFormat& format() const { return format_; }
  const GateShape& shape() const { return shape_; }
  int64_t K() const { return K_; }
  int vectors() const { return vectors_; }
  int64_t units() const { return units_; }  // of a panel
  int64_t width() const { return width_; }  // columns of a panel
  int64_t panel_bytes() const { return panel_bytes_; }
  int64_t count() const { return count_; }
  // With one gate, the last panel has only the vectors that its units need.
  int vectors(int64_t panel) const { return panel + 1 == count_ ? last_vectors_ : vectors_; }
  int tile_rows(int64_t panel) const { return format_.tile_rows[vectors(panel) - 1]; }
  int max_tile_rows() const { return format_.tile_rows[vectors_ - 1]; }
  int64_t units(int64_t panel) const { return std::min(units_, shape_.H - panel * units_); }
  // The columns of some panels side by side.
  int64_t width(Span panels) const {
    return panels.size() > 0 ? (panels.size() - 1) * width_ + vectors(panels.end - 1) * lanes_ : 0;
  }

  void take(Arena& arena, int threads) {
    if (packing_ == Packing::kFrozen) return;
    take_packed(arena, threads);
    bias_ = arena.take<char>(count() * width_ * kernels_.compute_bytes);
  }
  void take_packed(Arena& arena, int threads) {
    const int64_t panels = packing_ == Packing::kOnce        ? count()
                           : packing_ == Packing::kPanelwise ? threads
                                                             : 0;
    if (panels > 0) packed_ = arena.take<char>(panels * panel_bytes_);
  }
  // Selects this thread's buffer for panels that are packed one at a time.
  void take_own(int thread) {
    if (packing_ == Packing::kPanelwise) packed_ += thread * panel_bytes_;
  }
  // Sets the matrix: S (G*H, K), or a block of frozen weights.
  void set(const void* w) {
    if (packing_ != Packing::kFrozen) {
      w_ = w;
    } else if (w) {  // null while the workspace is measured
      packed_ = const_cast<char*>(frozen_panels(w));  // is not written to
      bias_ = packed_ + count() * panel_bytes_;
    }
  }

  // Packs these panels, if all panels are packed once, and the bias (null for zeros). Returns false
  // if a weight cannot be represented in the format.
  bool pack(const void* bias, Span panels) {
    if (packing_ == Packing::kFrozen) return true;
    bool good = true;
    for (int64_t p = panels.begin; p < panels.end && packing_ == Packing::kOnce; ++p)
      good &= format_.pack_gates(shape_, w_, K_, p, packed_ + p * panel_bytes_);
    if (bias_) kernels_.pack_bias(shape_, bias, panels.begin, panels.end, bias_at(panels.begin));
    return good;
  }

  // Whether the panels are in memory one after the other, from before the first step on.
  bool has_all_panels() const { return packing_ == Packing::kOnce || packing_ == Packing::kFrozen; }

  // Returns a panel. Packs it first if panels are packed one at a time, and clears `good` if a
  // weight cannot be represented.
  Panel panel(int64_t p, bool& good) const {
    const int n = vectors(p);
    const char* packed = packed_;
    if (has_all_panels()) packed += p * panel_bytes_;
    if (packing_ == Packing::kPanelwise) good &= format_.pack_gates(shape_, w_, K_, p, packed_);
    return {p, format_.tiles[n - 1], format_.tile_rows[n - 1], packed, bias_at(p)};
  }
  // A panel whose weights are read in place.
  Panel unpacked_panel(int64_t p) const {
    const int n = vectors(p);
    return {p, format_.tiles[n - 1], format_.tile_rows[n - 1], nullptr, bias_at(p)};
  }
  // Makes the tile of `count` of the `rows` rows of a product prefetch its part of panel p (none if
  // negative), which is used next: packed, or as the rows of w that will be packed.
  void prefetch_part(TileOptions& options, int64_t p, int64_t first, int count,
                     int64_t rows) const {
    const char* from = nullptr;
    int64_t bytes = 0;
    if (p >= 0 && has_all_panels()) {
      from = packed_ + p * panel_bytes_, bytes = panel_bytes_;
    } else if (p >= 0 && packing_ == Packing::kPanelwise) {
      // Each gate has its rows in one piece. Each tile prefetches from one of them.
      const int64_t row = K_ * kernels_.storage_bytes, gates = shape_.gates;
      const int64_t gate = gates * first / rows, begin = ceil_div(rows * gate, gates);
      from = at(w_, (gate * shape_.H + p * units_) * row), bytes = units(p) * row;
      first -= begin, rows = ceil_div(rows * (gate + 1), gates) - begin;
      count = int(std::min<int64_t>(count, rows - first));
    }
    cpu::prefetch_part(options, from, bytes, first, count, rows);
  }

  // out = W lhs + bias for a tile of up to tile_rows rows; see TileFunction.
  void multiply(const Panel& panel, const void* const* lhs, int rows, void* out, int64_t stride,
                const TileOptions& options) const {
    if (panel.packed)
      return panel.tiles[rows - 1](rows, K_, lhs, panel.packed, panel.bias, out, stride, options);
    for_row_tiles(rows, kernels_.dot_rows, [&](int64_t first, int n) {
      kernels_.dots(shape_, n, K_, lhs + first, w_, panel.index, panel.bias,
                    at(out, first * stride * kernels_.compute_bytes), stride);
    });
  }

  TileOptions options() const { return {.chain = format_.chain}; }
  char* bias_at(int64_t panel) const { return bias_ + panel * width_ * kernels_.compute_bytes; }

 private:
  const MicroKernels& kernels_;
  const WeightFormat& format_;
  const GateShape shape_;
  const int64_t K_;
  const Packing packing_;
  const int lanes_, vectors_;
  const int64_t units_, width_, panel_bytes_, count_;
  const int last_vectors_;
  const void* w_ = nullptr;
  char* packed_ = nullptr;  // all panels or one; null if weights are read in place
  char* bias_ = nullptr;    // A [panel][width]
};

// A table (V, G*H) with W_ih x for every token, and the bias of W_ih.
class TokenTable {
 public:
  TokenTable(const Context& context, int64_t H, Packing packing)
      : kernels_(context.kernels),
        shape_{H, context.cell.gates, context.cell.gates == 1 ? kMaxTileVectors : 1},
        packing_(packing),
        pitch_(context.storage(context.cell.gates * H)) {}

  // Sets the table, S (V, G*H), and its bias, S (G*H) or null; or a block of frozen weights, which
  // has the bias within.
  void set(const void* table, const void* bias) {
    rows_ = table, bias_ = bias;
    if (packing_ != Packing::kFrozen || !table) return;  // null while the workspace is measured
    const FrozenTable frozen = frozen_table(table);
    rows_ = frozen.rows, pitch_ = frozen.pitch;
    scales_ = frozen.scales, bias_ = frozen.bias;
    gather_ = kernels_.gather_frozen_tokens[int(frozen.type)];
  }

  const char* row(int64_t token) const { return at(rows_, token * pitch_); }
  // The part of some rows that belongs to a panel; see GatherFunction.
  void gather(const void* const* rows, int count, int64_t panel, void* to) const {
    gather_(shape_, rows, count, scales_, bias_, panel, to);
  }

 private:
  const MicroKernels& kernels_;
  const GateShape shape_;
  const Packing packing_;
  GatherFunction gather_ = kernels_.gather_tokens;
  int64_t pitch_;  // bytes from one row to the next
  const void* rows_ = nullptr;
  const float* scales_ = nullptr;
  const void* bias_ = nullptr;
};

// A general rhs (K, N) in panels of kMaxTileVectors vectors of columns. The last panel has only the
// vectors that it needs.
class Columns {
 public:
  Columns(const Context& context, const WeightFormat& format, int64_t N)
      : format_(format),
        N_(N),
        lanes_(context.kernels.lanes),
        width_(kMaxTileVectors * lanes_),
        count_(ceil_div(N, width_)),
        last_vectors_(int(ceil_div(N - (count_ - 1) * width_, lanes_))) {}

  const WeightFormat& format() const { return format_; }
  int64_t N() const { return N_; }
  int64_t width() const { return width_; }
  int64_t count() const { return count_; }
  int vectors(int64_t panel) const { return panel + 1 == count_ ? last_vectors_ : kMaxTileVectors; }
  int64_t columns(int64_t panel) const { return std::min(width_, N_ - panel * width_); }
  int tile_rows(int64_t panel) const { return format_.tile_rows[vectors(panel) - 1]; }
  int64_t panel_bytes(int64_t K) const { return format_.panel_bytes(kMaxTileVectors, K); }
  int64_t bytes(int64_t K) const { return count() * panel_bytes(K); }

  // Packs rows [begin, begin + count) of the K rows of a panel: rows[i] is a row of S, or null for
  // zeros. begin must be a multiple of the format's step.
  void pack(const void* const* rows, int64_t begin, int64_t count, int64_t panel,
            void* packed) const {
    const int n = vectors(panel);
    format_.pack_columns(rows, count, panel * width_, N_, n,
                         at(packed, format_.panel_bytes(n, begin)));
  }
  // Packs all K rows of a panel; row(k) returns row k, and is called once for each k, in order.
  template <class F>
  void pack_all(int64_t K, int64_t panel, void* packed, F&& row) const {
    const void* rows[kPackedRows];
    for (int64_t begin = 0; begin < K; begin += kPackedRows) {
      const int64_t n = std::min(kPackedRows, K - begin);
      for (int64_t i = 0; i < n; ++i) rows[i] = row(begin + i);
      pack(rows, begin, n, panel, packed);
    }
  }

  // out = the product of a tile of rows with a packed panel; see TileFunction.
  void multiply(int64_t panel, int rows, int64_t K, const void* const* lhs, const void* packed,
                void* out, int64_t stride, const TileOptions& options) const {
    format_.tiles[vectors(panel) - 1][rows - 1](rows, K, lhs, packed, nullptr, out, stride,
                                                options);
  }
  // Whether a panel that is used once is faster read in place than packed.
  bool reads_in_place(int64_t panel, int64_t rows) const {
    return format_.in_place[0] && columns(panel) == width_ && rows <= kInPlaceRows;
  }
  // out (rows, width) = the product of up to kInPlaceRows rows with a panel of `matrix`, contiguous
  // rows of S. Each chain of the sum is computed for all rows while its part of the panel is in L1
  // or L2. Results have the bits of `multiply`.
  void multiply_in_place(int64_t panel, int64_t rows, int64_t K, const void* const* lhs,
                         const void* matrix, void* out, int64_t chain) const {
    const int64_t word = format_.weight_bytes, row_bytes = N_ * word;
    const char* part = at(matrix, panel * width_ * word);
    const char* next_panel = panel + 1 < count_ ? at(part, width_ * word) : nullptr;
    for (int64_t k = 0; k == 0 || k < K; k += chain) {
      const int64_t depth = std::min(chain, K - k);
      const char* next = k + depth < K ? at(part, depth * row_bytes) : next_panel;
      TileOptions options{.chain = chain, .add = k > 0, .pitch = N_};
      // Each tile of three rows or more prefetches, of the next part, one line of each row of the
      // matrix.
      const char* end = next ? at(next, width_ * word) : nullptr;
      for_row_tiles(rows, tile_rows(panel), [&](int64_t first, int count) {
        const void* from[kMaxTileRows];
        for (int i = 0; i < count; ++i) from[i] = at(lhs[first + i], k * word);
        options.prefetch = next < end ? next : nullptr;
        options.prefetch_pitch = options.prefetch ? row_bytes : 0;
        next = options.prefetch ? at(next, kLineBytes) : nullptr;
        format_.in_place[count - 1](count, depth, from, part, nullptr,
                                    at(out, first * width_ * word), width_, options);
      });
      part = at(part, depth * row_bytes);
    }
  }

 private:
  const WeightFormat& format_;
  const int64_t N_;
  const int lanes_;
  const int64_t width_, count_;
  const int last_vectors_;
};

}  // namespace rnnfast::cpu
