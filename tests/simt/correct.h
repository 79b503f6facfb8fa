// Kernels the emulator must let pass, what counts their traffic and what checks the limits of launches.
#pragma once

#include <thread>

#include "simt.h"

struct SimtTraffic {
  unsigned long long read, written, read_16, written_16, launches, largest_cluster, largest_shared_memory;
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

// Correct kernels.

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

// Threads that have exited count as arrived, and those the block never had need not arrive in their warp.
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

// Half warps under masks of their own, then the whole warp.
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
  expect(cudaGetDevice(&device) == cudaSuccess && device == 0, "device");
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  std::printf("device %d.%d: %d KiB\n", major, minor, optin / kKiB);
}

// A launch belongs to the OS thread that makes it.
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
