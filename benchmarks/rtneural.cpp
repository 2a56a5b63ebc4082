// Times an LSTM of RTNeural beside the C library of rnnfast: rtneural <model> <weights> <I> <H>
//
// <model> is what freeze(...).save wrote, and <weights> has the same weights as floats: W_ih, W_hh,
// b_ih + b_hh, in the order of torch. Compiled once for each of RTNeural's back ends, see
// rtneural.py. Prints the largest difference of the outputs, and for both the least and the median
// time of a step in a run of 64, in microseconds.
#include <RTNeural/RTNeural.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "c/rnnfast.h"

namespace {

constexpr int kSteps = 64, kRuns = 100, kRounds = 40;

template <class F>
void time(F&& run, std::vector<double>& times) {
  run();
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < kRuns; ++i) run();
  const std::chrono::duration<double, std::micro> taken = std::chrono::steady_clock::now() - begin;
  times.push_back(taken.count() / kRuns / kSteps);
}

void print(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  std::printf(" %.5f %.5f", times[0], times[times.size() / 2]);
}

template <int I, int H>
class Theirs {
 public:
  explicit Theirs(const std::vector<float>& weights) {
    const float* from = weights.data();
    const auto transposed = [&from](int columns) {
      std::vector<std::vector<float>> result(size_t(columns), std::vector<float>(4 * H));
      for (size_t row = 0; row < 4 * H; ++row)
        for (auto& column : result) column[row] = *from++;
      return result;
    };
    layer_.setWVals(transposed(I));
    layer_.setUVals(transposed(H));
    layer_.setBVals({from, from + 4 * H});
    layer_.reset();
  }
  void run(const float* x, float* y) {
    for (int t = 0; t < kSteps; ++t, x += I, y += H) {
#if RTNEURAL_USE_XSIMD
      constexpr size_t lanes = xsimd::batch<float>::size, count = (I + lanes - 1) / lanes;
      alignas(RTNEURAL_DEFAULT_ALIGNMENT) float padded[count * lanes] = {};
      if (I == 1)
        std::fill_n(padded, lanes, *x);  // it wants a single input in every lane
      else
        std::copy_n(x, I, padded);
      xsimd::batch<float> in[count];
      for (size_t i = 0; i < count; ++i) in[i] = xsimd::load_aligned(padded + i * lanes);
      layer_.forward(in);
      alignas(RTNEURAL_DEFAULT_ALIGNMENT) float out[(H + lanes - 1) / lanes * lanes];
      for (size_t i = 0; i * lanes < H; ++i) layer_.outs[i].store_aligned(out + i * lanes);
      std::copy_n(out, H, y);
#else
      layer_.forward(Eigen::Map<const Eigen::Matrix<float, I, 1>>(x));
      Eigen::Map<Eigen::Matrix<float, H, 1>>{y} = layer_.outs;
#endif
    }
  }

 private:
  alignas(64) RTNeural::LSTMLayerT<float, I, H> layer_;
};

template <int I, int H>
int compare(rnnfast_stream* ours, const std::vector<float>& weights) {
  std::mt19937 random(0);
  std::normal_distribution<float> normal;
  std::vector<float> x(kSteps * I), y(kSteps * H), theirs_y(kSteps * H);
  for (float& value : x) value = normal(random);
  static Theirs<I, H> theirs(weights);
  rnnfast_run(ours, kSteps, x.data(), y.data());
  theirs.run(x.data(), theirs_y.data());
  float difference = 0;
  for (size_t i = 0; i < y.size(); ++i)
    difference = std::max(difference, std::abs(y[i] - theirs_y[i]));
  std::vector<double> our_times, their_times;
  for (int round = 0; round < kRounds; ++round) {
    time([&] { rnnfast_run(ours, kSteps, x.data(), y.data()); }, our_times);
    time([&] { theirs.run(x.data(), theirs_y.data()); }, their_times);
  }
  std::printf("%.3g", double(difference));
  print(our_times), print(their_times);
  std::printf("\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  char error[200];
  if (argc != 5) return std::fprintf(stderr, "usage: %s <model> <weights> <I> <H>\n", argv[0]), 2;
  rnnfast_model* model = rnnfast_load(argv[1], error, sizeof(error));
  if (!model) return std::fprintf(stderr, "%s\n", error), 1;
  const int I = std::atoi(argv[3]), H = std::atoi(argv[4]);
  std::vector<float> weights(size_t(4 * H) * size_t(I + H + 1));
  std::FILE* file = std::fopen(argv[2], "rb");
  if (!file || std::fread(weights.data(), sizeof(float), weights.size(), file) != weights.size())
    return std::fprintf(stderr, "cannot read %s\n", argv[2]), 1;
  rnnfast_stream* stream = rnnfast_stream_new(model, 1, error, sizeof(error));
  if (I == 1 && H == 8) return compare<1, 8>(stream, weights);
  if (I == 1 && H == 16) return compare<1, 16>(stream, weights);
  if (I == 1 && H == 24) return compare<1, 24>(stream, weights);
  if (I == 1 && H == 40) return compare<1, 40>(stream, weights);
  if (I == 64 && H == 64) return compare<64, 64>(stream, weights);
  return std::fprintf(stderr, "this program was not compiled for these sizes\n"), 2;
}
