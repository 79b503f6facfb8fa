// kl_div on CUDA: one read of each input and one write of each requested result, in packs of 16 bytes. Each block sums
// the terms that it reads; a second kernel adds the blocks' sums in order.
#include <torch/csrc/stable/library.h>

#include "../arguments/kl_div_entry.h"
#include "../math/kl_div.h"
#include "common/block.cuh"
#include "common/launch.h"
#include "common/policy.cuh"
#include "common/register.h"
#include "common/rows.cuh"
#include "common/vec.cuh"

namespace fastkd::cuda {
namespace {

constexpr const char* kName = "kl_div";
constexpr int kSumThreads = 512;

struct KlDivArguments {
  const void *input, *target;                      // input: null if no requested result needs it
  const void* upstream;                            // one per term, or null
  void *terms, *input_gradient, *target_gradient;  // null: not requested
  int64_t count;
  bool sum;
  double scale;
  DeviceRows upstream_scalar;
  double* sums;  // one per block
};

template <class T>
__device__ __forceinline__ Packed<T> load_pack(const void* from, int64_t first, int items, bool there = true) {
  Packed<T> out{};
  if (!there) return out;
  const T* p = static_cast<const T*>(from) + first;
  if (items == Packed<T>::kSize) {
    const uint4 bits = global_load16<true>(p);
    memcpy(&out, &bits, 16);
  } else {
#pragma unroll
    for (int j = 0; j < Packed<T>::kSize; ++j) {
      if (j < items) out.item[j] = global_load(p + j);
    }
  }
  return out;
}

template <class T>
__device__ __forceinline__ void store_pack(void* to, int64_t first, const Packed<T>& value, int items) {
  T* p = static_cast<T*>(to) + first;
  if (items == Packed<T>::kSize) {
    uint4 bits;
    memcpy(&bits, &value, 16);
    global_store16(p, bits);
  } else {
#pragma unroll
    for (int j = 0; j < Packed<T>::kSize; ++j) {
      if (j < items) global_store(p + j, value.item[j]);
    }
  }
}

// kWhole: every tensor begins on a 16-byte boundary, and thread i processes pack i. Otherwise elements are read and
// written one by one. kTraining: what a training step asks for, the sum and the input's gradient; otherwise anything.
template <bool kLogTarget, class T, bool kWhole, bool kTraining>
__global__ void __launch_bounds__(kFlatThreads) kl_div_kernel(const __grid_constant__ KlDivArguments a) {
  using P = Packed<T>;
  constexpr int kSize = kWhole ? P::kSize : 1;
  const int64_t packs = (a.count + kSize - 1) / kSize, stride = int64_t(gridDim.x) * blockDim.x;
  const double upstream = a.upstream_scalar ? a.upstream_scalar.number_at(a.upstream_scalar.data) : 1;
  const float scale = float(a.scale * upstream);
  float sum = 0;
  for (int64_t pack = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; pack < packs; pack += stride) {
    const int64_t first = pack * kSize, left = a.count - first;
    const int items = left < kSize ? int(left) : kSize;
    const P x = load_pack<T>(a.input, first, items, kTraining || a.input != nullptr);
    const P t = load_pack<T>(a.target, first, items);
    const auto entry = [&](int j) { return KlDivEntry<kLogTarget, float>{to_float(x.item[j]), to_float(t.item[j])}; };
    P out;
    if (kTraining || a.sum || a.terms != nullptr) {
      float terms[kSize];
      bool ordinary = items == kSize;
#pragma unroll
      for (int j = 0; j < kSize; ++j) ordinary = ordinary && entry(j).is_ordinary();
      if (ordinary) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) sum += terms[j] = entry(j).ordinary_term();
      } else {
#pragma unroll
        for (int j = 0; j < kSize; ++j) {
          terms[j] = entry(j).term(entry(j).mass());
          if (j < items) sum += terms[j];
        }
      }
      if (!kTraining && a.terms != nullptr) {
#pragma unroll
        for (int j = 0; j < kSize; ++j) out.item[j] = element<T>(terms[j]);
        store_pack<T>(a.terms, first, out, items);
      }
    }
    if constexpr (kTraining) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.item[j] = element<T>(-scale * entry(j).mass());
      store_pack<T>(a.input_gradient, first, out, items);
      continue;
    }
    if (a.input_gradient == nullptr && a.target_gradient == nullptr) continue;
    const P up = load_pack<T>(a.upstream, first, items, a.upstream != nullptr);
    const auto factor = [&](int j) { return a.upstream != nullptr ? scale * to_float(up.item[j]) : scale; };
    if (a.input_gradient != nullptr) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.item[j] = element<T>(-factor(j) * entry(j).mass());
      store_pack<T>(a.input_gradient, first, out, items);
    }
    if (a.target_gradient != nullptr) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) out.item[j] = element<T>(factor(j) * entry(j).by_target(entry(j).mass()));
      store_pack<T>(a.target_gradient, first, out, items);
    }
  }
  if (!a.sum) return;
  const Team team(shared_memory(), 1);
  const double all = team.sum(double(sum), [](double& into, double next) { into += next; });
  if (team.leads()) global_store(a.sums + blockIdx.x, all);
}

