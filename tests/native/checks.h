// Tools for the checks of micro-kernels: guarded memory, numbers of every type read and written by
// their definition, and messages.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/microkernels.h"

namespace rnnfast::cpu::checks {

// ---- messages ----

inline char current_case[256];  // what is being checked, for messages
inline sigjmp_buf after_fault;

__attribute__((format(printf, 1, 2))) inline void now(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(current_case, sizeof(current_case), format, arguments);
  va_end(arguments);
}
[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  char words[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(words, sizeof(words), format, arguments);
  va_end(arguments);
  throw std::runtime_error(std::string(current_case) + ": " + words);
}

// Runs a check. Returns an empty string, or what was wrong and where.
template <class F>
const char* report(F&& check) {
  static std::string words;
  words.clear();
  struct sigaction fault{}, before{};
  fault.sa_handler = [](int) { siglongjmp(after_fault, 1); };
  sigaction(SIGSEGV, &fault, &before);
  if (sigsetjmp(after_fault, 1) == 0) {
    try {
      check();
    } catch (const std::exception& error) {
      words = error.what();
    }
  } else {
    words = std::string(current_case) + ": reads or writes beyond the end of memory";
  }
  sigaction(SIGSEGV, &before, nullptr);
  return words.c_str();
}

// ---- memory ----

// Bytes that end `slack` bytes before a page that cannot be accessed. They and the bytes around
// them are 0xff at first, which is NaN in every type.
class Buffer {
 public:
  explicit Buffer(int64_t bytes, int64_t slack = 0) : bytes_(bytes), slack_(slack) {
    const int64_t page = sysconf(_SC_PAGESIZE);
    usable_ = (bytes + slack + kBorder + page - 1) / page * page;
    std::vector<char*>& idle = idle_maps()[usable_];
    if (!idle.empty()) {
      map_ = idle.back();
      idle.pop_back();
    } else {
      map_ = static_cast<char*>(mmap(nullptr, size_t(usable_ + page), PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      if (map_ == MAP_FAILED || mprotect(map_ + usable_, size_t(page), PROT_NONE) != 0)
        throw std::runtime_error("no memory");
    }
    std::memset(data() - kBorder, 0xff, size_t(kBorder + bytes + slack));
  }
  Buffer(Buffer&& other)
      : bytes_(other.bytes_), slack_(other.slack_), usable_(other.usable_), map_(other.map_) {
    other.map_ = nullptr;
  }
  ~Buffer() {
    if (map_) idle_maps()[usable_].push_back(map_);
  }

  char* data() const { return map_ + usable_ - slack_ - bytes_; }
  int64_t bytes() const { return bytes_; }
  // Fails if anything around the bytes was written.
  void check_border(const char* what) const {
    check_untouched(what, -kBorder, 0);
    check_untouched(what, bytes_, bytes_ + slack_);
  }
  // Fails if any of these bytes was written.
  void check_untouched(const char* what, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i)
      if (data()[i] != char(0xff))
        fail("%s: byte %lld of %lld was written", what, (long long)i, (long long)bytes_);
  }

 private:
  static constexpr int64_t kBorder = 256;

  // Unused mappings by size. They are reused, since there are many and mapping takes long.
  static std::map<int64_t, std::vector<char*>>& idle_maps() {
    static std::map<int64_t, std::vector<char*>> all;
    return all;
  }

  int64_t bytes_, slack_, usable_;
  char* map_;
};

// ---- numbers ----

inline int size_of(Dtype type) {
  return type == Dtype::kFloat64 ? 8 : type == Dtype::kFloat32 ? 4 : 2;
}
inline Dtype compute_type(Dtype type) {
  return type == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
}
// Half a unit in the last place of 1.
inline double epsilon(Dtype type) {
  constexpr double kEpsilons[] = {0x1p-53, 0x1p-24, 0x1p-8, 0x1p-11};
  return kEpsilons[int(type)];
}

inline double half_value(Dtype type, uint16_t bits) {
  const bool is_bf16 = type == Dtype::kBFloat16;
  const int mantissa_bits = is_bf16 ? 7 : 10, bias = is_bf16 ? 127 : 15;
  const int exponent = (bits & 0x7fff) >> mantissa_bits;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const double sign = bits & 0x8000 ? -1 : 1;
  if (exponent == 2 * bias + 1) return mantissa ? double(NAN) : sign * double(INFINITY);
  const int with_one = exponent ? mantissa | 1 << mantissa_bits : mantissa;
  return sign * std::ldexp(with_one, (exponent ? exponent : 1) - bias - mantissa_bits);
}

// Rounds to nearest, ties to even.
inline uint16_t half_bits(Dtype type, double value) {
  const bool is_bf16 = type == Dtype::kBFloat16;
  const int mantissa_bits = is_bf16 ? 7 : 10, bias = is_bf16 ? 127 : 15;
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const int infinite = (2 * bias + 1) << mantissa_bits;
  if (std::isnan(value)) return uint16_t(sign | infinite | 1 << (mantissa_bits - 1));
  if (std::isinf(value)) return uint16_t(sign | infinite);
  if (value == 0) return sign;
  const int exponent = std::ilogb(value), lowest = 1 - bias;
  const int unit = (exponent < lowest ? lowest : exponent) - mantissa_bits;
  const auto steps = int(std::nearbyint(std::ldexp(std::fabs(value), -unit)));
  // A carry goes into the exponent, the next higher bits; this also holds for subnormal numbers.
  const int bits = ((unit + mantissa_bits - lowest) << mantissa_bits) + steps;
  return uint16_t(sign | (bits < infinite ? bits : infinite));
}

inline double get(Dtype type, const void* from, int64_t i) {
  const char* at = static_cast<const char*>(from) + i * size_of(type);
  if (type == Dtype::kFloat64) {
    double value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  if (type == Dtype::kFloat32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return double(value);
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return half_value(type, bits);
}
inline void put(Dtype type, void* to, int64_t i, double value) {
  char* at = static_cast<char*>(to) + i * size_of(type);
  const float as_float = float(value);
  const uint16_t as_half = size_of(type) == 2 ? half_bits(type, value) : 0;
  if (type == Dtype::kFloat64) std::memcpy(at, &value, sizeof(value));
  if (type == Dtype::kFloat32) std::memcpy(at, &as_float, sizeof(as_float));
  if (size_of(type) == 2) std::memcpy(at, &as_half, sizeof(as_half));
}

// One or more rows, at equal distances, of numbers of one type.
struct Numbers : Buffer {
  Dtype type;
  Numbers(Dtype of, int64_t count, int64_t slack = 0)
      : Buffer(count * size_of(of), slack * size_of(of)), type(of) {}
  double operator[](int64_t i) const { return get(type, data(), i); }
  void set(int64_t i, double value) { put(type, data(), i, value); }
  int64_t count() const { return bytes() / size_of(type); }
  char* at(int64_t i) const { return data() + i * size_of(type); }
  void check_not_written(const char* what, int64_t begin, int64_t end) const {
    check_untouched(what, begin * size_of(type), end * size_of(type));
  }
};

class Random {
 public:
  int64_t below(int64_t n) {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return int64_t((state_ >> 33) % uint64_t(n));
  }
  bool coin() { return below(2) == 1; }
  double whole(int64_t largest) { return double(below(2 * largest + 1) - largest); }
  double real() { return double(below(1 << 30)) / (1 << 29) - 1; }  // from -1 to 1
  // Integers whose products have exact sums in every type, or arbitrary numbers.
  void fill(Numbers& to, bool exact) {
    for (int64_t i = 0; i < to.count(); ++i) to.set(i, exact ? whole(8) : real());
  }

 private:
  uint64_t state_ = 1;
};

// ---- kernels and sums ----

// The kernels for one storage type. Calls `enter` and `leave` in constructor and destructor.
struct Kit {
  const Target& target;
  const MicroKernels& k;
  const Dtype S, A, E;
  const int lanes;
  Random random;

  Kit(const Target& of, int dtype)
      : target(of),
        k(of.kernels[dtype]),
        S(Dtype(dtype)),
        A(compute_type(S)),
        E(k.element_bytes == size_of(S) ? S : A),
        lanes(k.lanes) {
    if (k.dtype != S || k.storage_bytes != size_of(S) || k.compute_bytes != size_of(A) ||
        k.element_bytes != size_of(E))
      fail("types");
    if (target.enter) target.enter();
  }
  ~Kit() {
    if (target.leave) target.leave();
  }

  Numbers numbers(Dtype type, int64_t count, bool exact, int64_t slack = 0) {
    Numbers made(type, count, slack);
    random.fill(made, exact);
    return made;
  }
  std::vector<Numbers> rows(Dtype type, int64_t count, int64_t n, bool exact) {
    std::vector<Numbers> made;
    for (int64_t i = 0; i < count; ++i) made.push_back(numbers(type, n, exact, random.below(2)));
    return made;
  }
  std::vector<const WeightFormat*> formats() const {
    return k.split ? std::vector{k.dense, k.split} : std::vector{k.dense};
  }
};

inline std::vector<const void*> pointers(const std::vector<Numbers>& rows) {
  std::vector<const void*> all;
  for (const Numbers& row : rows) all.push_back(row.data());
  return all;
}

// A sum, and the sum of the magnitudes, which bounds its rounding errors.
struct Sum {
  long double value = 0, magnitude = 0;
  void add(long double term) {
    value += term;
    magnitude += std::fabs(term);
  }
};
// Compares with an expected sum. `tolerance` counts units of rounding of the sum of magnitudes; 0
// for exact numbers.
inline void expect(const char* what, int64_t i, int64_t j, double actual, const Sum& expected,
                   double tolerance) {
  if (!(std::fabs((long double)actual - expected.value) <= tolerance * expected.magnitude))
    fail("%s [%lld][%lld] is %.17g, not %.17g", what, (long long)i, (long long)j, actual,
         double(expected.value));
}
inline void expect_same(const char* what, int64_t i, double actual, double expected) {
  const bool both_nan = std::isnan(actual) && std::isnan(expected);
  if (!both_nan && !(actual == expected && std::signbit(actual) == std::signbit(expected)))
    fail("%s [%lld] is %.17g, not %.17g", what, (long long)i, actual, expected);
}

#define RNNFAST_CHECK(name)                                                   \
  static void name(rnnfast::cpu::checks::Kit& kit);                           \
  extern "C" __attribute__((visibility("default"))) const char* check_##name( \
      const rnnfast::cpu::Target* target, int dtype) {                        \
    return rnnfast::cpu::checks::report([&] {                                 \
      rnnfast::cpu::checks::now(#name);                                       \
      rnnfast::cpu::checks::Kit kit(*target, dtype);                          \
      name(kit);                                                              \
    });                                                                       \
  }                                                                           \
  static void name(rnnfast::cpu::checks::Kit& kit)

}  // namespace rnnfast::cpu::checks
