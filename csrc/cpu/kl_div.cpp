// kl_div on the CPU: distributes chunks of the elements over threads.
#include "kl_div.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "../arguments/kl_div_entry.h"
#include "isa.h"

namespace fastkd {
namespace {

constexpr int64_t kChunk = 32768;

Row flat(const Tensor& x) { return {x.data_ptr(), 1, dtype_of(x.scalar_type())}; }

Row flat_gradient(const Tensor& x) {
  Row row = flat(x);
  row.streamed = x.numel() * element_size(x.scalar_type()) >= kStreamedBytes;
  return row;
}

double run(KlDivChunk whole, int64_t count, bool float64) {
  const auto kernel = kernels().kl_div.at(float64);
  std::vector<double> sums((count + kChunk - 1) / kChunk);
  torch::stable::parallel_for(0, int64_t(sums.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      KlDivChunk chunk = whole;
      chunk.begin = i * kChunk;
      chunk.end = chunk.begin + kChunk < count ? chunk.begin + kChunk : count;
      sums[i] = kernel(chunk);
    }
  });
  double sum = 0;
  for (double part : sums) sum += part;
  return sum;
}

void put_scalar(const Tensor& tensor, double value) {
  void* p = tensor.data_ptr();
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      *static_cast<double*>(p) = value;
      break;
    case ScalarType::BFloat16:
      portable::from_float(float(value), *static_cast<portable::BFloat16*>(p));
      break;
    case ScalarType::Half:
      portable::from_float(float(value), *static_cast<portable::Float16*>(p));
      break;
    default:
      *static_cast<float*>(p) = float(value);
  }
}

struct Cpu {
  static void solve(const KlDivCall& call) {
    const bool float64 = call.target.scalar_type() == ScalarType::Double;
    KlDivChunk chunk{};
    if (call.input != nullptr) chunk.input = flat(*call.input);
    chunk.target = flat(call.target);
    chunk.log_target = call.log_target;
    chunk.reduce = call.reduce && call.loss;
    chunk.scale = call.scale;
    if (call.loss && !call.reduce) chunk.terms = flat(*call.loss);
    if (call.input_gradient) chunk.input_gradient = flat_gradient(*call.input_gradient);
    if (call.target_gradient) chunk.target_gradient = flat_gradient(*call.target_gradient);
    if (call.upstream && call.upstream->dim() == 0) {
      chunk.scale *= Rows(*call.upstream, 0).number(0);
    } else if (call.upstream) {
      chunk.upstream = flat(*call.upstream);
    }
    const double sum = run(chunk, call.target.numel(), float64);
    if (chunk.reduce) put_scalar(*call.loss, sum * call.scale);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("_kl_div", TORCH_BOX(&kl_div<Cpu>));
  m.impl("_kl_div_into", TORCH_BOX(&kl_div_into<Cpu>));
  m.impl("_kl_div_loss", TORCH_BOX(&kl_div_loss<Cpu>));
  m.impl("_kl_div_backward", TORCH_BOX(&kl_div_backward<Cpu>));
}

}  // namespace fastkd
