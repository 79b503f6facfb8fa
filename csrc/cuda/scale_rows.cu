// _scale_rows_ on CUDA: gradient *= factor, in place, with one read and one write. The kernel reads the factor on the
// device: where it is 1, the gradient is neither read nor written.
#include <torch/csrc/stable/library.h>

#include "../arguments/scale_rows_entry.h"
#include "common/launch.h"
#include "common/policy.cuh"
#include "common/register.h"
#include "common/rows.cuh"
#include "common/vec.cuh"

namespace fastkd::cuda {
namespace {

constexpr int64_t kPiece = 16384;

// A factor of 0 gives 0 whatever x is, even NaN.
__device__ __forceinline__ float scaled(float x, float factor) { return factor == 0 ? 0 : x * factor; }

template <class T>
__device__ void scale_packed(const PackedRow<T>& row, float factor) {
  for (int pack = threadIdx.x; pack < row.packs(); pack += blockDim.x) {
    Packed<T> value = row.template load<true>(pack, T{});
#pragma unroll
    for (int j = 0; j < Packed<T>::kSize; ++j) value.item[j] = element<T>(scaled(to_float(value.item[j]), factor));
    row.store(pack, value);
  }
}

__global__ void __launch_bounds__(kFlatThreads)
    scale_rows_kernel(const __grid_constant__ DeviceRows gradient, const __grid_constant__ DeviceRows factor, bool one,
                      int64_t rows, int width, int64_t count) {
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const double by = one ? factor.number_at(factor.data) : factor.number(row);
    if (by == 1) {
      if (one) return;
      continue;
    }
    char* const data = gradient.at(row);
    const int columns = int(count - row * width < width ? count - row * width : width);
    if (gradient.column_stride == 1 && gradient.type == ScalarType::Float) {
      scale_packed(PackedRow<float>(data, columns), float(by));
    } else if (gradient.column_stride == 1 && gradient.type == ScalarType::BFloat16) {
      scale_packed(PackedRow<BFloat16>(data, columns), float(by));
    } else if (gradient.column_stride == 1 && gradient.type == ScalarType::Half) {
      scale_packed(PackedRow<Float16>(data, columns), float(by));
    } else {
      for (int column = threadIdx.x; column < columns; column += blockDim.x) {
        char* const p = gradient.at(row, column);
        gradient.put(p, scaled(float(gradient.number_at(p)), float(by)));
      }
    }
  }
}

struct Cuda {
  static void solve(const ScaleRowsCall& call) {
    FASTKD_CHECK_TYPE(call.gradient.scalar_type() != ScalarType::Double, kScaleRows,
                      "float64 gradients are supported on the CPU only");
    const Device device(call.gradient, kScaleRows);
    const int64_t count = call.rows * call.width;
    DeviceRows gradient;
    int64_t rows = call.rows, width = call.width;
    if (call.one && call.gradient.is_contiguous()) {  // contiguous: rows are pieces of equal size
      width = kPiece;
      rows = (count + kPiece - 1) / kPiece;
      gradient = device_rows(call.gradient, 0, kScaleRows);
      gradient.column_stride = 1;
      gradient.dimensions = 1;
      gradient.sizes[0] = rows;
      gradient.strides[0] = kPiece;
    } else {
      FASTKD_CHECK_VALUE(width < kMaxColumns, kScaleRows, "gradient must have fewer than 2^31 - 1024 columns, got ",
                         width);
      gradient = device_rows(call.gradient, call.leading, kScaleRows);
    }
    const DeviceRows factor = device_rows(call.factor, call.one ? 0 : call.leading, kScaleRows);
    device.launch({"rows", "one block per row, or per piece of a contiguous gradient"}, scale_rows_kernel,
                  rows < kFlatBlocks ? rows : kFlatBlocks, kFlatThreads, 0, 1, gradient, factor, call.one, rows,
                  int(width), count);
  }
};

}  // namespace

FASTKD_IMPL(m) { m.impl("_scale_rows_", TORCH_BOX(&scale_rows<Cuda>)); }

}  // namespace fastkd::cuda
