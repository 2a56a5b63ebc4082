// AVX-512 with AMX tiles (Intel's server processors): the products of bfloat16, of floats in split
// precision, and with frozen weights of int8. All other kernels are those of AVX512-BF16.
#if defined(__x86_64__)
#include "cpu/targets.h"

#include "cpu/kernels/isa/avx512_amx.h"

#include "cpu/kernels/amx_int8.h"
#include "cpu/kernels/bf16x3.h"
#include "cpu/tuning.h"

namespace rnnfast::cpu::avx512_amx {
namespace {

template <class F>
constexpr void set_tiles(WeightFormat& format, F function) {
  for (int vectors = 1; vectors <= kMaxTileVectors; ++vectors) {
    format.tile_rows[vectors - 1] = amx::kTileRows;
    for (TileFunction& tile : format.tiles[vectors - 1]) tile = function(vectors);
  }
}

constexpr WeightFormat make_bf16x3() {
  WeightFormat format{};
  format.name = "bf16x3";
  format.step = bf16x3::kStep;
  format.row_step_bytes = bf16x3::kRowStep * sizeof(float);
  // Rows at multiples of 4 KiB would compete for the same sets of L1.
  format.row_extra_bytes = RNNFAST_VECTOR_BYTES;
  format.panel_step_bytes = bf16x3::kTerms * bf16x3::kBlock * sizeof(float);
  format.converts_lhs = format.defers = true;
  format.word = 1;
  format.row_cycles = kSplitRowCycles;
  format.min_rows = kSplitMinRows;
  format.weight_bytes = bf16x3::kTerms * 2;
  format.exchange_cycles = kSplitExchangeCycles;
  format.chain = format.long_chain = kSplitChainSteps;
  set_tiles(format, [](int vectors) {
    constexpr TileFunction kByVectors[] = {bf16x3::product<1>, bf16x3::product<2>,
                                           bf16x3::product<3>, bf16x3::product<4>};
    return kByVectors[vectors - 1];
  });
  format.pack_gates = bf16x3::pack_gates;
  format.pack_columns = bf16x3::pack_columns;
  format.load_lhs = bf16x3::load_lhs;
  format.transpose_lhs = bf16x3::transpose_lhs;
  format.sum_lhs = bf16x3::sum_lhs;
  return format;
}

constexpr WeightFormat with_amx_pairs(WeightFormat format) {
  format.name = "bf16 pairs in AMX";
  format.defers = true;
  format.row_cycles = kAmxRowCycles;
  set_tiles(format, [](int vectors) {
    constexpr TileFunction kByVectors[] = {amx::product<1>, amx::product<2>, amx::product<3>,
                                           amx::product<4>};
    return kByVectors[vectors - 1];
  });
  return format;
}

// A single row stays with VNNI: there tiles would be nearly empty.
constexpr WeightFormat make_int8() {
  WeightFormat format = int8::make_format<int8::Int8Quads>();
  TileFunction of_one_row[kMaxTileVectors];
  for (int i = 0; i < kMaxTileVectors; ++i) of_one_row[i] = format.tiles[i][0];
  format.name = "int8 in AMX";
  format.defers = true;
  format.row_cycles = kAmxRowCycles;
  set_tiles(format, [](int vectors) {
    constexpr TileFunction kByVectors[] = {amx::int8_product<1>, amx::int8_product<2>,
                                           amx::int8_product<3>, amx::int8_product<4>};
    return kByVectors[vectors - 1];
  });
  for (int i = 0; i < kMaxTileVectors; ++i) format.tiles[i][0] = of_one_row[i];
  return format;
}

}  // namespace
}  // namespace rnnfast::cpu::avx512_amx

void rnnfast::cpu::add_amx(Target& target, WeightFormat& pairs) {
  static constexpr WeightFormat split = avx512_amx::make_bf16x3();
  static constexpr WeightFormat int8 = avx512_amx::make_int8();
  MicroKernels& of_bf16 = target.kernels[int(Dtype::kBFloat16)];
  pairs = avx512_amx::with_amx_pairs(*of_bf16.dense);
  of_bf16.dense = &pairs;
  target.kernels[int(Dtype::kFloat32)].split = &split;
  target.kernels[int(Dtype::kFloat32)].frozen[int(WeightType::kInt8)] = &int8;
  target.enter = avx512_amx::amx::enter;
  target.leave = avx512_amx::amx::leave;
}
#endif
