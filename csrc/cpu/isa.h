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

// Each op's kernels are compiled on their own, in csrc/cpu/kernels.
struct Kernels {
  const char* isa;
  const Precisions<ByteKernels>& byte_log_probs;
  const Precisions<ChunkKernels>& chunk_log_likelihood;
  const Precisions<ClippedKernel>& clipped_divergence;
  const Precisions<CrossEntropyKernel>& cross_entropy;
  const GatedRoutingKernels& gated_routing;
  const Precisions<KlDivKernel>& kl_div;
  const Precisions<ScaleRowKernel>& scale_rows;
  Precisions<const ShardPairKernels&> shard_pair;
  const Precisions<ShardSideKernels>& shard_side;
  Precisions<const SoftmaxDivergenceKernels&> softmax_divergence;
  const TeacherTopkKernel<float>& teacher_topk_float;
  const TeacherTopkKernel<double>& teacher_topk_double;
  const Precisions<TokenKernels>& token_log_probs;
  const Precisions<TokenStatsKernel>& token_stats;
  const Precisions<TopkKernel>& topk_divergence;
};

// The kernels of the best instruction set that this machine can run, or of the one chosen by use_isa.
const Kernels& kernels();

// Chooses an instruction set, for tests and benchmarks. Returns false if it is not compiled in or this machine cannot
// run it.
bool use_isa(const char* name);

}  // namespace fastkd
