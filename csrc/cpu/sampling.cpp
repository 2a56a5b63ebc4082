#include "cpu/sampling.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

namespace rnnfast::cpu {

template <class A>
int64_t Sampler::operator()(const Sampling& sampling, const A* scores, int64_t count,
                            double uniform) {
  const int64_t best = std::max_element(scores, scores + count) - scores;
  if (!std::isfinite(scores[best]) ||
      std::any_of(scores, scores + count, [](A score) { return std::isnan(score); }))
    return -1;
  if (sampling.temperature == 0) return best;
  double least = -INFINITY;
  if (sampling.top_k > 0 && sampling.top_k < count) {
    sorted_.assign(scores, scores + count);
    const auto last = sorted_.begin() + (sampling.top_k - 1);
    std::nth_element(sorted_.begin(), last, sorted_.end(), std::greater<>());
    least = *last;
  }
  weights_.resize(count);
  for (int64_t i = 0; i < count; ++i)
    weights_[i] = scores[i] < least
                      ? 0
                      : std::exp((double(scores[i]) - double(scores[best])) / sampling.temperature);
  if (sampling.top_p < 1) keep_top_p(sampling.top_p);
  const double aim = uniform * std::accumulate(weights_.begin(), weights_.end(), 0.0);
  double sum = 0;
  int64_t chosen = best;  // replaced by the last kept token if rounding leaves the sum below `aim`
  for (int64_t i = 0; i < count; ++i) {
    if (weights_[i] == 0) continue;
    sum += weights_[i];
    chosen = i;
    if (sum > aim) break;
  }
  return chosen;
}

void Sampler::keep_top_p(double top_p) {
  order_.clear();
  for (int64_t i = 0; i < int64_t(weights_.size()); ++i)
    if (weights_[i] > 0) order_.push_back(i);
  std::stable_sort(order_.begin(), order_.end(),
                   [&](int64_t a, int64_t b) { return weights_[a] > weights_[b]; });
  const double enough = top_p * std::accumulate(weights_.begin(), weights_.end(), 0.0);
  double sum = 0;
  for (const int64_t i : order_) {
    const double weight = weights_[i];
    if (sum >= enough && sum > 0) weights_[i] = 0;
    sum += weight;
  }
}

template int64_t Sampler::operator()(const Sampling&, const float*, int64_t, double);
template int64_t Sampler::operator()(const Sampling&, const double*, int64_t, double);

}  // namespace rnnfast::cpu
