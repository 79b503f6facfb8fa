// Kernels without faults, which the emulator must accept, and tests of its traffic counts and its launch limits.
#pragma once

#include <thread>

#include "../../csrc/cuda/common/mma.cuh"

struct SimtTraffic {
  unsigned long long read, written, read_16, written_16, launches, largest_cluster, largest_shared_memory,
      attributes_set, occupancy_queries;
};
extern "C" void simt_configure(int capability, unsigned seed);
extern "C" void simt_reset();
extern "C" void simt_traffic(SimtTraffic* out);

namespace {

constexpr int kThreads = 256;

template <class T>
__device__ T load(const T* p) {
  simt::shared_read(p, sizeof(T));
  return *p;
}

template <class T>
__device__ void store(T* p, T value) {
  simt::shared_write(p, sizeof(T));
  *p = value;
}

__device__ float* floats() { return reinterpret_cast<float*>(simt::shared_memory()); }

struct Launch {
  dim3 grid = 1, block = kThreads;
  size_t shared = kThreads * sizeof(float);
  unsigned cluster = 0;
};

template <class... P, class... A>
cudaError_t launch(const Launch& l, void (*kernel)(P...), A... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = l.grid;
  config.blockDim = l.block;
  config.dynamicSmemBytes = l.shared;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {l.cluster, 1, 1};
  config.attrs = &attribute;
  config.numAttrs = l.cluster ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <class... P, class... A>
void run(const Launch& l, void (*kernel)(P...), A... arguments) {
  const cudaError_t error = launch(l, kernel, arguments...);
  if (error != cudaSuccess) throw std::logic_error(cudaGetErrorString(error));
}

void expect(bool right, const char* what) {
  if (!right) throw std::logic_error(what);
}

// Kernels without faults.

struct Moments {
  double sum, square;
  int count;
};

__global__ void __launch_bounds__(kThreads) reduce(const float* x, int n, double* sum, int* count) {
  Moments m{0, 0, 0};
  for (int i = int(threadIdx.x); i < n; i += int(blockDim.x)) {
    simt::count_read(sizeof(float), sizeof(float));
    m = {m.sum + x[i], m.square + x[i] * x[i], m.count + 1};
  }
  for (int offset = 16; offset; offset >>= 1) {
    const Moments o = __shfl_xor_sync(~0u, m, offset);
    m = {m.sum + o.sum, m.square + o.square, m.count + o.count};
  }
  Moments* warps = reinterpret_cast<Moments*>(simt::shared_memory());
  if (threadIdx.x % 32 == 0) store(warps + threadIdx.x / 32, m);
  __syncthreads();
  m = {0, 0, 0};
  for (unsigned w = 0; w < blockDim.x / 32; ++w) {
    const Moments o = load(warps + w);
    m = {m.sum + o.sum, m.square + o.square, m.count + o.count};
  }
  __syncthreads();
  store(reinterpret_cast<double*>(warps) + threadIdx.x, m.sum);
  if (threadIdx.x == 0) {
    simt::count_write(sizeof(double), sizeof(double));
    simt::count_write(sizeof(int), sizeof(int));
    *sum = m.sum;
    *count = m.count;
  }
}

void block_reduction() {
  std::vector<float> x(1000);
  for (int i = 0; i < 1000; ++i) x[i] = float(i);
  for (int repeat = 0; repeat < 3; ++repeat) {
    double sum = 0;
    int count = 0;
    run({1, kThreads, kThreads * sizeof(double)}, reduce, x.data(), 1000, &sum, &count);
    expect(sum == 499500 && count == 1000, "sum");
  }
}

__global__ void exchange(int* out) {
  int* mine = reinterpret_cast<int*>(simt::shared_memory());
  const unsigned rank = simt::cluster_rank(), size = simt::cluster_size();
  store(mine + threadIdx.x, int(blockIdx.x * blockDim.x + threadIdx.x));
  simt::sync_cluster();
  int sum = 0;
  for (unsigned r = 0; r < size; ++r) sum += load(simt::in_peer(mine + threadIdx.x, (rank + r) % size));
  simt::sync_cluster();
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

void cluster_exchange() {
  std::vector<int> out(12 * 64);
  run({12, 64, 64 * sizeof(int), 4}, exchange, out.data());
  for (int i = 0; i < int(out.size()); ++i) {
    const int first = i / 256 * 256 + i % 64;
    expect(out[i] == 4 * first + 6 * 64, "exchange");
  }
}

__global__ void transpose(const int* x, int* y) {
  short* tile = reinterpret_cast<short*>(simt::shared_memory());
  const unsigned at = threadIdx.y * blockDim.x + threadIdx.x, to = threadIdx.x * blockDim.y + threadIdx.y;
  store(tile + at, short(x[blockIdx.x * 96 + at]));
  __syncthreads();
  y[blockIdx.x * 96 + to] = load(tile + at);
}

void two_dimensions() {
  std::vector<int> x(96 * 3), y(x.size());
  for (int i = 0; i < int(x.size()); ++i) x[i] = i;
  run({3, dim3(24, 4), 192}, transpose, x.data(), y.data());
  for (int i = 0; i < int(x.size()); ++i) {
    expect(y[i / 96 * 96 + i % 24 * 4 + i % 96 / 24] == x[i], "transpose");
  }
}

template <class T>
__global__ void accumulate(T* total) {
  __threadfence();
  atomicAdd(total, T(threadIdx.x));
}

template <class T>
void accumulate_in() {
  T total = 0;
  run({3, 100, 0}, accumulate<T>, &total);
  expect(total == T(3 * 4950), "atomicAdd");
}

void atomics() {
  accumulate_in<int>();
  accumulate_in<unsigned>();
  accumulate_in<unsigned long long>();
  accumulate_in<float>();
  accumulate_in<double>();
}

// Threads that have exited count as arrived at a barrier. Lanes that a block does not have need not arrive in their
// warp.
__global__ void leave_early(int* out) {
  if (threadIdx.x < 64) return;
  __syncthreads();
  simt::sync_cluster();
  __syncwarp();
  out[threadIdx.x] = int(__ballot_sync(~0u, threadIdx.x % 2 == 0));
}

void early_exit() {
  std::vector<int> out(100);
  run({1, 100}, leave_early, out.data());
  expect(out[63] == 0 && out[64] == 0x55555555 && out[99] == 5, "ballot");
}

// Warp operations of each half warp under its own mask, then of the whole warp.
__global__ void votes(int* out) {
  const unsigned lane = threadIdx.x % 32, half = lane < 16 ? 0xffffu : 0xffff0000u;
  int value = int(lane);
  if (lane >= 16) value = __shfl_sync(half, value, 20);
  const int any = __any_sync(half, lane == 3), all = __all_sync(half, lane >= 16);
  value += __shfl_down_sync(~0u, value, 1);
  value += __shfl_xor_sync(~0u, int(lane), 8, 16) - (int(lane) ^ 8);
  value += __shfl_sync(~0u, int(lane), 1, 4) - int(lane / 4 * 4 + 1);
  __syncwarp(half);
  out[threadIdx.x] = value * 4 + any * 2 + all;
}

void warp_operations() {
  std::vector<int> out(64);
  run({1, 64}, votes, out.data());
  for (int i = 0; i < 64; ++i) {
    const auto value = [](int lane) { return lane < 16 ? lane : 20; };
    const int lane = i % 32, sum = value(lane) + value(lane < 31 ? lane + 1 : 31);
    expect(out[i] == sum * 4 + (lane < 16 ? 2 : 1), "votes");
  }
}

// Copies in three stages of 16 bytes per thread. Each thread reads another thread's data.
__global__ void copy_in_stages(const uint4* x, uint4* y, unsigned stages) {
  uint4* s = reinterpret_cast<uint4*>(simt::shared_memory());
  const unsigned t = threadIdx.x, other = (t + 37) % kThreads;
  const auto issue = [&](unsigned stage) {
    if (stage < stages) simt::async_copy(s + stage % 3 * kThreads + t, x + stage * kThreads + t, stage % 5 != 4);
    simt::async_commit();
  };
  issue(0);
  issue(1);
  for (unsigned stage = 0; stage < stages; ++stage) {
    simt::async_wait(1);
    __syncthreads();
    issue(stage + 2);
    y[stage * kThreads + other] = load(s + stage % 3 * kThreads + other);
  }
  simt::async_wait(0);
}

// 8 bytes beside 8 bytes that may be used meanwhile, and what a kernel finds that reports no accesses: the poison of
// unwritten memory until it has waited.
__global__ void look_early(const uint4* x, uint4* out) {
  uint4* s = reinterpret_cast<uint4*>(simt::shared_memory()) + threadIdx.x;
  store(s, uint4{1, 1, 1, 1});
  simt::async_copy(s, x, true, 8);
  simt::async_commit();
  simt::async_wait(1);
  store(&s->z, 6u);
  out[0] = *s;
  simt::async_wait(0);
  out[1] = load(s);
}

void asynchronous_copies() {
  const uint4 source{2, 3, 4, 5};
  uint4 found[2];
  run({1, 1}, look_early, &source, found);
  expect(found[0].x == ~0u && found[0].y == ~0u && found[0].z == 6 && found[0].w == 1, "look_early");
  expect(found[1].x == 2 && found[1].y == 3 && found[1].z == 6 && found[1].w == 1, "look_early");
  constexpr unsigned kStages = 7;
  std::vector<uint4> x(kStages * kThreads), y(x.size());
  for (unsigned i = 0; i < x.size(); ++i) x[i] = {i, i + 1, i + 2, i + 3};
  run({1, kThreads, 3 * kThreads * sizeof(uint4)}, copy_in_stages, x.data(), y.data(), kStages);
  for (unsigned i = 0; i < x.size(); ++i) expect(y[i].w == (i / kThreads == 4 ? 0 : i + 3), "copy_in_stages");
}

// Loads four matrices in shared memory, one below the other, unchanged and transposed.
__global__ void load_fragments(unsigned* out) {
  uint16_t* s = reinterpret_cast<uint16_t*>(simt::shared_memory());
  for (unsigned i = threadIdx.x; i < 4 * 64; i += 32) store(s + i, uint16_t(i));
  __syncthreads();
  unsigned plain[4], transposed[4];
  fastkd::cuda::load_matrices<false>(plain, s + threadIdx.x * 8);
  fastkd::cuda::load_matrices<true>(transposed, s + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) {
    out[threadIdx.x * 8 + i] = plain[i];
    out[threadIdx.x * 8 + 4 + i] = transposed[i];
  }
}

// A and B, distributed to the lanes as in the PTX manual, with small integers as elements.
template <class T>
__global__ void multiply_matrices(float* out) {
  const int g = int(threadIdx.x) / 4, t = int(threadIdx.x) % 4;
  const auto pair = [](int first, int second) {
    T items[2];
    fastkd::portable::from_float(float(first), items[0]);
    fastkd::portable::from_float(float(second), items[1]);
    unsigned word;
    std::memcpy(&word, items, sizeof(word));
    return word;
  };
  const auto a = [&](int row, int column) { return pair(row - column, row - column - 1); };
  const auto b = [&](int row, int column) { return pair(row + 2 * column, row + 1 + 2 * column); };
  const unsigned fragment[4] = {a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8)};
  float c01[2] = {1, 2}, c23[2] = {3, 4};
  fastkd::cuda::multiply_add<T>(c01, c23, fragment, b(2 * t, g), b(2 * t + 8, g));
  for (int i = 0; i < 2; ++i) {
    out[g * 8 + 2 * t + i] = c01[i] - float(1 + i);
    out[(g + 8) * 8 + 2 * t + i] = c23[i] - float(3 + i);
  }
}

template <class T>
void product_of_matrices() {
  std::vector<float> out(16 * 8);
  run({1, 32, 0}, multiply_matrices<T>, out.data());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      int sum = 0;
      for (int k = 0; k < 16; ++k) sum += (i - k) * (k + 2 * j);
      expect(out[i * 8 + j] == float(sum), "multiply_matrices");
    }
  }
}

