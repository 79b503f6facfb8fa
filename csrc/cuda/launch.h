// Launching on the current stream of the tensors' device.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../tensor/check.h"
#include "device.cuh"

#ifndef FASTKD_SIMT
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
// Weak: libtorch_cuda defines it. A CPU-only torch does not, and has no CUDA tensors that could bring us here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastkd::cuda {

inline void check(cudaError_t error, const char* function, const char* what) {
  if (error != cudaSuccess) fail("RuntimeError", function, what, " failed: ", cudaGetErrorString(error));
}

// The device of a call: guards it, and knows its stream and compute capability.
class Device {
 public:
  Device(const torch::stable::Tensor& tensor, const char* function)
      :
#ifndef FASTKD_SIMT
        guard_(tensor.get_device_index()),
#endif
        function_(function) {
    int major = 0, minor = 0, device = 0;
#ifndef FASTKD_SIMT
    device = tensor.get_device_index();
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(device, &stream) != 0) {
      fail("RuntimeError", function, "this PyTorch has no CUDA streams");
    }
    stream_ = static_cast<cudaStream_t>(stream);
#else
    (void)tensor;
#endif
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), function, "a device query");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), function, "a device query");
    check(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device), function, "a device query");
    capability_ = 10 * major + minor;
  }

  int capability() const { return capability_; }
  int processors() const { return processors_; }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, int cluster,
              const Arguments&... arguments) const {
    if (blocks == 0) return;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.dynamicSmemBytes = size_t(shared_bytes);
    config.stream = stream_;
    cudaLaunchAttribute attribute{};
    if (cluster > 1) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = unsigned(cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
    if (shared_bytes > 48 << 10) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), function_,
            "asking for shared memory");
    }
    if (cluster > 8) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), function_,
            "asking for a large cluster");
    }
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), function_, "the kernel's launch");
    check(cudaGetLastError(), function_, "the kernel's launch");
  }

 private:
#ifndef FASTKD_SIMT
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  const char* function_;
  cudaStream_t stream_ = nullptr;
  int capability_ = 0, processors_ = 1;
};

}  // namespace fastkd::cuda
