// The op _scale_rows_: checks. The backend does the scaling.
#pragma once
#include "rows.h"

namespace fastkd {

inline constexpr const char* kScaleRows = "_scale_rows_";

struct ScaleRowsCall {
  const Tensor &gradient, &factor;
  bool one;  // one factor for all rows
  int64_t leading, rows, width;
};

template <class Backend>
void scale_rows(const Tensor& gradient, const Tensor& factor) {
  FASTKD_CHECK_TYPE(is_float(gradient.scalar_type()) && is_float(factor.scalar_type()), kScaleRows,
                    "gradient and factor must be floating-point");
  FASTKD_CHECK_VALUE(gradient.is_cpu() == factor.is_cpu() && gradient.get_device_index() == factor.get_device_index(),
                     kScaleRows, "gradient and factor must be on one device");
  const int64_t leading = gradient.dim() - 1;
  const bool one = factor.dim() == 0;
  FASTKD_CHECK_VALUE(leading >= 0 && (one || (factor.dim() == leading && same_leading(factor, gradient, leading))),
                     kScaleRows, "factor must be a scalar or have one entry a row, shape ",
                     leading_of(gradient, leading), ", got shape ", shape_of(factor));
  int64_t rows = 1;
  for (int64_t i = 0; i < leading; ++i) rows *= gradient.size(i);
  const int64_t width = gradient.size(leading);
  if (rows > 0 && width > 0) Backend::solve({gradient, factor, one, leading, rows, width});
}

}  // namespace fastkd
