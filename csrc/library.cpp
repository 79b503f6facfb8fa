// Every op's schema, and what was built. Implementations register themselves next to their kernels, autograd and fakes
// live in Python.
// FASTKD_LIBRARY: their namespace, another one for the kernels under test (tests/simt).
#include <torch/csrc/stable/library.h>

#include <string>

#include "tensor/allocate.h"

#ifndef FASTKD_LIBRARY
#define FASTKD_LIBRARY fastkd
#endif
#define FASTKD_OPS_IN(library, m) STABLE_TORCH_LIBRARY(library, m)

// RowOptions in csrc/tensor/row_problem.h.
#define FASTKD_ROW_OPTIONS                                                                                      \
  "float temperature, Tensor? temperatures, Tensor? weight, Tensor? mask, Tensor? labels, float label_weight, " \
  "int ignore_index, int vocab_size, bool square_temperature, str reduction, float denominator, Tensor? normalizer"

FASTKD_OPS_IN(FASTKD_LIBRARY, m) {
  // -> loss (one a row for reduction "none", else a scalar), the student's and the teacher's gradient (empty where not
  // asked for), and a factor still to be applied to them (empty: 1).
  m.def(
      "_softmax_divergence(Tensor student_logits, Tensor[] teacher_logits, str divergence, float beta, "
      "float temperature, float teacher_temperature, Tensor? temperatures, Tensor? teacher_temperatures, "
      "Tensor? weight, Tensor? mask, Tensor? teacher_weights, str teacher_mix, Tensor? labels, float label_weight, "
      "int ignore_index, int vocab_size, bool square_temperature, str reduction, float denominator, "
      "Tensor? normalizer, bool student_gradient, bool teacher_gradient) -> (Tensor, Tensor, Tensor, Tensor)");
  // The same with the student's gradient written into `gradient`, which may be student_logits itself.
  m.def(
      "_softmax_divergence_into(Tensor(a!) gradient, Tensor student_logits, Tensor[] teacher_logits, str divergence, "
      "float beta, "
      "float temperature, float teacher_temperature, Tensor? temperatures, Tensor? teacher_temperatures, "
      "Tensor? weight, Tensor? mask, Tensor? teacher_weights, str teacher_mix, Tensor? labels, float label_weight, "
      "int ignore_index, int vocab_size, bool square_temperature, str reduction, float denominator, "
      "Tensor? normalizer, bool teacher_gradient) -> (Tensor, Tensor, Tensor)");
  // -> loss, the gradient of teacher_log_probs (empty where not asked for) and a factor as above. The student's
  // gradient goes into `gradient`, if there is one.
  m.def(
      "_topk_divergence(Tensor(a!)? gradient, Tensor student_logits, Tensor teacher_log_probs, Tensor teacher_indices, "
      "str divergence, float beta, str tail, float stored_temperature, float teacher_temperature, "
      "Tensor? teacher_temperatures, float min_log_prob, float max_token_loss, " FASTKD_ROW_OPTIONS
      ", bool teacher_gradient) -> (Tensor, Tensor, Tensor)");
  // -> log-probabilities (float32) and indices (int32), [..., k].
  m.def(
      "_teacher_topk(Tensor teacher_logits, int k, float temperature, Tensor? temperatures, int vocab_size) "
      "-> (Tensor, Tensor)");
  // -> [11, ...] numbers (of the student, of the teacher, of both) and [2, ...] argmaxes, as TokenStats names them.
  m.def(
      "_token_stats(Tensor student_logits, Tensor? teacher_logits, Tensor? labels, float temperature, "
      "Tensor? temperatures, int vocab_size) -> (Tensor, Tensor)");
  // -> loss, gradients of teacher_logits, lower and upper (empty where not asked for) and a factor as above. softness
  // 0: hard edges.
  m.def(
      "_clipped_divergence(Tensor(a!)? gradient, Tensor student_logits, Tensor teacher_logits, Tensor lower, "
      "Tensor upper, bool keep_label, str renormalize, str tail, float softness, bool quantile, "
      "float teacher_temperature, Tensor? teacher_temperatures, " FASTKD_ROW_OPTIONS
      ", bool teacher_gradient, bool bound_gradients) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  // -> of each chunk the log-likelihood, the log-probability of the boundary set after it (empty without one) and the
  // number of tokens; and two numbers of each row for the backward.
  m.def(
      "_chunk_log_likelihood(Tensor logits, Tensor token_ids, Tensor chunk_ids, int num_chunks, Tensor? boundary, "
      "float temperature) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "_chunk_log_likelihood_backward(Tensor(a!) gradient, Tensor logits, Tensor token_ids, Tensor chunk_ids, "
      "int num_chunks, Tensor? boundary, float temperature, Tensor numbers, Tensor likelihood_gradient, "
      "Tensor? boundary_gradient) -> ()");
  // -> [..., columns] log-probabilities, and sums for the backward. Tables as csrc/tensor/byte_log_probs_entry.h
  // describes them.
  m.def(
      "_byte_log_probs(Tensor logits, Tensor order, Tensor columns, Tensor segments, Tensor? prefix, int whole, "
      "Tensor? valid) -> (Tensor, Tensor)");
  m.def(
      "_byte_log_probs_backward(Tensor(a!) gradient, Tensor logits, Tensor order, Tensor columns, Tensor segments, "
      "Tensor? prefix, int whole, Tensor? valid, Tensor sums, Tensor grad_output) -> ()");
  // Gated routing, as csrc/tensor/gated_routing_entry.h describes it. -> order and counts, int32.
  m.def("_acm_route(Tensor choices, SymInt learners) -> (Tensor, Tensor)");
  // Both in one, for the value alone; none where the arguments do not lie as the kernels take them.
  m.def(
      "_acm_value(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor? bias, Tensor choices, int activation) -> Tensor?");
  // -> out, and the pre-activations if kept.
  m.def(
      "_acm_rows(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor? bias, Tensor order, Tensor counts, int activation, "
      "bool keep, bool packed=False) -> (Tensor, Tensor)");
  // -> gradients of x, w1, b1 and w2, empty where not asked for.
  m.def(
      "_acm_rows_backward(Tensor grad, Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor order, Tensor counts, "
      "Tensor kept, int activation, bool x_gradient, bool w1_gradient, bool b1_gradient, bool w2_gradient) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  // Memory for a gradient.
  m.def("_gradient_like(Tensor like) -> Tensor");
  // gradient *= factor, one for all or one a row; rows whose factor is 1 are not touched.
  m.def("_scale_rows_(Tensor(a!) gradient, Tensor factor) -> ()");
  // -> loss, gradients of input and target times scale (empty where not asked for).
  m.def(
      "_kl_div(Tensor input, Tensor target, bool log_target, bool reduce, float scale, bool input_gradient, "
      "bool target_gradient) -> (Tensor, Tensor, Tensor)");
  // The same with a reduction and input's gradient written into `gradient`.
  m.def(
      "_kl_div_into(Tensor(a!) gradient, Tensor input, Tensor target, bool log_target, float scale, "
      "bool target_gradient) -> (Tensor, Tensor)");
  m.def(
      "_kl_div_backward(Tensor grad_output, Tensor input, Tensor target, bool log_target, float scale, "
      "bool input_gradient, bool target_gradient) -> (Tensor, Tensor)");
  m.def("_cpu_capability(str? use) -> str");
  // Gives back what CPU kernels keep for their next call.
  m.def("_release_memory() -> ()");
  // The CUDA architectures compiled in, "" if none.
  m.def("_cuda_architectures() -> str");
}

#ifndef FASTKD_ARCHITECTURES
#define FASTKD_ARCHITECTURES ""
#endif

namespace {
std::string cuda_architectures() { return FASTKD_ARCHITECTURES; }
}  // namespace

#define FASTKD_OPS_IMPL_IN(library, m) STABLE_TORCH_LIBRARY_IMPL(library, CompositeExplicitAutograd, m)
FASTKD_OPS_IMPL_IN(FASTKD_LIBRARY, m) {
  m.impl("_cuda_architectures", TORCH_BOX(&cuda_architectures));
  m.impl("_gradient_like", TORCH_BOX(&fastkd::gradient_like));
}