__global__ void __launch_bounds__(kSumThreads)
    kl_div_sum_kernel(const double* sums, int blocks, double scale, const __grid_constant__ DeviceRows loss) {
  const Team team(shared_memory(), 1);
  double sum = 0;
  for (int i = threadIdx.x; i < blocks; i += blockDim.x) sum += global_load(sums + i);
  sum = team.sum(sum, [](double& all, double next) { all += next; });
  if (team.leads()) loss.put(loss.data, sum * scale);
}

template <bool kLogTarget, class T>
void launch_kl_div(const Device& device, const KlDivArguments& a, int64_t blocks, bool whole) {
  const bool step = a.sum && a.input_gradient != nullptr && a.input != nullptr && a.terms == nullptr &&
                    a.target_gradient == nullptr && a.upstream == nullptr;
  const auto kernel = !whole ? kl_div_kernel<kLogTarget, T, false, false>
                      : step ? kl_div_kernel<kLogTarget, T, true, true>
                             : kl_div_kernel<kLogTarget, T, true, false>;
  device.launch({"terms", whole ? "all tensors begin on 16-byte boundaries: 16 bytes at a time"
                                : "a tensor does not begin on a 16-byte boundary: element by element"},
                kernel, blocks, kFlatThreads, Team::kSharedBytes, 1, a);
}

template <bool kLogTarget>
void launch_kl_div(const Device& device, const KlDivArguments& a, ScalarType type, int64_t blocks, bool whole) {
  if (type == ScalarType::BFloat16) return launch_kl_div<kLogTarget, BFloat16>(device, a, blocks, whole);
  if (type == ScalarType::Half) return launch_kl_div<kLogTarget, Float16>(device, a, blocks, whole);
  launch_kl_div<kLogTarget, float>(device, a, blocks, whole);
}

struct Cuda {
  static void solve(const KlDivCall& call) {
    const ScalarType type = call.target.scalar_type();
    FASTKD_CHECK_TYPE(type != ScalarType::Double, kName, "float64 input is supported on the CPU only");
    const Device device(call.target, kName);
    KlDivArguments a{};
    bool whole = true;
    const auto place = [&](const Tensor& x) {
      whole = whole && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
      return x.data_ptr();
    };
    if (call.input != nullptr) a.input = place(*call.input);
    a.target = place(call.target);
    a.count = call.target.numel();
    a.scale = call.scale;
    a.sum = call.loss && call.reduce;
    if (call.loss && !call.reduce) a.terms = place(*call.loss);
    if (call.input_gradient) a.input_gradient = place(*call.input_gradient);
    if (call.target_gradient) a.target_gradient = place(*call.target_gradient);
    if (call.upstream && call.upstream->dim() == 0) {
      a.upstream_scalar = device_rows(*call.upstream, 0, kName);
    } else if (call.upstream) {
      a.upstream = place(*call.upstream);
    }
    const int64_t size = whole ? 16 / element_size(type) : 1;
    const int64_t needed = (a.count + size * kFlatThreads - 1) / (size * kFlatThreads);
    // The number of blocks is fixed, so that the order of the sum does not depend on the device.
    const int64_t blocks = needed < kFlatBlocks ? needed : kFlatBlocks;
    std::optional<Tensor> sums;
    if (a.sum) {
      sums = torch::stable::new_empty(call.target, {blocks}, ScalarType::Double);
      a.sums = static_cast<double*>(sums->data_ptr());
    }
    if (call.log_target) {
      launch_kl_div<true>(device, a, type, blocks, whole);
    } else {
      launch_kl_div<false>(device, a, type, blocks, whole);
    }
    if (a.sum) {
      device.launch({"sum", "one block adds the blocks' sums in order"}, kl_div_sum_kernel, 1, kSumThreads,
                    Team::kSharedBytes, 1, a.sums, int(blocks), call.scale, device_rows(*call.loss, 0, kName));
    }
  }
};

}  // namespace

FASTKD_IMPL(m) {
  m.impl("_kl_div", TORCH_BOX(&kl_div<Cuda>));
  m.impl("_kl_div_into", TORCH_BOX(&kl_div_into<Cuda>));
  m.impl("_kl_div_loss", TORCH_BOX(&kl_div_loss<Cuda>));
  m.impl("_kl_div_backward", TORCH_BOX(&kl_div_backward<Cuda>));
}

}  // namespace fastkd::cuda
