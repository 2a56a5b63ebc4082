/*
 * A recurrent effect in an audio callback, as amplifier models are: audio <model> [seconds]
 *
 * The model takes and gives one number for each sample, such as torch.nn.LSTM(1, 16, proj_size=1).
 * An audio host calls `process` from its real-time thread: it allocates nothing and takes no lock,
 * since everything is made before. Here the host is a loop over a sine wave, which tells how much
 * of the time that the samples last was used.
 */
#define _POSIX_C_SOURCE 199309L
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "c/rnnfast.h"

enum { kRate = 48000, kBlock = 64 };

struct effect {
  rnnfast_model* model;
  rnnfast_stream* stream;
};

/* The callback. */
static void process(struct effect* effect, const float* in, float* out, size_t samples) {
  rnnfast_run(effect->stream, samples, in, out);
}

static double seconds_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

int main(int argc, char** argv) {
  struct effect effect;
  char error[256];
  float in[kBlock], out[kBlock];
  double phase = 0, used = 0, longest = 0;
  const double seconds = argc > 2 ? atof(argv[2]) : 1;
  const long blocks = (long)(seconds * kRate / kBlock);
  if (argc < 2) return fprintf(stderr, "usage: %s <model> [seconds]\n", argv[0]), 2;
  effect.model = rnnfast_load(argv[1], error, sizeof(error));
  if (!effect.model) return fprintf(stderr, "%s: %s\n", argv[1], error), 1;
  if (rnnfast_input_size(effect.model) != 1 || rnnfast_output_size(effect.model) != 1)
    return fprintf(stderr, "%s: expected one input and one output\n", argv[1]), 1;
  effect.stream = rnnfast_stream_new(effect.model, 1, error, sizeof(error));
  if (!effect.stream) return fprintf(stderr, "%s\n", error), 1;
  for (long block = 0; block < blocks; ++block) {
    for (int i = 0; i < kBlock; ++i, phase += 440.0 / kRate)
      in[i] = (float)sin(2 * 3.14159265358979 * phase);
    const double begin = seconds_now();
    process(&effect, in, out, kBlock);
    const double taken = seconds_now() - begin;
    used += taken;
    if (taken > longest) longest = taken;
  }
  printf("%s: %.2f %% of real time, longest block %.1f us of %.1f us\n", rnnfast_capability(),
         100 * used / seconds, 1e6 * longest, 1e6 * kBlock / kRate);
  rnnfast_stream_free(effect.stream);
  rnnfast_free(effect.model);
  return 0;
}