void matrix_fragments() {
  std::vector<unsigned> found(32 * 8);
  run({1, 32, 4 * 64 * sizeof(uint16_t)}, load_fragments, found.data());
  for (unsigned lane = 0; lane < 32; ++lane) {
    for (unsigned i = 0; i < 4; ++i) {
      const unsigned g = lane / 4, t = lane % 4 * 2, plain = i * 64 + g * 8 + t, transposed = i * 64 + t * 8 + g;
      expect(found[lane * 8 + i] == (plain | (plain + 1) << 16), "load_fragments");
      expect(found[lane * 8 + 4 + i] == (transposed | (transposed + 8) << 16), "load_fragments");
    }
  }
  product_of_matrices<fastkd::portable::BFloat16>();
  product_of_matrices<fastkd::portable::Float16>();
}

template <class T>
__global__ void copy(const T* x, T* y) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  simt::count_read(sizeof(T), sizeof(T));
  simt::count_write(sizeof(T), sizeof(T));
  y[i] = x[i];
}

template <class T>
void copy_of(unsigned blocks) {
  std::vector<T> x(blocks * 32), y(x.size());
  run({blocks, 32, 0}, copy<T>, x.data(), y.data());
}

void traffic() {
  copy_of<char>(1);
  simt_reset();
  copy_of<char>(1);
  copy_of<short>(2);
  copy_of<int>(3);
  copy_of<double>(4);
  copy_of<uint4>(5);
  run({4, 1, 4096, 2}, accumulate<int>, std::vector<int>(1).data());
  SimtTraffic t;
  simt_traffic(&t);
  std::printf("read %llu written %llu read_16 %llu written_16 %llu launches %llu cluster %llu shared %llu\n", t.read,
              t.written, t.read_16, t.written_16, t.launches, t.largest_cluster, t.largest_shared_memory);
  std::printf("by width");
  for (unsigned long long bytes : simt::totals().traffic.read) std::printf(" %llu", bytes);
  std::printf("\n");
}

