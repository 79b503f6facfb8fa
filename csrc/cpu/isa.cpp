// The table of one instruction set's kernels. This file is compiled once for each set; FASTKD_ISA names the set.
#include "isa.h"

namespace fastkd {

#define FASTKD_QUOTE(x) FASTKD_STRINGIZE(x)
#define FASTKD_JOIN_(a, b) a##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN_(a, b)

extern const Kernels FASTKD_JOIN(kernels_, FASTKD_ISA);

namespace FASTKD_ISA {
constexpr Kernels make_kernels() {
  Kernels out{};
  out.isa = FASTKD_QUOTE(FASTKD_ISA);
  list_kernels(out.softmax_divergence, Divergences{});
  out.kl_div_float = kl_div_chunk<float>;
  out.kl_div_double = kl_div_chunk<double>;
  out.topk_float = topk_kernel<float>();
  out.topk_double = topk_kernel<double>();
  out.teacher_topk_float = {scan_slice<float>, collect_block<float>};
  out.teacher_topk_double = {scan_slice<double>, collect_block<double>};
  out.token_stats_float = token_stats_row<float>;
  out.token_stats_double = token_stats_row<double>;
  out.cross_entropy_float = cross_entropy_row<float>;
  out.cross_entropy_double = cross_entropy_row<double>;
  out.token_sum_float = token_sums<float>;
  out.token_sum_double = token_sums<double>;
  out.token_gradient_float = token_gradient<float>;
  out.token_gradient_double = token_gradient<double>;
  out.clipped_float = clipped_row<float>;
  out.clipped_double = clipped_row<double>;
  out.byte_sum_float = byte_sums<float>;
  out.byte_sum_double = byte_sums<double>;
  out.byte_gradient_float = byte_gradient<float>;
  out.byte_gradient_double = byte_gradient<double>;
  out.chunk_sum_float = chunk_sums<float>;
  out.chunk_sum_double = chunk_sums<double>;
  out.chunk_gradient_float = chunk_gradient<float>;
  out.chunk_gradient_double = chunk_gradient<double>;
  out.gated_routing = gated_routing_kernels();
  out.scale_row_float = scale_row<float>;
  out.scale_row_double = scale_row<double>;
  out.shard_side_float = shard_side_kernels<float>();
  out.shard_side_double = shard_side_kernels<double>();
  list_shard_kernels<float>(out.shard_pair_float, Divergences{});
  list_shard_kernels<double>(out.shard_pair_double, Divergences{});
  return out;
}
}  // namespace FASTKD_ISA

const Kernels FASTKD_JOIN(kernels_, FASTKD_ISA) = FASTKD_ISA::make_kernels();

}  // namespace fastkd
