// Measures the rates of this machine, with all threads at work during the same time: every function
// waits for `start` (seconds of CLOCK_MONOTONIC), works for `seconds`, and returns its work per
// second. Compiled and called by roofline.py.
#include <stdatomic.h>
#include <stddef.h>
#include <time.h>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
enum { kVectorBytes = 64 };
#elif defined(__AVX__)
enum { kVectorBytes = 32 };
#else
enum { kVectorBytes = 16 };
#endif
enum { kLanes = kVectorBytes / sizeof(float), kChains = 12 };  // enough to hide the latency
typedef float Vector __attribute__((vector_size(kVectorBytes)));

static volatile float sink;  // keeps results from being optimised away

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void wait_for(double start) {
  while (now() < start) {
  }
}

static void consume(const Vector* sums) {
  Vector total = {0};
  for (int k = 0; k < kChains; ++k) total += sums[k];
  sink = total[0];
}

// Floating-point operations per second: independent multiply-adds, two operations each.
double fma_float32(double start, double seconds) {
  Vector sums[kChains] = {{0}}, factor, term;
  for (int k = 0; k < kLanes; ++k) factor[k] = 0.5f, term[k] = 1.0f;
  wait_for(start);
  double steps = 0, end;
  do {
    for (int i = 0; i < 1000; ++i)
#pragma GCC unroll 12
      for (int k = 0; k < kChains; ++k) sums[k] = sums[k] * factor + term;
    steps += 1000;
    end = now();
  } while (end < start + seconds);
  consume(sums);
  return steps * kChains * kLanes * 2 / (end - start);
}

#if defined(__AMX_BF16__)
// Linux lets a process use AMX's registers only after it has asked for permission.
static int may_use_matrix_unit(void) {
  enum { kRequestPermission = 0x1023, kTileData = 18 };  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

static double dot_in_matrix_unit(double start, double seconds) {
  struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  } __attribute__((aligned(64))) shapes = {.palette = 1};
  for (int k = 0; k < 8; ++k) shapes.row_bytes[k] = 64, shapes.rows[k] = 16;
  _tile_loadconfig(&shapes);
  enum { kSums = 4, kOperations = 2 * 16 * 16 * 32 };
  wait_for(start);
  double steps = 0, end;
  do {
    for (int i = 0; i < 1000; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    steps += 1000;
    end = now();
  } while (end < start + seconds);
  _tile_release();
  return steps * kSums * kOperations / (end - start);
}
#endif

// Floating-point operations per second on pairs of bfloat16 added to float32; 0 if the CPU has no
// such instructions.
double dot_bfloat16(double start, double seconds) {
#if defined(__AMX_BF16__)
  if (may_use_matrix_unit()) return dot_in_matrix_unit(start, seconds);
#endif
#if defined(__AVX512BF16__)
  __m512 sums[kChains];
  for (int k = 0; k < kChains; ++k) sums[k] = _mm512_setzero_ps();
  const __m512bh factor = _mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5f), _mm512_set1_ps(0.5f));
  wait_for(start);
  double steps = 0, end;
  do {
    for (int i = 0; i < 1000; ++i)
#pragma GCC unroll 12
      for (int k = 0; k < kChains; ++k) sums[k] = _mm512_dpbf16_ps(sums[k], factor, factor);
    steps += 1000;
    end = now();
  } while (end < start + seconds);
  consume((const Vector*)sums);
  return steps * kChains * kLanes * 4 / (end - start);
#else
  (void)start, (void)seconds;
  return 0;
#endif
}

// Bytes per second read from `size` bytes (a multiple of 1 KiB), over and over.
double read_memory(double start, double seconds, const char* data, size_t size) {
  enum { kBlock = 16, kBlocks = 512 };
  Vector sums[kBlock] = {{0}};
  wait_for(start);
  double blocks = 0, end;
  size_t at = 0;
  do {
    for (int i = 0; i < kBlocks; ++i) {
      const Vector* from = (const Vector*)(data + at);
#pragma GCC unroll 16
      for (int k = 0; k < kBlock; ++k) sums[k] += from[k];
      at += kBlock * sizeof(Vector);
      if (at >= size) at = 0;
    }
    blocks += kBlocks;
    end = now();
  } while (end < start + seconds);
  for (int k = kChains; k < kBlock; ++k) sums[0] += sums[k];
  consume(sums);
  return blocks * kBlock * sizeof(Vector) / (end - start);
}

// Barriers per second. `arrived` starts at 0 and is shared by all threads.
double barriers(double start, double seconds, atomic_long* arrived, long threads) {
  wait_for(start);
  long passed = 0;
  double end = now();
  while (end < start + seconds) {
    atomic_fetch_add(arrived, 1);
    const long all = ++passed * threads;
    for (int spins = 1; atomic_load_explicit(arrived, memory_order_acquire) < all; ++spins)
      if (spins % 1024 == 0 && now() > start + seconds) break;
    if (passed % 64 == 0) end = now();
    if (atomic_load_explicit(arrived, memory_order_relaxed) < all) break;
  }
  return (double)passed / (now() - start);
}
