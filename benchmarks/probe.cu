// Measures the costs of the parts of a recurrent step on this GPU. `probe NAME` makes one
// measurement and prints each result as a line of JSON. Times are medians of several runs, in
// microseconds. The time of what a kernel repeats is the difference between runs of two numbers of
// steps, so it does not include a launch.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 256;
constexpr int kSteps = 2000;
constexpr int kRepeats = 9;
constexpr int kLineWords = 32;              // words in a line of 128 bytes
constexpr long long kClockLimit = 1 << 30;  // half a second: a longer wait would never end
[[maybe_unused]] constexpr int kMostRanks = 16;
[[maybe_unused]] constexpr int kWords = 16;  // words from each block to each other, per step

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) check((call), #call)

// --- kernels

__global__ void nothing() {}

__global__ void __launch_bounds__(kThreads) grid_syncs(int steps) {
  for (int step = 0; step < steps; ++step) cg::this_grid().sync();
}

template <class Ready>
__device__ void wait_until(const Ready& ready) {
  const long long start = clock64();
  while (!ready())
    if (clock64() - start > kClockLimit) __trap();
}

__device__ void publish(unsigned* flag, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ unsigned observe(const unsigned* flag) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// In each step every block of a group publishes the number of the step in its line of `flags`
// (gridDim.x, kLineWords; zeros on entry), and waits for that of the others. All blocks must be
// resident.
__global__ void __launch_bounds__(kThreads) exchange_flags(unsigned* flags, int group, int steps) {
  const int first = int(blockIdx.x) / group * group;
  for (unsigned step = 1; step <= unsigned(steps); ++step) {
    if (threadIdx.x == 0) publish(flags + blockIdx.x * kLineWords, step);
    if (int(threadIdx.x) < group) {
      const unsigned* other = flags + (first + int(threadIdx.x)) * kLineWords;
      wait_until([&] { return observe(other) >= step; });
    }
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads) cluster_barriers(int steps) {
#if __CUDA_ARCH__ >= 900
  for (int step = 0; step < steps; ++step) cg::this_cluster().sync();
#endif
}

#if __CUDA_ARCH__ >= 900
__device__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

__device__ unsigned in_block(unsigned address, unsigned rank) {
  unsigned mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

__device__ bool has_passed(unsigned barrier, unsigned parity) {
  unsigned passed;
  asm volatile(
      "{\n .reg .pred p;\n"
      " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      " selp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed)
      : "r"(barrier), "r"(parity)
      : "memory");
  return passed != 0;
}
#endif

// In each step every block sends kWords words to every block of its cluster, itself included, and
// waits for all words that are sent to it. Two buffers suffice: a block that sends step t + 2 has
// received all of step t + 1, which the others send after they have read step t. *wrong counts the
// words that were not as expected.
__global__ void __launch_bounds__(kThreads) exchange_words(int steps, unsigned* wrong) {
#if __CUDA_ARCH__ >= 900
  __shared__ alignas(8) unsigned long long full[2];
  __shared__ unsigned received[2][kMostRanks * kWords];
  const cg::cluster_group cluster = cg::this_cluster();
  const unsigned rank = cluster.block_rank(), words = cluster.num_blocks() * kWords;
  const unsigned peer = threadIdx.x / kWords, word = threadIdx.x % kWords;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i)
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(full + i)));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster.sync();
  unsigned misses = 0;
  for (int step = 0; step < steps; ++step) {
    const int buffer = step & 1;
    const unsigned barrier = shared_address(full + buffer);
    if (threadIdx.x == 0)
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                   "r"(words * unsigned(sizeof(unsigned)))
                   : "memory");
    if (threadIdx.x < words) {
      const unsigned slot = shared_address(&received[buffer][rank * kWords + word]);
      asm volatile(
          "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
              in_block(slot, peer)),
          "r"(unsigned(step) * kMostRanks + rank), "r"(in_block(barrier, peer))
          : "memory");
    }
    wait_until([&] { return has_passed(barrier, unsigned(step >> 1) & 1); });
    if (threadIdx.x < words)
      misses += received[buffer][threadIdx.x] != unsigned(step) * kMostRanks + peer;
    __syncthreads();  // all threads have read the buffer before it is written again
  }
  if (misses) atomicAdd(wrong, misses);
  cluster.sync();  // no block ends while words are on their way to it
#endif
}

// --- timing

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

template <class Enqueue>
double device_us(const Enqueue& enqueue) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int run = -2; run < kRepeats; ++run) {  // two to warm up
    float milliseconds = 0;
    CHECK(cudaEventRecord(begin));
    enqueue();
    CHECK(cudaGetLastError());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (run >= 0) times.push_back(milliseconds * 1e3);
  }
  CHECK(cudaEventDestroy(begin));
  CHECK(cudaEventDestroy(end));
  return median(times);
}

template <class Launch>
double us_per_step(const Launch& launch) {
  const double few = device_us([&] { launch(kSteps); });
  const double many = device_us([&] { launch(2 * kSteps); });
  return (many - few) / kSteps;
}

template <class Call>
double host_us(const Call& call) {
  std::vector<double> times;
  for (int run = -2; run < kRepeats * 10; ++run) {
    const auto start = std::chrono::steady_clock::now();
    call();
    const std::chrono::duration<double, std::micro> taken =
        std::chrono::steady_clock::now() - start;
    if (run >= 0) times.push_back(taken.count());
  }
  return median(times);
}

int attribute(cudaDeviceAttr which) {
  int value = 0;
  CHECK(cudaDeviceGetAttribute(&value, which, 0));
  return value;
}

// --- measurements

