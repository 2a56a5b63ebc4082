/*
 * Runs frozen recurrent layers from C and C++, without Python and torch.
 *
 * A model is a file that `rnnfast.freeze(module).save(path)` wrote: RNN, LSTM or GRU, of one or
 * more layers and one direction. A stream runs it on data that arrive step by step, and keeps the
 * states in between. Models do not change, so any number of streams and threads can share one. A
 * stream can run in one thread at a time.
 *
 * rnnfast_step, rnnfast_run and rnnfast_reset allocate no memory, take no lock and call no function
 * of the system. So an audio callback may call them. They treat denormal numbers as zeros, round
 * to nearest, and put the processor's settings back when they return.
 */
#ifndef RNNFAST_H
#define RNNFAST_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this interface. It changes when calls of the version before would break. */
#define RNNFAST_C_VERSION 1

typedef struct rnnfast_model rnnfast_model;
typedef struct rnnfast_stream rnnfast_stream;

/*
 * Loads a model from a file, or from `size` bytes in memory, which may be freed afterwards. Returns
 * null if that is impossible, and writes why to `error`, cut to error_size bytes with the zero at
 * the end; `error` may be null if error_size is 0. A file that is damaged or not of this format is
 * refused.
 */
rnnfast_model* rnnfast_load(const char* path, char* error, size_t error_size);
rnnfast_model* rnnfast_load_memory(const void* data, size_t size, char* error, size_t error_size);
/* Frees a model, after all its streams. Null is allowed. */
void rnnfast_free(rnnfast_model* model);

/* Numbers in one input, and in one output, of a sequence. */
size_t rnnfast_input_size(const rnnfast_model* model);
size_t rnnfast_output_size(const rnnfast_model* model);

/*
 * Makes a stream of `batch` sequences that run together, with states of zero. Returns null, and
 * writes why to `error`, if batch is 0 or memory is short.
 */
rnnfast_stream* rnnfast_stream_new(const rnnfast_model* model, size_t batch, char* error,
                                   size_t error_size);
/* Null is allowed. */
void rnnfast_stream_free(rnnfast_stream* stream);

/*
 * One step: input (batch, input_size) -> output (batch, output_size). The output may be at the
 * input's address, if both have the same size, but may not overlap it in part.
 */
void rnnfast_step(rnnfast_stream* stream, const float* input, float* output);
/* Many steps: input (steps, batch, input_size) -> output (steps, batch, output_size), likewise. */
void rnnfast_run(rnnfast_stream* stream, size_t steps, const float* input, float* output);
/* Sets all states to zero. */
void rnnfast_reset(rnnfast_stream* stream);

/*
 * The instruction set in use, such as "avx2". The environment variable RNNFAST_CPU_CAPABILITY
 * chooses a lesser one. If it names one that is not there, this is "" and loading fails.
 */
const char* rnnfast_capability(void);

#ifdef __cplusplus
}
#endif

#endif
