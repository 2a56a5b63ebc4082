/*
 * A program in C that runs a model: c_program <model> <steps> <batch> < floats > floats
 *
 * It runs the numbers of standard input through rnnfast_step, then again through rnnfast_run after
 * a reset, and writes both outputs. It ends with status 3 if a call
 * allocated memory, took a lock or changed the processor's floating-point mode, and with 4 if
 * denormal states did not become zeros.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fenv.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "c/rnnfast.h"

static long allocations, locks;

/* These replace the C library's in the whole process. */
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
void* malloc(size_t size) { return ++allocations, __libc_malloc(size); }
void* calloc(size_t n, size_t size) { return ++allocations, __libc_calloc(n, size); }
void* realloc(void* old, size_t size) { return ++allocations, __libc_realloc(old, size); }
void* aligned_alloc(size_t to, size_t size) { return ++allocations, __libc_memalign(to, size); }
int pthread_mutex_lock(pthread_mutex_t* mutex) {
  static int (*original)(pthread_mutex_t*);
  ++locks;
  if (!original) *(void**)&original = dlsym(RTLD_NEXT, "pthread_mutex_lock");
  return original(mutex);
}

static float* floats(size_t count) {
  float* memory = malloc((count ? count : 1) * sizeof(float));
  if (!memory) exit(2);
  return memory;
}

int main(int argc, char** argv) {
  char error[200];
  if (argc != 4) return 2;
  rnnfast_model* model = rnnfast_load(argv[1], error, sizeof error);
  if (!model) return fprintf(stderr, "%s, capability [%s]\n", error, rnnfast_capability()), 1;
  const size_t steps = (size_t)atol(argv[2]), batch = (size_t)atol(argv[3]);
  rnnfast_stream* stream = rnnfast_stream_new(model, batch, error, sizeof error);
  if (!stream) return fprintf(stderr, "%s\n", error), 1;
  const size_t in = batch * rnnfast_input_size(model), out = batch * rnnfast_output_size(model);
  float *x = floats(steps * in), *y = floats(steps * out);
  if (fread(x, sizeof(float), steps * in, stdin) != steps * in) return 2;

  fenv_t before, after;
  memset(&before, 0, sizeof before), memset(&after, 0, sizeof after);
  const long allocated = allocations, locked = locks;
  fegetenv(&before);
  for (size_t t = 0; t < steps; ++t) rnnfast_step(stream, x + t * in, y + t * out);
  fegetenv(&after);
  const long more = allocations - allocated + locks - locked;
  fwrite(y, sizeof(float), steps * out, stdout);
  rnnfast_reset(stream);
  const long allocated_again = allocations, locked_again = locks;
  rnnfast_run(stream, steps, x, y);
  const long still_more = allocations - allocated_again + locks - locked_again;
  fwrite(y, sizeof(float), steps * out, stdout);
  if (more || still_more || memcmp(&before, &after, sizeof before)) return 3;

  for (size_t i = 0; i < in; ++i) x[i] = 1e-40f; /* denormal */
  rnnfast_reset(stream);
  rnnfast_step(stream, x, y);
  memset(x, 0, in * sizeof(float));
  float* zeros = floats(out);
  rnnfast_reset(stream);
  rnnfast_step(stream, x, zeros);
  if (memcmp(y, zeros, out * sizeof(float))) return 4;
  rnnfast_stream_free(stream);
  rnnfast_free(model);
  return 0;
}