void launch() {
  const double queued = device_us([] {
    for (int i = 0; i < kSteps; ++i) nothing<<<1, 32>>>();
  });
  std::printf("{\"probe\": \"launch\", \"us\": %.3f}\n", queued / kSteps);
  const double waited = host_us([] {
    nothing<<<1, 32>>>();
    CHECK(cudaDeviceSynchronize());
  });
  std::printf("{\"probe\": \"launch and wait\", \"us\": %.3f}\n", waited);

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CHECK(cudaStreamCreate(&stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < kSteps; ++i) nothing<<<1, 32, 0, stream>>>();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&executable, graph, 0));
  const double replayed = device_us([&] { CHECK(cudaGraphLaunch(executable, nullptr)); });
  std::printf("{\"probe\": \"launch in a graph\", \"us\": %.3f}\n", replayed / kSteps);
}

void launch_together(const void* kernel, int blocks, void** arguments) {
  CHECK(cudaLaunchCooperativeKernel(kernel, dim3(unsigned(blocks)), dim3(kThreads), arguments, 0,
                                    nullptr));
}

void grid_sync() {
  const int all = attribute(cudaDevAttrMultiProcessorCount);
  for (const int blocks : {8, 32, all}) {
    const double us = us_per_step([&](int steps) {
      void* arguments[] = {&steps};
      launch_together(reinterpret_cast<const void*>(&grid_syncs), blocks, arguments);
    });
    std::printf("{\"probe\": \"grid.sync\", \"blocks\": %d, \"us\": %.3f}\n", blocks, us);
  }
}

void flags() {
  const int all = attribute(cudaDevAttrMultiProcessorCount);
  unsigned* memory = nullptr;
  const size_t bytes = size_t(all) * kLineWords * sizeof(unsigned);
  CHECK(cudaMalloc(&memory, bytes));
  for (int group : {2, 8, 16, 64}) {
    const int blocks = all / group * group;
    if (blocks == 0) continue;
    const double us = us_per_step([&](int steps) {
      CHECK(cudaMemsetAsync(memory, 0, bytes));
      void* arguments[] = {&memory, &group, &steps};
      launch_together(reinterpret_cast<const void*>(&exchange_flags), blocks, arguments);
    });
    std::printf("{\"probe\": \"flag exchange\", \"group\": %d, \"blocks\": %d, \"us\": %.3f}\n",
                group, blocks, us);
  }
}

bool has_clusters(const char* probe) {
  if (attribute(cudaDevAttrComputeCapabilityMajor) >= 9) return true;
  std::printf("{\"probe\": \"%s\", \"not_measured\": \"no clusters before sm_90\"}\n", probe);
  return false;
}

struct ClusterLaunch {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterLaunch(int size, int blocks, int shared_bytes = 0) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = unsigned(size);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  ClusterLaunch(const ClusterLaunch&) = delete;
};

template <class Kernel>
void allow_sixteen(Kernel* kernel) {
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

void cluster_barrier() {
  if (!has_clusters("cluster barrier")) return;
  allow_sixteen(cluster_barriers);
  for (const int size : {2, 8, 16}) {
    ClusterLaunch one(size, size);
    const double us = us_per_step(
        [&](int steps) { CHECK(cudaLaunchKernelEx(&one.config, cluster_barriers, steps)); });
    std::printf("{\"probe\": \"cluster barrier\", \"cluster\": %d, \"us\": %.3f}\n", size, us);
  }
}

void st_async() {
  if (!has_clusters("st.async")) return;
  allow_sixteen(exchange_words);
  unsigned* wrong = nullptr;
  CHECK(cudaMalloc(&wrong, sizeof(unsigned)));
  CHECK(cudaMemset(wrong, 0, sizeof(unsigned)));
  for (const int size : {2, 8, 16}) {
    ClusterLaunch one(size, size);
    const double us = us_per_step(
        [&](int steps) { CHECK(cudaLaunchKernelEx(&one.config, exchange_words, steps, wrong)); });
    unsigned misses = 0;
    CHECK(cudaMemcpy(&misses, wrong, sizeof(unsigned), cudaMemcpyDeviceToHost));
    std::printf("{\"probe\": \"st.async\", \"cluster\": %d, \"us\": %.3f, \"wrong\": %u}\n", size,
                us, misses);
    if (misses) std::exit(1);
  }
}

void clusters() {
  if (!has_clusters("active clusters")) return;
  allow_sixteen(cluster_barriers);
  const int most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  CHECK(cudaFuncSetAttribute(cluster_barriers, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
  for (const int size : {2, 4, 8, 16})
    for (const int bytes : {0, 100 << 10, 150 << 10, most}) {
      ClusterLaunch launch(size, size, bytes);
      int active = 0;
      CHECK(cudaOccupancyMaxActiveClusters(&active, cluster_barriers, &launch.config));
      std::printf(
          "{\"probe\": \"active clusters\", \"cluster\": %d, \"shared_bytes\": %d, "
          "\"clusters\": %d}\n",
          size, bytes, active);
    }
}

struct Measurement {
  const char* name;
  void (*run)();
};
constexpr Measurement kMeasurements[] = {
    {"launch", launch},     {"grid_sync", grid_sync},
    {"flags", flags},       {"cluster_barrier", cluster_barrier},
    {"st_async", st_async}, {"clusters", clusters},
};

}  // namespace

int main(int count, char** arguments) {
  for (const Measurement& one : kMeasurements)
    if (count == 2 && one.name == std::string(arguments[1])) {
      one.run();
      CHECK(cudaDeviceSynchronize());
      return 0;
    }
  std::fprintf(stderr, "usage: probe NAME, one of");
  for (const Measurement& one : kMeasurements) std::fprintf(stderr, " %s", one.name);
  std::fprintf(stderr, "\n");
  return 2;
}
