// Runs the CUDA driver on the GPU: products by cuBLAS, elementwise work by the kernels of
// cuda/steps.cu, all on torch's current stream.
#include <ATen/Context.h>
#include <ATen/cuda/CUDAContext.h>
#include <ATen/cuda/Exceptions.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGuard.h>

#include <limits>

#include "cuda/cublas_call.h"
#include "cuda/launch.h"
#include "cuda/sequence.h"
#include "torch/layer.h"

namespace rnnfast {
namespace {

template <class S>
constexpr cudaDataType_t kCudaType = CUDA_R_32F;
template <>
constexpr cudaDataType_t kCudaType<double> = CUDA_R_64F;
template <>
constexpr cudaDataType_t kCudaType<bf16> = CUDA_R_16BF;
template <>
constexpr cudaDataType_t kCudaType<f16> = CUDA_R_16F;

class Gpu {
 public:
  Gpu()
      : handle_(at::cuda::getCurrentCUDABlasHandle()),
        stream_(at::cuda::getCurrentCUDAStream()),
        // The setting that torch.nn's recurrent layers follow, not the one of matmul.
        tf32_(at::globalContext().float32Precision(at::Float32Backend::CUDA, at::Float32Op::RNN) ==
              at::Float32Precision::TF32) {
    TORCH_CUDABLAS_CHECK(cublasGetMathMode(handle_, &math_mode_));
    TORCH_CUDABLAS_CHECK(
        cublasSetMathMode(handle_, CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION));
  }
  ~Gpu() { cublasSetMathMode(handle_, math_mode_); }
  Gpu(const Gpu&) = delete;
  Gpu& operator=(const Gpu&) = delete;

  template <class In, class Out>
  void gemm(const cuda::Product& product, const In* a, const In* b, Out* c) const {
    const cuda::ColumnMajorProduct p = cuda::column_major(product);
    if (p.m == 0 || p.n == 0) return;
    if (p.k == 0) {  // an empty sum; c is contiguous (ldc = N) in all such products
      const size_t bytes = size_t(p.m) * size_t(p.n) * sizeof(Out);
      if (!product.add) AT_CUDA_CHECK(cudaMemsetAsync(c, 0, bytes, stream_));
      return;
    }
    const Compute<In> one = 1, beta = product.add ? 1 : 0;
    const cublasComputeType_t compute = std::is_same_v<In, double> ? CUBLAS_COMPUTE_64F
                                        : std::is_same_v<In, float> && tf32_ && product.allow_tf32
                                            ? CUBLAS_COMPUTE_32F_FAST_TF32
                                            : CUBLAS_COMPUTE_32F;
    TORCH_CUDABLAS_CHECK(cublasGemmEx(
        handle_, operation(p.transpose_a), operation(p.transpose_b), narrow(p.m), narrow(p.n),
        narrow(p.k), &one, b, kCudaType<In>, leading(p.lda), a, kCudaType<In>, leading(p.ldb),
        &beta, c, kCudaType<Out>, leading(p.ldc), compute, CUBLAS_GEMM_DEFAULT));
  }

  template <class F>
  void for_each(int64_t n, const F& f) const {
    cuda::launch(f, n, stream_);
  }

  void copy(void* to, const void* from, size_t bytes) const {
    if (bytes == 0) return;
    AT_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream_));
  }

 private:
  static cublasOperation_t operation(bool transpose) {
    return transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
  }
  // Products are cut into blocks of steps, so only a single size beyond 2^31 could fail here.
  static int narrow(int64_t value) {
    TORCH_CHECK(value <= std::numeric_limits<int>::max(), "rnnfast: a size of ", value,
                " is too large for cuBLAS");
    return int(value);
  }
  static int leading(int64_t value) { return narrow(std::max<int64_t>(value, 1)); }

  cublasHandle_t handle_;
  cudaStream_t stream_;
  bool tf32_;
  cublasMath_t math_mode_;
};

// Calls f with the cell and the storage type as types.
template <class F>
void with_types(CellKind kind, Dtype dtype, F&& f) {
  const auto with_cell = [&]<class S>() {
#define RNNFAST_CASE(Cell) \
  case CellKind::k##Cell:  \
    return f.template operator()<Cell, S>();
    switch (kind) {
      RNNFAST_FOR_EACH_CELL(RNNFAST_CASE)
      case CellKind::kCount:
        break;
    }
#undef RNNFAST_CASE
  };
  switch (dtype) {
    case Dtype::kFloat64:
      return with_cell.template operator()<double>();
    case Dtype::kFloat32:
      return with_cell.template operator()<float>();
    case Dtype::kBFloat16:
      return with_cell.template operator()<bf16>();
    case Dtype::kFloat16:
      return with_cell.template operator()<f16>();
  }
}

template <template <class, class> class Driver, class Args>
void run(const CellInfo& cell, const at::Tensor& x, const Args& args) {
  const c10::cuda::CUDAGuard guard(x.device());
  with_types(cell.kind, dtype_of(x), [&]<class Cell, class S>() {
    Arena measure(nullptr);
    Driver<Cell, S>(args, measure);
    const at::Tensor memory = at::empty({int64_t(measure.used())}, x.options().dtype(at::kByte));
    Arena arena(memory.data_ptr());
    Gpu gpu;
    Driver<Cell, S>(args, arena).run(gpu);
  });
}

}  // namespace

void CudaDevice::forward(const CellInfo& cell, LayerInputs in, LayerOutputs& out) {
  in.x = in.x.contiguous();
  run<cuda::Forward>(cell, in.x, forward_args(in, out));
}

void CudaDevice::backward(const CellInfo& cell, LayerGradOutputs grad_out, LayerInputs in,
                          const LayerOutputs& out, LayerGrads& grads) {
  check_gates(cell, out, complete());
  in.x = in.x.contiguous();
  if (grad_out.y.defined()) grad_out.y = grad_out.y.contiguous();
  run<cuda::Backward>(cell, in.x, backward_args(grad_out, in, out, grads));
}

}  // namespace rnnfast
