// Gated routing on CUDA: arguments and launches.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../arguments/gated_routing_entry.h"
#include "common/launch.h"
#include "common/register.h"
#include "gated_routing.cuh"

namespace fastkd::cuda {

void solve_route(const AcmRouteCall& call);  // acm_route.cu

namespace {

bool aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

template <class T, class... Tensors>
bool aligned_lines(int64_t columns, const Tensors&... tensors) {
  return columns * int64_t(sizeof(T)) % 16 == 0 && (aligned(tensors.data_ptr()) && ...);
}

template <class T>
Lines<T> lines_of(const Tensor& tensor) {
  const int64_t columns = tensor.size(tensor.dim() - 1);
  return {static_cast<T*>(tensor.data_ptr()), int(columns), aligned_lines<T>(columns, tensor)};
}

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->data_ptr()) : nullptr;
}

// The launches of one call.
template <class T, int kLevel>
class Products {
 public:
  using Many = Tile<T, kLevel, kManyRows>;
  using Few = Tile<T, kLevel, kFewRows>;

  Products(const Device& device, const AcmOperands& operands)
      : device_(device),
        operands_(operands),
        sizes_(operands.sizes),
        routes_{static_cast<const int*>(operands.order.data_ptr()), static_cast<const int*>(operands.counts.data_ptr()),
                sizes_.rows, int(sizes_.learners)} {}

  void forward(const AcmRowsCall& call) const {
    const Tensor hidden = scratch();
    HiddenArguments<T> learners = hidden_arguments(operands_.x, operands_.w1, &hidden);
    learners.bias = static_cast<const T*>(operands_.b1.data_ptr());
    if (call.pre_activations) learners.pre_activations = lines_of<T>(*call.pre_activations);
    learners.hidden.whole =
        aligned_lines<T>(sizes_.width, operands_.b1) && learners.pre_activations.columns % Many::kPack == 0;
    SumArguments<T> sum = sum_arguments(hidden, operands_.w2, call.out);
    sum.bias = data_of<T>(call.bias);
    sum.bias_by_choice = call.bias && call.bias->dim() == 2;
    sum.out.whole = sum.out.whole && aligned(sum.bias);
    sum.lost = NAN;
    if (few_rows(sizes_.rows, sizeof(T))) {
      run_learners<Few, false>(learners);
      run_sum<Few, false>(sum);
    } else {
      run_learners<Many, false>(learners);
      run_sum<Many, false>(sum);
    }
  }

  void backward(const AcmGradientCall& call) const {
    const bool inner_wanted = call.x || call.w1 || call.b1;
    std::optional<Tensor> hidden, inner;
    if (call.w2) hidden = scratch();
    if (inner_wanted) inner = scratch();
    HiddenArguments<T> learners = hidden_arguments(call.grad, operands_.w2, hidden ? &*hidden : nullptr);
    if (inner) learners.inner = lines_of<T>(*inner);
    if (!inner) learners.tiles = 0;
    learners.pre = static_cast<const T*>(call.pre_activations.data_ptr());
    learners.hidden.whole = aligned_lines<T>(sizes_.width, call.pre_activations);
    if (hidden || inner) run_learners<Many, true>(learners);
    if (call.x) run_sum<Many, true>(sum_arguments(*inner, operands_.w1, *call.x));
    if (call.w1 || call.b1) {
      WeightArguments<T> weights = weight_arguments(operands_.x, *inner);
      if (call.w1) {
        weights.lines = int(sizes_.inputs);
        weights.out.data = static_cast<T*>(call.w1->data_ptr());
      }
      if (call.b1) weights.sums = static_cast<T*>(call.b1->data_ptr());
      run_weights<true>(weights);
    }
    if (call.w2) {
      WeightArguments<T> weights = weight_arguments(*hidden, call.grad);
      weights.lines = int(sizes_.width);
      weights.out.data = static_cast<T*>(call.w2->data_ptr());
      run_weights<false>(weights);
    }
  }

 private:
  template <class Tile>
  static constexpr const char* tile_reason() {
    return Tile::kRows == kFewRows ? "few rows: tiles of 16 rows" : "tiles of 128 rows";
  }

  Tensor scratch() const { return torch::stable::new_empty(operands_.x, {sizes_.learners, sizes_.rows, sizes_.width}); }

  HiddenArguments<T> hidden_arguments(const Tensor& rows, const Tensor& weights, const Tensor* hidden) const {
    HiddenArguments<T> a{};
    a.routes = routes_;
    a.rows = lines_of<const T>(rows);
    a.weights = lines_of<const T>(weights);
    a.width = int(sizes_.width);
    a.tiles = int(tiles_of(a.rows.columns, Many::kDepth));
    a.activation = operands_.activation;
    if (hidden != nullptr) a.hidden = lines_of<T>(*hidden);
    return a;
  }

  SumArguments<T> sum_arguments(const Tensor& rows, const Tensor& weights, const Tensor& out) const {
    SumArguments<T> a{};
    a.routes = routes_;
    a.rows = lines_of<const T>(rows);
    a.weights = lines_of<const T>(weights);
    a.out = lines_of<T>(out);
    return a;
  }

  WeightArguments<T> weight_arguments(const Tensor& a_rows, const Tensor& b_rows) const {
    WeightArguments<T> a{};
    a.routes = routes_;
    a.a = lines_of<const T>(a_rows);
    a.b = lines_of<const T>(b_rows);
    // Gradients are written to tensors with a layout of their own.
    a.out = {nullptr, a.b.columns, aligned_lines<T>(a.b.columns)};
    return a;
  }

