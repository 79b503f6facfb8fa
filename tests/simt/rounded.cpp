#include "rounded.h"

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace simt::rounded {
namespace {

std::atomic<unsigned> chosen_seed{1};

enum class Function : uint64_t { kExp2, kLog2, kLog2Approx, kReciprocal };

// 64 bits that depend on all bits of the seed, the function and x (the finalizer of SplitMix64).
uint64_t random(Function function, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  uint64_t z = ((uint64_t(chosen_seed.load(std::memory_order_relaxed)) << 32 | bits) + 1) * 0x9E3779B97F4A7C15ull;
  z += uint64_t(function) * 0xD1B54A32D192ED03ull;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ z >> 27) * 0x94D049BB133111EBull;
  return z ^ z >> 31;
}

// Uniform in [-1, 1].
double share(Function function, float x) { return double(int64_t(random(function, x))) * 0x1p-63; }

// y moved by -units to units units in the last place, unless it is 0, infinite or NaN.
float moved(float y, Function function, float x, int units) {
  if (y == 0 || !std::isfinite(y)) return y;
  int32_t bits;
  std::memcpy(&bits, &y, sizeof(bits));
  const int32_t sign = bits & INT32_MIN, size = bits & INT32_MAX;
  const int32_t error = int32_t(random(function, x) % uint64_t(2 * units + 1)) - units;
  bits = sign | std::clamp(size + error, 0, 0x7f800000);
  std::memcpy(&y, &bits, sizeof(y));
  return y;
}

float without_subnormals(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

}  // namespace

float exp2(float x) { return x == 0 ? 1 : moved(float(std::exp2(double(x))), Function::kExp2, x, 2); }

float exp2_approx(float x) { return without_subnormals(exp2(without_subnormals(x))); }

float log2(float x) { return moved(float(std::log2(double(x))), Function::kLog2, x, 1); }

float log2_approx(float x) {
  x = without_subnormals(x);
  const double y = std::log2(double(x)), u = share(Function::kLog2Approx, x);
  if (y == 0 || !std::isfinite(y)) return float(y);
  return without_subnormals(float(x > 0.5f && x < 2 ? y + u * 1.57e-7 : y * (1 + u * 0x1p-22)));
}

float reciprocal_approx(float x) {
  x = without_subnormals(x);
  return without_subnormals(float(1 / double(x) * (1 + share(Function::kReciprocal, x) * 0x1p-23)));
}

float product(float a, float b) { return a * b; }
float sum(float a, float b) { return a + b; }

}  // namespace simt::rounded

extern "C" {

__attribute__((visibility("default"))) void simt_round(unsigned seed) { simt::rounded::chosen_seed = seed; }

// For tests of the bounds.
__attribute__((visibility("default"))) float simt_rounded(const char* function, float x) {
  using namespace simt::rounded;
  if (!std::strcmp(function, "exp2")) return exp2(x);
  if (!std::strcmp(function, "log2")) return log2(x);
  if (!std::strcmp(function, "exp2_approx")) return exp2_approx(x);
  if (!std::strcmp(function, "log2_approx")) return log2_approx(x);
  return reciprocal_approx(x);
}
}
