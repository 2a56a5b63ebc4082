// Runs a frozen model over a text of numbers: step <model> < numbers
//
// Reads input_size numbers for each step from standard input, and writes output_size numbers for
// each step to standard output, one line a step.
#include <cstdio>
#include <memory>
#include <vector>

#include "c/rnnfast.h"

int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: %s <model> < numbers\n", argv[0]), 2;
  char error[256];
  const std::unique_ptr<rnnfast_model, void (*)(rnnfast_model*)> model(
      rnnfast_load(argv[1], error, sizeof(error)), rnnfast_free);
  if (!model) return std::fprintf(stderr, "%s: %s\n", argv[1], error), 1;
  const std::unique_ptr<rnnfast_stream, void (*)(rnnfast_stream*)> stream(
      rnnfast_stream_new(model.get(), 1, error, sizeof(error)), rnnfast_stream_free);
  if (!stream) return std::fprintf(stderr, "%s\n", error), 1;
  std::vector<float> input(rnnfast_input_size(model.get()));
  std::vector<float> output(rnnfast_output_size(model.get()));
  for (;;) {
    for (float& number : input)
      if (std::scanf("%f", &number) != 1) return 0;
    rnnfast_step(stream.get(), input.data(), output.data());
    for (const float number : output) std::printf("%.9g ", number);
    std::printf("\n");
  }
}
