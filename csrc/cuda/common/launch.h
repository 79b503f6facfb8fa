// Launches kernels on the current stream of the tensors' device.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "../../arguments/check.h"
#include "device.cuh"
#include "driver_answers.h"
#include "launch_log.h"

#ifndef FASTKD_SIMT
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
// Declared weak: libtorch_cuda defines it. A CPU-only torch does not; it has no CUDA tensors, so nothing calls this.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastkd::cuda {

inline void check(cudaError_t error, const char* function, const char* what) {
  if (error != cudaSuccess) fail("RuntimeError", function, what, " failed: ", cudaGetErrorString(error));
}

// The device of a call: makes it the current one, and holds its stream and compute capability.
class Device {
 public:
  Device(const torch::stable::Tensor& tensor, const char* function)
      :
#ifndef FASTKD_SIMT
        guard_(tensor.get_device_index()),
#endif
        function_(function) {
    int major = 0, minor = 0;
#ifdef FASTKD_SIMT
    check(cudaGetDevice(&device_), function, "a device query");
#else
    device_ = tensor.get_device_index();
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream == nullptr || aoti_torch_get_current_cuda_stream(device_, &stream) != 0) {
      fail("RuntimeError", function, "this PyTorch has no CUDA streams");
    }
    stream_ = static_cast<cudaStream_t>(stream);
#endif
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_), function, "a device query");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_), function, "a device query");
    check(cudaDeviceGetAttribute(&shared_, cudaDevAttrMaxSharedMemoryPerBlockOptin, device_), function,
          "a device query");
    capability_ = 10 * major + minor;
    if (logs_launches()) shape_ = launch_shape(tensor);
  }

  int capability() const { return capability_; }

  // How many blocks this device, in its present configuration (partitioned, shared), runs at the same time; 0 if it
  // cannot run such a cluster. The emulator runs two clusters or blocks, so that each has several rows.
  template <class... Parameters>
  int64_t blocks_at_a_time(void (*kernel)(Parameters...), int threads, int64_t shared_bytes, int cluster) const {
    const DriverQuestion question{address(kernel), device_, stream_, 0, threads, shared_bytes, cluster};
    const int64_t blocks = driver_answer(question, [&]() -> int64_t {
      Launch launch(*this, kernel, cluster, threads, shared_bytes, cluster);
      int count = 0;
      if (cluster > 1) {
        const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
        if (error == cudaSuccess) return int64_t(cluster) * count;
        (void)cudaGetLastError();  // otherwise the next launch would report it
        return -1;
      }
#ifdef FASTKD_SIMT
      return 2;
#else
      int processors = 0;
      check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device_), function_, "a device query");
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, size_t(shared_bytes)), function_,
            "a device query");
      return int64_t(count > 0 ? count : 1) * processors;
#endif
    });
    return blocks > 0 ? blocks : 0;
  }

  // Whether it can run such a cluster.
  template <class... Parameters>
  bool fits(void (*kernel)(Parameters...), int threads, int64_t shared_bytes, int cluster) const {
    return cluster == 1 || blocks_at_a_time(kernel, threads, shared_bytes, cluster) > 0;
  }

  // Logs that the device cannot run such a cluster, and what runs instead.
  void log_refused(const char* role, int threads, int64_t shared_bytes, int cluster, const char* instead) const {
    if (!logs_launches()) return;
    LoggedLaunch{function_, shape_, capability_, 0, threads, shared_bytes, cluster}.print_refused(role, instead);
  }

  template <class... Parameters, class... Arguments>
  void launch(const LaunchNote& note, void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
              int cluster, const Arguments&... arguments) const {
    if (blocks == 0) return;
    if (logs_launches()) {
      LoggedLaunch{function_, shape_, capability_, blocks, threads, shared_bytes, cluster}.print(note);
    }
    Launch launch(*this, kernel, blocks, threads, shared_bytes, cluster);
    check(cudaLaunchKernelEx(&launch.config, kernel, static_cast<Parameters>(arguments)...), function_,
          "the kernel's launch");
    check(cudaGetLastError(), function_, "the kernel's launch");
  }

 private:
  template <class Kernel>
  static const void* address(Kernel kernel) {
    return reinterpret_cast<const void*>(kernel);
  }

  // An attribute has the same value in all launches of a kernel that need it.
  template <class Kernel>
  void set(Kernel kernel, cudaFuncAttribute attribute, int value, const char* what) const {
    driver_answer({address(kernel), device_, stream_, int(attribute)}, [&] {
      check(cudaFuncSetAttribute(kernel, attribute, value), function_, what);
      return 0;
    });
  }

  struct Launch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};

    template <class Kernel>
    Launch(const Device& device, Kernel kernel, int64_t blocks, int threads, int64_t shared_bytes, int cluster) {
      config.gridDim = dim3(unsigned(blocks));
      config.blockDim = dim3(unsigned(threads));
      config.dynamicSmemBytes = size_t(shared_bytes);
      config.stream = device.stream_;
      if (cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = unsigned(cluster);
        attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.attrs = &attribute;
        config.numAttrs = 1;
      }
      // Always the largest possible value: another thread may be about to launch this kernel with more shared memory.
      if (shared_bytes > 48 << 10) {
        device.set(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_, "asking for shared memory");
      }
      if (cluster > 8) {
        device.set(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1, "asking for a large cluster");
      }
    }
    Launch(const Launch&) = delete;
  };

#ifndef FASTKD_SIMT
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  const char* function_;
  cudaStream_t stream_ = nullptr;
  int device_ = 0, capability_ = 0, shared_ = 0;
  std::string shape_;  // for the log; empty if nothing is logged
};

}  // namespace fastkd::cuda
