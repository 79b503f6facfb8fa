// One row of a tensor, as CPU kernels take it. This file includes nothing of torch, so that files compiled per
// instruction set may include it.
#pragma once
#include <cstdint>

#include "../math/logit_map.h"

namespace fastkd {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Element i lies `i * stride` elements after data.
struct Row {
  void* data = nullptr;
  int64_t stride = 1;
  Dtype dtype = Dtype::kFloat32;
  bool streamed = false;  // written past the caches
  LogitMap map{};         // of logits: applied where they are loaded
  // Of a gradient of mapped logits: the logits, by whose slopes the gradient is multiplied where it is stored.
  const Row* logits = nullptr;
  explicit operator bool() const { return data != nullptr; }
};

}  // namespace fastkd
