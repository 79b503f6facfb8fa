// The CPU kernels of one instruction set, and the choice among those compiled in.
#pragma once
#include "byte_log_probs.h"
#include "chunk_log_likelihood.h"
#include "clipped_divergence.h"
#include "cross_entropy.h"
#include "gated_routing.h"
#include "kl_div.h"
#include "scale_rows.h"
#include "shards.h"
#include "softmax_divergence.h"
#include "teacher_topk.h"
#include "token_log_probs.h"
#include "token_stats.h"
#include "topk_divergence.h"

namespace fastkd {

struct Kernels {
  const char* isa;
  SoftmaxDivergenceKernel softmax_divergence[kDivergences];
  KlDivKernel kl_div_float, kl_div_double;
  TopkKernel topk_float, topk_double;
  ClippedKernel clipped_float, clipped_double;
  CrossEntropyKernel cross_entropy_float, cross_entropy_double;
  TokenSumKernel token_sum_float, token_sum_double;
  TokenGradientKernel token_gradient_float, token_gradient_double;
  TokenStatsKernel token_stats_float, token_stats_double;
  TeacherTopkKernel<float> teacher_topk_float;
  TeacherTopkKernel<double> teacher_topk_double;
  ByteSumKernel byte_sum_float, byte_sum_double;
  ByteGradientKernel byte_gradient_float, byte_gradient_double;
  ChunkSumKernel chunk_sum_float, chunk_sum_double;
  ChunkGradientKernel chunk_gradient_float, chunk_gradient_double;
  GatedRoutingKernels gated_routing;
  ScaleRowKernel scale_row_float, scale_row_double;
  ShardSideKernels shard_side_float, shard_side_double;
  ShardPairKernels shard_pair_float[kDivergences], shard_pair_double[kDivergences];
};

// The kernels of the best instruction set that this machine can run, or of the one chosen by use_isa.
const Kernels& kernels();

// Chooses an instruction set, for tests and benchmarks. Returns false if it is not compiled in or this machine cannot
// run it.
bool use_isa(const char* name);

}  // namespace fastkd