__global__ void nothing() {}

void limits() {
  const auto print = [](const char* name, cudaError_t error) {
    std::printf("%s: %s\n", name, cudaGetErrorString(error));
    expect(error == cudaGetLastError() && cudaGetLastError() == cudaSuccess, "last error");
  };
  constexpr int kKiB = 1024;
  print("block 1024", launch({1, 1024, 0}, nothing));
  print("block 1025", launch({1, 1025, 0}, nothing));
  print("block 32 x 33", launch({1, dim3(32, 33), 0}, nothing));
  print("grid 0", launch({0, 32, 0}, nothing));
  print("grid.x 2^31", launch({1u << 31, 32, 0}, nothing));
  print("grid.y 65536", launch({dim3(1, 65536), 32, 0}, nothing));
  print("48 KiB", launch({1, 32, 48 * kKiB}, nothing));
  print("49 KiB", launch({1, 32, 49 * kKiB}, nothing));
  print("allow 227 KiB", cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * kKiB));
  print("227 KiB", launch({1, 32, 227 * kKiB}, nothing));
  print("allow 228 KiB", cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 * kKiB));
  print("cluster 8", launch({16, 32, 0, 8}, nothing));
  print("cluster 16", launch({16, 32, 0, 16}, nothing));
  print("allow 16", cudaFuncSetAttribute(nothing, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  print("cluster 16 allowed", launch({16, 32, 0, 16}, nothing));
  print("cluster 17", launch({17, 32, 0, 17}, nothing));
  print("grid 6 by cluster 4", launch({6, 32, 0, 4}, nothing));
  int major = 0, minor = 0, optin = 0, device = 1;
  expect(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaErrorInvalidValue, "device");
  expect(cudaGetLastError() == cudaErrorInvalidValue && cudaGetDevice(&device) == cudaSuccess, "device");
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  std::printf("device %d.%d: %d KiB\n", major, minor, optin / kKiB);
}

// Launches from several OS threads are independent of each other.
void os_threads() {
  std::vector<std::thread> threads;
  std::atomic<int> failures{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      try {
        for (int repeat = 0; repeat < 3; ++repeat) block_reduction(), cluster_exchange(), two_dimensions();
      } catch (const std::exception&) {
        ++failures;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  expect(!failures, "os_threads");
}

}  // namespace
