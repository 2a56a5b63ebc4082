// AMX's instructions as functions, by Intel's definition, for processors without AMX. This replaces
// kernels/amx_instructions.h. Where the processor would raise an exception, these throw one.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>

namespace rnnfast::cpu::RNNFAST_TARGET::amx {

struct TileRegister {
  int rows, row_bytes;  // 0 if the register is not configured
  alignas(64) char data[16][64];
};
inline thread_local TileRegister tile_registers[8];
inline thread_local bool tiles_configured = false;

inline void configure(const void* shapes) {
  const auto bytes = static_cast<const uint8_t*>(shapes);
  if (bytes[0] != 1 || bytes[1] != 0) throw std::logic_error("ldtilecfg: palette or start row");
  for (int i = 2; i < 16; ++i)
    if (bytes[i] != 0) throw std::logic_error("ldtilecfg: reserved bytes");
  for (int i = 0; i < 16; ++i) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof(row_bytes));
    const int rows = bytes[48 + i];
    if (rows > 16 || row_bytes > 64 || (rows == 0) != (row_bytes == 0) || (i >= 8 && rows > 0))
      throw std::logic_error("ldtilecfg: shape of a register");
    if (i < 8) tile_registers[i] = {rows, row_bytes, {}};
  }
  tiles_configured = true;
}

inline void release() {
  tiles_configured = false;
  for (TileRegister& tile : tile_registers) tile = {};
}

inline TileRegister& tile_register(int i) {
  TileRegister& tile = tile_registers[i];
  if (!tiles_configured || tile.rows == 0)
    throw std::logic_error("an AMX register that is not configured");
  return tile;
}

template <int kRegister>
void load_tile(const void* from, int64_t stride) {
  TileRegister& tile = tile_register(kRegister);
  std::memset(tile.data, 0, sizeof(tile.data));
  for (int i = 0; i < tile.rows; ++i)
    std::memcpy(tile.data[i], static_cast<const char*>(from) + i * stride, size_t(tile.row_bytes));
}
template <int kRegister>
void store_tile(void* to, int64_t stride) {
  const TileRegister& tile = tile_register(kRegister);
  for (int i = 0; i < tile.rows; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, tile.data[i], size_t(tile.row_bytes));
}
template <int kRegister>
void clear_tile() {
  std::memset(tile_register(kRegister).data, 0, sizeof(tile_register(kRegister).data));
}

// For each element, sums the products of the even and of the odd elements of pairs separately, by
// multiply-adds. Then adds the two sums, and their sum to the element. The caller sets the
// rounding.
__attribute__((noinline)) inline void tile_product(TileRegister& sums, const TileRegister& lhs,
                                                   const TileRegister& rhs) {
  const __m512i odd_half = _mm512_set1_epi32(int(0xffff0000));
  for (int m = 0; m < sums.rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < lhs.row_bytes / 4; ++k) {
      int32_t pair;
      std::memcpy(&pair, lhs.data[m] + 4 * k, sizeof(pair));
      const __m512i of_lhs = _mm512_set1_epi32(pair), of_rhs = _mm512_load_si512(rhs.data[k]);
      even = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(of_lhs, 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(of_rhs, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(of_lhs, odd_half)),
                            _mm512_castsi512_ps(_mm512_and_si512(of_rhs, odd_half)), odd);
    }
    const __m512 row = _mm512_add_ps(_mm512_load_ps(sums.data[m]), _mm512_add_ps(even, odd));
    const __mmask16 columns = __mmask16((1u << (sums.row_bytes / 4)) - 1);
    _mm512_store_ps(sums.data[m], _mm512_maskz_mov_ps(columns, row));
  }
}

// Calls multiply(sums, lhs, rhs) with the registers.
template <int kSums, int kLhs, int kRhs, class F>
void with_registers(F&& multiply) {
  static_assert(kSums != kLhs && kSums != kRhs && kLhs != kRhs, "AMX takes three registers");
  TileRegister& sums = tile_register(kSums);
  const TileRegister &lhs = tile_register(kLhs), &rhs = tile_register(kRhs);
  if (lhs.rows != sums.rows || rhs.row_bytes != sums.row_bytes || lhs.row_bytes != 4 * rhs.rows)
    throw std::logic_error("a product of AMX: shapes that do not fit");
  multiply(sums, lhs, rhs);
}

template <int kSums, int kLhs, int kRhs>
void multiply_pairs() {
  // AMX rounds to nearest even and flushes subnormal numbers, whatever the thread has set.
  constexpr unsigned kMasked = 0x1f80, kFlushToZero = 0x8000, kSubnormalsAreZero = 0x40;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kMasked | kFlushToZero | kSubnormalsAreZero);
  with_registers<kSums, kLhs, kRhs>(tile_product);
  _mm_setcsr(before);
}

template <int kSums, int kLhs, int kRhs>
void multiply_quads() {
  with_registers<kSums, kLhs, kRhs>(
      [](TileRegister& sums, const TileRegister& lhs, const TileRegister& rhs) {
        for (int m = 0; m < sums.rows; ++m)
          for (int n = 0; n < sums.row_bytes / 4; ++n) {
            uint32_t sum;
            std::memcpy(&sum, sums.data[m] + 4 * n, sizeof(sum));
            for (int k = 0; k < lhs.row_bytes; ++k)
              sum += uint32_t(int8_t(lhs.data[m][k])) * uint8_t(rhs.data[k / 4][4 * n + k % 4]);
            std::memcpy(sums.data[m] + 4 * n, &sum, sizeof(sum));
          }
      });
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET::amx
