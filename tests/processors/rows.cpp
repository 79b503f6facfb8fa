// Runs row kernels on problems from standard input, for tests/processors/test_processors.py: an executable without torch and
// Python, so that kernels compiled for another processor run under its emulator.
//
// A problem is a Header, then the student's and the teacher's logits. The answer is the row's loss, then the student's
// and the teacher's gradient in the dtype of the logits.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/cpu/isa.h"

namespace fastkd {
#define FASTKD_JOIN_(a, b) a##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN_(a, b)
extern const Kernels FASTKD_JOIN(kernels_, FASTKD_ISA);
}  // namespace fastkd

namespace {

struct Header {
  int64_t divergence, vocab, dtype;  // places in Divergences and Dtype
  int64_t label, excludes_label;     // -1: none; whether the divergence is of all tokens but the label
  double temperature, teacher_temperature, beta, alpha, label_weight;
};

template <class T>
bool read(T* to, size_t count) {
  return std::fread(to, sizeof(T), count, stdin) == count;
}

const fastkd::SliceRunner kOneThread{[](void*, int64_t slices, void (*body)(void*, int64_t), void* context) {
                                       for (int64_t slice = 0; slice < slices; ++slice) body(context, slice);
                                     },
                                     nullptr};

void solve(const Header& header) {
  using namespace fastkd;
  const Dtype dtype = Dtype(header.dtype);
  const bool float64 = dtype == Dtype::kFloat64;
  const size_t element = float64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2, bytes = size_t(header.vocab) * element;
  std::vector<char> logits[2], gradients[2];
  for (int i = 0; i < 2; ++i) {
    logits[i].resize(bytes);
    gradients[i].resize(bytes);
    if (!read(logits[i].data(), bytes)) std::exit(2);
  }
  const int64_t scratch_bytes = softmax_divergence_scratch(header.vocab, 1, float64 ? 8 : 4, true);
  void* const scratch = std::aligned_alloc(64, size_t((scratch_bytes + 63) / 64 * 64));

  Row student, teacher;
  student.data = logits[0].data();
  teacher.data = logits[1].data();
  student.dtype = teacher.dtype = dtype;
  const double weight = 1;
  SoftmaxDivergenceRow row{};
  row.vocab = row.student_width = row.teacher_width = header.vocab;
  row.student = student;
  row.teachers = {&teacher, &weight, 1, false};
  row.label = header.label;
  row.excludes_label = header.excludes_label != 0;
  row.student_gradient = student;
  row.student_gradient.data = gradients[0].data();
  row.teacher_gradient = teacher;
  row.teacher_gradient.data = gradients[1].data();
  row.scratch = scratch;
  row.task.temperature = header.temperature;
  row.task.teacher_temperature = header.teacher_temperature;
  row.task.divergence_scale = 1;
  row.task.scale = 1;
  row.task.label_weight = header.label_weight;
  row.task.has_label = header.label >= 0 && header.label_weight != 0;
  row.task.student_gradient = row.task.teacher_gradient = true;
  row.task.beta = header.beta;
  row.task.alpha = header.alpha;
  const auto& of = FASTKD_JOIN(kernels_, FASTKD_ISA).softmax_divergence.at(float64).of;
  const double loss = of[header.divergence](row, kOneThread);
  std::free(scratch);
  std::fwrite(&loss, sizeof(loss), 1, stdout);
  for (const auto& gradient : gradients) std::fwrite(gradient.data(), 1, bytes, stdout);
}

}  // namespace

int main() {
  for (Header header; read(&header, 1);) solve(header);
}
