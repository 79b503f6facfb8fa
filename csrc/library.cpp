// The schema of every op, and what was built. Implementations register themselves next to their kernels; autograd
// formulas and fakes are in Python. FASTKD_LIBRARY is the ops' namespace; the kernels under test use another one
// (tests/simt).
#include <torch/csrc/stable/library.h>

#include <string>

#include "arguments/allocate.h"
#include "arguments/byte_log_probs_entry.h"
#include "arguments/chunk_log_likelihood_entry.h"
#include "arguments/clipped_divergence_entry.h"
#include "arguments/cross_entropy_entry.h"
#include "arguments/shards_entry.h"
#include "arguments/softmax_divergence_entry.h"
#include "arguments/teacher_topk_entry.h"
#include "arguments/token_log_probs_entry.h"
#include "arguments/token_stats_entry.h"
#include "arguments/topk_divergence_entry.h"

#ifndef FASTKD_LIBRARY
#define FASTKD_LIBRARY fastkd
#endif
#define FASTKD_OPS_IN(library, m) STABLE_TORCH_LIBRARY(library, m)

FASTKD_OPS_IN(FASTKD_LIBRARY, m) {
  using namespace fastkd;
  define_loss<SoftmaxDivergence>(m);
  define_loss<TopkDivergence>(m);
  define_loss<ClippedDivergence>(m);
  define_loss<CrossEntropy>(m);
  define_differentiable<ChunkLogLikelihood, ChunkLogLikelihoodBackward>(m);
  define_differentiable<ByteLogProbs, ByteLogProbsBackward>(m);
  define_differentiable<TokenLogProbs, TokenLogProbsBackward>(m);
  define_op<TeacherTopk>(m);
  define_op<TokenStats>(m);
  define_shard_ops(m);
  // The names that the integers of the ops above stand for: "op.field=name,name;op.field=..."
  m.def("_choices() -> str");
  // Gated routing, as csrc/arguments/gated_routing_entry.h describes it. Returns order and counts, int32.
  m.def("_acm_route(Tensor choices, SymInt learners) -> (Tensor, Tensor)");
  // Routing and rows in one call, for the value alone. Returns none if the arguments do not have the layout that the
  // kernels take.
  m.def(
      "_acm_value(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor? bias, Tensor choices, int activation) -> Tensor?");
  // Returns out, and the pre-activations if they are stored for the backward.
  m.def(
      "_acm_rows(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor? bias, Tensor order, Tensor counts, int activation, "
      "bool keep, bool packed=False) -> (Tensor, Tensor)");
  // Returns the gradients of x, w1, b1 and w2; those not requested are empty.
  m.def(
      "_acm_rows_backward(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor order, Tensor counts, "
      "Tensor pre_activations, int activation, bool x_gradient, bool w1_gradient, bool b1_gradient, bool w2_gradient) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // Memory for a gradient.
  m.def("_gradient_like(Tensor like) -> Tensor");
  // gradient *= factor, in place; factor has one number, or one per row. Rows whose factor is 1 are neither read nor
  // written.
  m.def("_scale_rows_(Tensor(a!) gradient, Tensor factor) -> ()");
  // Returns the loss and the gradients of input and target; those not requested are empty.
  // reduction: 0 none, 1 mean, 2 sum, 3 batchmean.
  m.def(
      "_kl_div(Tensor input, Tensor target, bool log_target, int reduction, bool input_gradient, "
      "bool target_gradient) -> (Tensor, Tensor, Tensor)");
  // The same with input's gradient written into `gradient`.
  m.def(
      "_kl_div_into(Tensor(a!) gradient, Tensor input, Tensor target, bool log_target, int reduction, "
      "bool target_gradient) -> (Tensor, Tensor)");
  // The loss alone, of tensors of any strides and sizes: the op that traced graphs contain. It has an autograd formula.
  m.def("_kl_div_loss(Tensor input, Tensor target, bool log_target, int reduction) -> Tensor");
  // input: only needed for target_gradient.
  m.def(
      "_kl_div_backward(Tensor grad_output, Tensor? input, Tensor target, bool log_target, int reduction, "
      "bool input_gradient, bool target_gradient) -> (Tensor, Tensor)");
  m.def("_cpu_capability(str? use) -> str");
  // Products of bfloat16 matrices with sums in float32: csrc/arguments/bfloat16_products_entry.h. On the CPU, where
  // _bfloat16_capability says which instructions they use: "none", where there are none.
  m.def("_bfloat16_logits(Tensor(a!) out, Tensor hidden, Tensor weight, Tensor? bias, float scale) -> ()");
  m.def("_bfloat16_hidden_gradient(Tensor(a!) out, Tensor gradient, Tensor weight, float scale) -> ()");
  m.def("_bfloat16_weight_gradient(Tensor(a!) total, Tensor gradient, Tensor hidden, float scale, bool add) -> ()");
  m.def("_bfloat16_capability(str? use) -> str");
  // Frees the memory that CPU kernels keep for their next call.
  m.def("_release_memory() -> ()");
  // The CUDA architectures compiled in, "" if none.
  m.def("_cuda_architectures() -> str");
}

#ifndef FASTKD_ARCHITECTURES
#define FASTKD_ARCHITECTURES ""
#endif

namespace {
std::string cuda_architectures() { return FASTKD_ARCHITECTURES; }
std::string choices() {
  using namespace fastkd;
  return choices_of<SoftmaxDivergence>() + choices_of<TopkDivergence>() + choices_of<ClippedDivergence>() +
         choices_of<CrossEntropy>();
}
}  // namespace

#define FASTKD_OPS_IMPL_IN(library, m) STABLE_TORCH_LIBRARY_IMPL(library, CompositeExplicitAutograd, m)
FASTKD_OPS_IMPL_IN(FASTKD_LIBRARY, m) {
  m.impl("_cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("_choices", TORCH_BOX(&choices));
  m.impl("_gradient_like", TORCH_BOX(&fastkd::gradient_like));
}
