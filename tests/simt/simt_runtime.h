// The CUDA runtime calls of simt.h: errors, device attributes, launches and their limits.
#pragma once

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 13
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };

union cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace simt {

inline thread_local cudaError_t last_error = cudaSuccess;

inline cudaError_t note_error(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

inline size_t optin_shared_memory(int capability) {
  switch (capability) {
    case 75:
      return 64 * 1024;
    case 86:
    case 89:
    case 120:
      return 99 * 1024;
    case 80:
    case 87:
      return 163 * 1024;
    default:
      return (capability < 75 ? 96 : 227) * 1024;
  }
}

// Each configuration of the emulator has a number of its own: what is known of one device is not true of another.
inline int device() { return 32 * settings().capability + int(settings().most_blocks); }

inline FunctionLimits function_limits(const void* kernel) {
  std::lock_guard<std::mutex> lock(settings().mutex);
  const auto found = settings().functions.find({device(), kernel});
  return found == settings().functions.end() ? FunctionLimits() : found->second;
}

// Checks a launch and fills in its shape. Clusters extend along x only.
inline cudaError_t check_launch(const cudaLaunchConfig_t& config, const FunctionLimits& limits, Shape* shape) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  uint64_t cluster = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) return cudaErrorInvalidValue;
    const auto& size = config.attrs[i].val.clusterDim;
    cluster = uint64_t(size.x) * size.y * size.z;
    if (!cluster || size.y != 1 || size.z != 1) return cudaErrorInvalidConfiguration;
    if (settings().capability < 90) return cudaErrorInvalidConfiguration;
  }
  if (!threads || threads > 1024 || block.x > 1024 || block.y > 1024 || block.z > 64) {
    return cudaErrorInvalidConfiguration;
  }
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  if (cluster > (limits.nonportable_cluster ? 16 : 8) || grid.x % cluster) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes > std::min(limits.dynamic_shared, optin_shared_memory(settings().capability))) {
    return cudaErrorInvalidValue;
  }
  *shape = {grid, block, unsigned(cluster), config.dynamicSmemBytes};
  return cudaSuccess;
}

// Adds the launch's counts to the totals, whether the launch returns or throws.
struct Accounting {
  Machine& m;
  ~Accounting() {
    std::lock_guard<std::mutex> lock(settings().mutex);
    Totals& t = settings().totals;
    for (int i = 0; i < 5; ++i) {
      t.traffic.read[i] += m.traffic.read[i];
      t.traffic.written[i] += m.traffic.written[i];
    }
    ++t.launches;
    t.largest_cluster = std::max<unsigned long long>(t.largest_cluster, m.shape.cluster);
    t.largest_shared_memory = std::max<unsigned long long>(t.largest_shared_memory, m.shape.shared);
  }
};

}  // namespace simt

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = simt::device();
  return cudaSuccess;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != simt::device()) return simt::note_error(cudaErrorInvalidValue);
  const int capability = simt::settings().capability;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 132;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = int(simt::optin_shared_memory(capability));
      return cudaSuccess;
  }
  return simt::note_error(cudaErrorInvalidValue);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  const bool is_size = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (value < 0 || (is_size && size_t(value) > simt::optin_shared_memory(simt::settings().capability))) {
    return simt::note_error(cudaErrorInvalidValue);
  }
  std::lock_guard<std::mutex> lock(simt::settings().mutex);
  ++simt::settings().totals.attributes_set;
  simt::FunctionLimits& limits = simt::settings().functions[{simt::device(), reinterpret_cast<const void*>(kernel)}];
  if (is_size) {
    limits.dynamic_shared = size_t(value);
  } else {
    limits.nonportable_cluster = value != 0;
  }
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  simt::Shape shape;
  const auto limits = simt::function_limits(reinterpret_cast<const void*>(kernel));
  const cudaError_t error = simt::check_launch(*config, limits, &shape);
  if (error != cudaSuccess) return simt::note_error(error);
  std::lock_guard<std::mutex> lock(simt::settings().mutex);
  ++simt::settings().totals.occupancy_queries;
  *clusters = shape.cluster > simt::settings().most_blocks ? 0 : 2;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  simt::Shape shape;
  const auto limits = simt::function_limits(reinterpret_cast<const void*>(kernel));
  const cudaError_t error = simt::check_launch(*config, limits, &shape);
  if (error != cudaSuccess) return simt::note_error(error);
  if (shape.cluster > simt::settings().most_blocks) return simt::note_error(cudaErrorInvalidConfiguration);
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call(kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...));
  const auto run = [](const void* closure) {
    const Call& c = *static_cast<const Call*>(closure);
    std::apply(c.first, c.second);
  };
  simt::Accounting accounting{simt::machine()};
  simt::machine().run(shape, run, &call, simt::settings().seed);
  return cudaSuccess;
}