  // Divides k into parts for a kernel with `tiles` tiles, each of depth_tiles tiles along k, whose result has `numbers`
  // numbers. Returns the memory of the parts' sums.
  std::optional<Tensor> divide(Parts& parts, int64_t tiles, int64_t depth_tiles, int64_t numbers) const {
    parts = {nullptr, depth_splits(tiles, depth_tiles)};
    if (parts.count == 1) return {};
    Tensor sums = torch::stable::new_empty(operands_.x, {parts.count, numbers}, ScalarType::Float);
    parts.sums = static_cast<float*>(sums.data_ptr());
    return sums;
  }

  template <class Kernel, class Arguments>
  void add(Kernel kernel, const Arguments& a, int64_t numbers) const {
    const int64_t blocks = tiles_of(tiles_of(numbers, Many::kPack), kFlatThreads);
    device_.launch({"sum of parts", "one thread for 16 bytes of the result"}, kernel,
                   std::min<int64_t>(blocks, kFlatBlocks), kFlatThreads, 0, 1, a);
  }

  template <class Tile, bool kBackward>
  void run_learners(HiddenArguments<T> a) const {
    const int64_t tiles = tiles_of(sizes_.width, Tile::kColumns) * sizes_.learners * tiles_of(sizes_.rows, Tile::kRows);
    const int64_t numbers = sizes_.learners * sizes_.rows * sizes_.width;
    const auto sums = divide(a.parts, tiles, a.tiles, numbers);
    device_.launch({"learners", tile_reason<Tile>()}, learner_kernel<Tile, kBackward>, tiles * a.parts.count,
                   Tile::kThreads, Operands<Tile, !kBackward>::kBytes, 1, a);
    if (sums) add(add_learner_kernel<T, kBackward>, a, numbers);
  }

  template <class Tile, bool kBackward>
  void run_sum(SumArguments<T> a) const {
    const int64_t tiles = tiles_of(a.out.columns, Tile::kColumns) * tiles_of(sizes_.rows, Tile::kRows);
    const int64_t numbers = sizes_.rows * a.out.columns;
    const auto sums = divide(a.parts, tiles, sizes_.learners * tiles_of(sizes_.width, Tile::kDepth), numbers);
    device_.launch({"outputs", tile_reason<Tile>()}, sum_kernel<Tile, kBackward>, tiles * a.parts.count, Tile::kThreads,
                   Operands<Tile, !kBackward>::kBytes, 1, a);
    if (sums) add(add_sum_kernel<T>, a, numbers);
  }

  template <bool kFirst>
  void run_weights(WeightArguments<T> a) const {
    const int64_t lines = tiles_of(a.lines, Many::kRows);
    const int64_t tiles =
        tiles_of(a.out.columns, Many::kColumns) * (a.lines > 0 ? lines : a.sums != nullptr) * sizes_.learners;
    const int64_t numbers = sizes_.learners * (a.lines + 1) * a.out.columns;
    const auto sums = divide(a.parts, tiles, tiles_of(sizes_.rows, Many::kDepth), numbers);
    device_.launch({"weights", "tiles of the weights' gradient"}, weight_kernel<Many, kFirst>, tiles * a.parts.count,
                   Many::kThreads, Operands<Many, true, false>::kBytes, 1, a);
    if (sums) add(add_weight_kernel<T>, a, numbers);
  }

  const Device& device_;
  const AcmOperands& operands_;
  const AcmSizes sizes_;
  const Routes routes_;
};

// Calls body(Products) with the Products for the tensors' type and the device.
template <class Body>
void with_products(const AcmOperands& operands, const Body& body) {
  const ScalarType type = operands.x.scalar_type();
  FASTKD_CHECK_TYPE(type != ScalarType::Double, kAcm, "float64 is supported on the CPU only");
  const AcmSizes& sizes = operands.sizes;
  FASTKD_CHECK_VALUE(std::max({sizes.inputs, sizes.width, sizes.outputs}) <= INT32_MAX / 2, kAcm,
                     "a matrix on CUDA must have fewer than 2^30 columns");
  const Device device(operands.x, kAcm);
  const auto call = [&](auto element) {
    using T = decltype(element);
    if (device.capability() < 80) return body(Products<T, 75>(device, operands));
    body(Products<T, 80>(device, operands));
  };
  if (type == ScalarType::BFloat16) return call(BFloat16{});
  if (type == ScalarType::Half) return call(Float16{});
  call(float{});
}

struct Cuda {
  static void solve(const AcmRouteCall& call) { solve_route(call); }
  static void solve(const AcmRowsCall& call) {
    with_products(call.operands, [&](const auto& products) { products.forward(call); });
  }
  static void solve(const AcmGradientCall& call) {
    with_products(call.operands, [&](const auto& products) { products.backward(call); });
  }
};

}  // namespace

FASTKD_IMPL(m) {
  m.impl("_acm_route", TORCH_BOX(&acm_route<Cuda>));
  m.impl("_acm_value", TORCH_BOX(&acm_value<Cuda>));
  m.impl("_acm_rows", TORCH_BOX(&acm_rows<Cuda>));
  m.impl("_acm_rows_backward", TORCH_BOX(&acm_rows_backward<Cuda>));
}

}  // namespace fastkd::cuda
