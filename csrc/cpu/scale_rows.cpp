// _scale_rows_ on the CPU.
#include "scale_rows.h"

#include <torch/csrc/stable/library.h>

#include "../tensor/rows.h"
#include "isa.h"
#include "parallel.h"

namespace fastkd {
namespace {

void scale_rows(const Tensor& gradient, const Tensor& factor) {
  constexpr const char* kName = "_scale_rows_";
  FASTKD_CHECK_TYPE(is_float(gradient.scalar_type()) && is_float(factor.scalar_type()), kName,
                    "gradient and factor must be floating-point");
  FASTKD_CHECK_VALUE(gradient.is_cpu() && factor.is_cpu(), kName, "gradient and factor must be on the CPU");
  const int64_t leading = gradient.dim() - 1;
  const bool one = factor.dim() == 0;
  FASTKD_CHECK_VALUE(leading >= 0 && (one || (factor.dim() == leading && same_leading(factor, gradient, leading))),
                     kName, "factor must be a scalar or have one entry a row, shape ", leading_of(gradient, leading),
                     ", got shape ", shape_of(factor));
  int64_t rows = 1;
  for (int64_t i = 0; i < leading; ++i) rows *= gradient.size(i);
  const int64_t width = gradient.size(leading);
  if (rows == 0 || width == 0) return;
  const Rows all(gradient, leading), factors(factor, one ? 0 : leading);
  if (one && factors.number(0) == 1) return;
  const auto kernel =
      gradient.scalar_type() == ScalarType::Double ? kernels().scale_row_double : kernels().scale_row_float;
  for_rows(rows, width, 0,
           [&](int64_t row, const SliceRunner&, char*) { kernel(all.row(row), width, factors.number(one ? 0 : row)); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) { m.impl("_scale_rows_", TORCH_BOX(&scale_rows)); }

}  // namespace fastkd
