// Layer normalisation of the gates of a row, between the products and the cell (Ba, Kiros, Hinton,
// arXiv:1607.06450):
//   x_hat = (x - mean) / sqrt(variance + eps)       y = weight * x_hat + bias
// Mean and variance are over all gates of all units of a row.
#pragma once

#include "cpu/kernels/pack.h"

namespace rnnfast::cpu::RNNFAST_TARGET {

// The first n elements, and zeros.
template <class A>
RNNFAST_INLINE Vec<A> first_elements(Vec<A> v, int64_t n) {
  using Integer = typename VectorOf<A>::integer;
  if (n >= kLanes<A>) return v;
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return Integer{I...} < ElementOf<Integer>(n) ? v : Vec<A>{};
  }(std::make_integer_sequence<int, kLanes<A>>());
}

template <class A>
RNNFAST_INLINE A lane_sum(Vec<A> v) {
  A sum = 0;
  for (int i = 0; i < kLanes<A>; ++i) sum += v[i];
  return sum;
}

template <class A>
struct Moments {
  A mean, scale;  // scale = 1 / sqrt(variance + eps)
};

// for_parts(f) calls f(n, place) for each vector, of which the first n elements count; get(place)
// loads one.
template <class A, class Parts, class Get>
RNNFAST_INLINE Moments<A> moments(int64_t count, double eps, Parts&& for_parts, Get&& get) {
  using V = Vec<A>;
  V sum{}, squares{};
  for_parts([&](int64_t n, auto place)
                __attribute__((always_inline)) { sum += first_elements<A>(get(place), n); });
  const A mean = lane_sum<A>(sum) / A(count);
  for_parts([&](int64_t n, auto place) __attribute__((always_inline)) {
    const V difference = first_elements<A>(get(place) - mean, n);
    squares = fma(difference, difference, squares);
  });
  const A variance = lane_sum<A>(squares) / A(count) + A(eps);
  if constexpr (sizeof(A) == 4) return {mean, 1 / __builtin_sqrtf(variance)};
  if constexpr (sizeof(A) == 8) return {mean, 1 / __builtin_sqrt(variance)};
}

// Normalises the gates of a row in place.
//   row            A [panel][gate][unit]
//   weight, bias   A, like the row
//   saved          S [gate][H]: receives the row before, or null
template <class S>
void normalize_gates(const GateShape& shape, void* row, const void* weight, const void* bias,
                     double eps, void* saved) {
  using A = Compute<S>;
  constexpr int lanes = kLanes<A>;
  A* const values = static_cast<A*>(row);
  const int64_t panels =
      (shape.H + shape.unit_vectors * lanes - 1) / (int64_t(shape.unit_vectors) * lanes);
  struct Place {
    int64_t at, saved;
  };
  const auto for_parts = [&](auto&& f) __attribute__((always_inline)) {
    int64_t at = 0;
    for (int64_t p = 0; p < panels; ++p) {
      const GateColumns columns{shape, p, lanes};
      for (int j = 0; j < shape.gates * shape.unit_vectors; ++j, at += lanes)
        if (columns.units(j) > 0) f(columns.units(j), Place{at, columns.row(j)});
    }
  };
  const auto get = [&](Place place)
                       __attribute__((always_inline)) { return load(values + place.at); };
  if (saved)
    for_parts([&](int64_t n, Place place) __attribute__((always_inline)) {
      store(static_cast<S*>(saved) + place.saved, get(place), n);
    });
  const auto [mean, scale] = moments<A>(shape.gates * shape.H, eps, for_parts, get);
  for_parts([&](int64_t, Place place) __attribute__((always_inline)) {
    const Vec<A> normal = (get(place) - mean) * scale;
    store(values + place.at, fma(normal, load(static_cast<const A*>(weight) + place.at),
                                 load(static_cast<const A*>(bias) + place.at)));
  });
}

// The backward: turns the gradients of n normalised gates into those of the gates before.
//   d_gates           E (n), in place
//   saved             S (n): the gates before
//   weight            A (n)
//   d_weight, d_bias  E (n): receive the gradients of weight and bias of this row
template <class S, class E>
void normalize_gates_backward(int64_t n, void* d_gates, const void* saved, const void* weight,
                              double eps, void* d_weight, void* d_bias) {
  using A = Compute<S>;
  using V = Vec<A>;
  constexpr int lanes = kLanes<A>;
  const auto for_parts = [&](auto&& f) __attribute__((always_inline)) {
    for (int64_t i = 0; i < n; i += lanes) f(n - i, i);
  };
  const auto before = [&](int64_t i) __attribute__((always_inline)) {
    return load(static_cast<const S*>(saved) + i, n - i);
  };
  const auto gradient = [&](int64_t i) __attribute__((always_inline)) {
    return load(static_cast<const E*>(d_gates) + i, n - i);
  };
  const auto [mean, scale] = moments<A>(n, eps, for_parts, before);
  // the means of the gradient of x_hat, and of that times x_hat
  V sum{}, product{};
  for_parts([&](int64_t left, int64_t i) __attribute__((always_inline)) {
    const V normal = first_elements<A>((before(i) - mean) * scale, left);
    const V d_y = gradient(i), d_normal = d_y * load(static_cast<const A*>(weight) + i, left);
    sum += d_normal;
    product = fma(d_normal, normal, product);
    store(static_cast<E*>(d_weight) + i, d_y * normal, left);
    store(static_cast<E*>(d_bias) + i, d_y, left);
  });
  const A mean_sum = lane_sum<A>(sum) / A(n), mean_product = lane_sum<A>(product) / A(n);
  for_parts([&](int64_t left, int64_t i) __attribute__((always_inline)) {
    const V normal = (before(i) - mean) * scale;
    const V d_normal = gradient(i) * load(static_cast<const A*>(weight) + i, left);
    store(static_cast<E*>(d_gates) + i, (d_normal - mean_sum - normal * mean_product) * scale,
          left);
  });
}

}  // namespace rnnfast::cpu::RNNFAST_TARGET
