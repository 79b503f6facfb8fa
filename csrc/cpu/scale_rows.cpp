// _scale_rows_ on the CPU: runs the row kernel over the rows of the tensor.
#include "scale_rows.h"

#include <torch/csrc/stable/library.h>

#include "../arguments/scale_rows_entry.h"
#include "common/parallel.h"
#include "isa.h"

namespace fastkd {
namespace {

struct Cpu {
  static void solve(const ScaleRowsCall& call) {
    const Rows all(call.gradient, call.leading), factors(call.factor, call.one ? 0 : call.leading);
    if (call.one && factors.number(0) == 1) return;
    const auto kernel = kernels().scale_rows.at(call.gradient.scalar_type() == ScalarType::Double);
    for_rows(call.rows, call.width, 0, [&](int64_t row, const SliceRunner&, char*) {
      kernel(all.row(row), call.width, factors.number(call.one ? 0 : row));
    });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("_scale_rows_", TORCH_BOX(&scale_rows<Cpu>)); }

}  // namespace fastkd
