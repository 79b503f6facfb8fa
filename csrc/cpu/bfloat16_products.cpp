// Products of bfloat16 matrices with sums in float32, on processors with instructions for them: which panels each
// thread computes, and the choice of instructions.
//
// Logits and gradients of weights: one operand, the hidden states, is small. It is packed once; each thread packs a few
// panels of the other at a time, so that they stay in its L2 cache, and multiplies them with all of the first.
// Gradients of hidden states: the sum is over the vocabulary. Some thousand of its columns at a time are packed of both
// operands, by all threads, and then multiplied.
#include "bfloat16_products.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../arguments/bfloat16_products_entry.h"
#include "common/parallel.h"
#include "isa.h"

#ifdef FASTKD_BFLOAT16
#include <cpuid.h>
#endif
#if defined(FASTKD_BFLOAT16) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastkd {

#ifdef FASTKD_BFLOAT16
extern const Bfloat16Kernels bfloat16_kernels_avx512_bf16, bfloat16_kernels_amx_bf16;
#endif

namespace {

#ifdef FASTKD_BFLOAT16

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  explicit Leaf(unsigned subleaf) {
    if (__get_cpuid_count(7, subleaf, &eax, &ebx, &ecx, &edx) == 0) eax = edx = 0;
  }
};

bool has_vectors() { return __builtin_cpu_supports("avx512f") && (Leaf(1).eax >> 5 & 1); }

// A process has to ask the system for the memory of the tiles.
bool has_tiles() {
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  const unsigned features = Leaf(0).edx;
  return has_vectors() && (features >> 22 & 1) && (features >> 24 & 1) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

#endif

struct Candidate {
  const char* name;
  const Bfloat16Kernels* kernels;
  bool supported;
};

// Best first. Asked once, when the first product is computed.
const Candidate* candidates() {
#ifdef FASTKD_BFLOAT16
  static const Candidate found[] = {{"amx_bf16", &bfloat16_kernels_amx_bf16, has_tiles()},
                                    {"avx512_bf16", &bfloat16_kernels_avx512_bf16, has_vectors()},
                                    {"none", nullptr, true}};
#else
  static const Candidate found[] = {{"none", nullptr, true}};
#endif
  return found;
}

const Candidate* best() {
  const Candidate* candidate = candidates();
  while (!candidate->supported) ++candidate;
  return candidate;
}

const Candidate*& chosen() {
  static const Candidate* choice = best();
  return choice;
}

const Candidate& in_use() {
  static const Candidate none{"none", nullptr, true};
  return std::string(kernels().isa) == "x86_64_v4" ? *chosen() : none;
}

// The set in use: "amx_bf16", "avx512_bf16" or "none". `use` chooses one, for tests and benchmarks.
std::string bfloat16_capability(const std::optional<std::string>& use) {
  if (use) {
    const Candidate* candidate = candidates();
    while (candidate->name != *use && candidate->kernels) ++candidate;
    FASTKD_CHECK_VALUE(candidate->name == *use && candidate->supported, "_bfloat16_capability", "instruction set '",
                       *use, "' is not compiled in or not supported by this machine");
    chosen() = candidate;
  }
  return in_use().name;
}

using Element = uint16_t;

int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

// A matrix as an operand. lines_first: a row of the matrix is a row of A (a column of B); else it holds one value of
// each.
Bfloat16Operand operand(const Tensor& x, bool lines_first) {
  return {x.data_ptr(),
          x.size(lines_first ? 0 : 1),
          x.size(lines_first ? 1 : 0),
          x.size(0) > 1 ? x.stride(0) : x.size(1),
          x.scalar_type() == ScalarType::Float,
          lines_first};
}

// Large results are written past the caches, unless they are read for that anyway.
bool streamed(const Bfloat16Call& call) {
  const bool aligned = reinterpret_cast<uintptr_t>(call.out.data_ptr()) % 64 == 0 && call.out.stride(0) % 16 == 0;
  return !call.add && aligned && call.out.numel() * int64_t(sizeof(float)) >= kStreamedBytes;
}

Bfloat16Result result(const Bfloat16Call& call) {
  const Tensor& out = call.out;
  return {out.data_ptr(),
          out.size(0),
          out.size(1),
          out.size(0) > 1 ? out.stride(0) : out.size(1),
          out.scalar_type() == ScalarType::Float,
          call.scale,
          call.bias ? static_cast<const float*>(call.bias->data_ptr()) : nullptr,
          call.add,
          streamed(call)};
}

class Product {
 public:
  Product(const Bfloat16Kernels& kernel, const Bfloat16Operand& a, const Bfloat16Operand& b, const Bfloat16Result& c)
      : kernel_(kernel),
        a_(a),
        b_(b),
        c_(c),
        steps_(steps_of(a.depth)),
        parts_(kernel.twice && a.wide ? 2 : 1),
        listed_(!kernel.twice && a.wide && a.depth > 0),
        least_(listed_ ? least_energy() : 0) {}

  // small_rows: A is the small operand, and bfloat16, else B. A thread holds so many panels of the large one as fit
  // into its L2 cache.
  void with_small(bool small_rows) const {
    constexpr int64_t kMostPanels = 8, kOwnBytes = int64_t(1) << 20;
    const Bfloat16Operand &small = small_rows ? a_ : b_, &large = small_rows ? b_ : a_;
    const int64_t panels = bfloat16_panels(small.size), stride = steps_ * kPanelStep;
    const int64_t at_once = at_most(kMostPanels, kOwnBytes / (parts_ * stride * int64_t(sizeof(Element)) + 1) + 1);
    if (small.size == 0 || large.size == 0) return;
    const WorkingMemory memory(panels * stride * int64_t(sizeof(Element)));
    Element* const packed = reinterpret_cast<Element*>(memory.data());
    torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
      kernel_.pack(small, small_rows, begin, end - begin, 0, steps_, packed + begin * stride, stride);
    });
    const int64_t all = bfloat16_panels(large.size), tasks = (all + at_once - 1) / at_once;
    const int64_t lists = listed_ ? (steps_ + kStepsAtOnce - 1) / kStepsAtOnce * kPanelLists : 0;
    torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
      char* const scratch =
          Scratch::of_thread(at_once * (parts_ * stride * int64_t(sizeof(Element)) +
                                        kBlockSums * int64_t(sizeof(float)) + lists * int64_t(sizeof(RemainderList))));
      float* const blocks = reinterpret_cast<float*>(scratch);
      RemainderList* const own_lists = reinterpret_cast<RemainderList*>(blocks + at_once * kBlockSums);
      Element* const own = reinterpret_cast<Element*>(own_lists + at_once * lists);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * at_once, count = at_most(at_once, all - first);
        pack(large, !small_rows, first, count, 0, steps_, own, stride, at_once * stride, own_lists, lists);
        for (int64_t i = 0; i < panels; ++i) {
          int64_t step = 0;
          do {
            const int64_t steps = at_most(kStepsAtOnce, steps_ - step), at = step * kPanelStep;
            const PackedPanels one{packed + i * stride + at, stride};
            PackedPanels many{own + at, stride, parts_, at_once * stride};
            if (listed_) many.lists = own_lists + step / kStepsAtOnce * kPanelLists;
            many.lists_stride = lists;
            if (small_rows) {
              kernel_.multiply(one, 1, many, count, steps, blocks, 0, step > 0);
            } else {
              kernel_.multiply(many, count, one, 1, steps, blocks, kBlockSums, step > 0);
            }
            step += steps;
          } while (step < steps_);
          for (int64_t j = 0; j < count; ++j) {
            const float* const block = blocks + j * kBlockSums;
            small_rows ? kernel_.store(block, c_, i, first + j) : kernel_.store(block, c_, first + j, i);
          }
        }
      }
      kernel_.finish();
    });
  }

  void with_long_sums() const {
    constexpr int64_t kSlabSteps = 64, kLists = kSlabSteps / kStepsAtOnce * kPanelLists;
    if (a_.size == 0 || b_.size == 0) return;
    const int64_t rows = bfloat16_panels(a_.size), columns = bfloat16_panels(b_.size), stride = kSlabSteps * kPanelStep;
    const int64_t sums = rows * columns * kBlockSums;
    const int64_t lists = listed_ ? rows * kLists : 0;
    const WorkingMemory memory(sums * int64_t(sizeof(float)) + lists * int64_t(sizeof(RemainderList)) +
                               (parts_ * rows + columns) * stride * int64_t(sizeof(Element)));
    float* const blocks = reinterpret_cast<float*>(memory.data());
    RemainderList* const lists_of_a = reinterpret_cast<RemainderList*>(blocks + sums);
    Element* const of_b = reinterpret_cast<Element*>(lists_of_a + lists);
    Element* const of_a = of_b + columns * stride;
    // A task multiplies a square of panels: as many as fit into its L2 cache, fewer where there are many threads.
    int64_t side = 8, across = 0, tasks = 0;
    for (;; side /= 2) {
      across = (columns + side - 1) / side;
      tasks = (rows + side - 1) / side * across;
      if (side == 1 || tasks >= 2 * int64_t(torch::stable::get_num_threads())) break;
    }
    int64_t slab = 0;
    do {
      const int64_t slab_steps = at_most(kSlabSteps, steps_ - slab);
      torch::stable::parallel_for(0, rows + columns, 1, [&](int64_t begin, int64_t end) {
        const int64_t middle = at_most(end, begin > columns ? begin : columns);
        kernel_.pack(b_, false, begin, middle - begin, slab * kStep, slab_steps, of_b + begin * stride, stride);
        for (int64_t i = middle; i < end; ++i) {
          pack(a_, true, i - columns, 1, slab * kStep, slab_steps, of_a + (i - columns) * stride, stride, rows * stride,
               lists_of_a + (i - columns) * kLists, kLists);
        }
      });
      torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task / across * side, column = task % across * side;
          int64_t step = 0;
          do {
            const int64_t steps = at_most(kStepsAtOnce, slab_steps - step), at = step * kPanelStep;
            PackedPanels a{of_a + row * stride + at, stride, parts_, rows * stride};
            if (listed_) a.lists = lists_of_a + row * kLists + step / kStepsAtOnce * kPanelLists;
            a.lists_stride = kLists;
            kernel_.multiply(a, at_most(side, rows - row), {of_b + column * stride + at, stride},
                             at_most(side, columns - column), steps, blocks + (row * columns + column) * kBlockSums,
                             columns * kBlockSums, slab + step > 0);
            step += steps;
          } while (step < slab_steps);
        }
      });
      slab += slab_steps;
    } while (slab < steps_);
    torch::stable::parallel_for(0, rows * columns, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) kernel_.store(blocks + i * kBlockSums, c_, i / columns, i % columns);
      kernel_.finish();
    });
  }

 private:
  // Packs all parts of an operand, `part_stride` elements apart, so that its data is read from memory once. Of A in
  // float32 also the lists, those of panels `lists_stride` lists apart.
  void pack(Bfloat16Operand x, bool of_rows, int64_t index, int64_t panels, int64_t first, int64_t steps,
            Element* packed, int64_t stride, int64_t part_stride, RemainderList* lists, int64_t lists_stride) const {
    if (!x.wide || (parts_ == 1 && !listed_)) {
      return kernel_.pack(x, of_rows, index, panels, first, steps, packed, stride);
    }
    const auto pack_one = [&](int64_t i, int64_t s) {
      Element* const to = packed + i * stride + s * kPanelStep;
      const int64_t k = first + s * kStep;
      for (int64_t part = 0; part < parts_; ++part) {
        x.remainder = part > 0;
        kernel_.pack(x, of_rows, index + i, 1, k, 1, to + part * part_stride, stride);
      }
      if (!listed_) return;
      RemainderList* const own = lists + i * lists_stride + s / kStepsAtOnce * kPanelLists;
      kernel_.list(x, index + i, k, s % kStepsAtOnce, least_, own);
    };
    if (x.contiguous) {
      for (int64_t i = 0; i < panels; ++i) {
        for (int64_t s = 0; s < steps; ++s) pack_one(i, s);
      }
    } else {
      for (int64_t s = 0; s < steps; ++s) {
        for (int64_t i = 0; i < panels; ++i) pack_one(i, s);
      }
    }
  }

  // The least energy of a unit that is listed. The sums do not depend on the number of threads.
  float least_energy() const {
    const int64_t rows = a_.contiguous ? a_.size : a_.depth, columns = a_.contiguous ? a_.depth : a_.size;
    const int64_t groups = (rows + kUnitRows - 1) / kUnitRows;
    std::vector<double> whole(groups);
    std::vector<int64_t> units(RemainderEnergies::kBins);
    std::mutex mutex;
    torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      RemainderEnergies found;
      for (int64_t group = begin; group < end; ++group) {
        const int64_t row = group * kUnitRows;
        found.whole = 0;
        kernel_.measure(static_cast<const float*>(a_.data) + row * a_.stride, a_.stride, at_most(rows - row, kUnitRows),
                        columns, a_.contiguous, found);
        whole[group] = found.whole;
      }
      const std::lock_guard<std::mutex> lock(mutex);
      for (int bin = 0; bin < RemainderEnergies::kBins; ++bin) units[bin] += found.units[bin];
    });
    double left_out = 0;
    for (const double x : whole) left_out += x;
    left_out *= kLeftOut * kLeftOut;
    const auto edge = [](uint32_t bin) {
      const uint32_t bits = bin << RemainderEnergies::kBinShift;
      float found;
      std::memcpy(&found, &bits, sizeof(found));
      return found;
    };
    uint32_t bin = 0;  // the first one that is listed
    for (; bin + 1 < RemainderEnergies::kBins; ++bin) {
      if (units[bin] > 0) left_out -= double(units[bin]) * edge(bin + 1);
      if (!(left_out >= 0)) break;
    }
    return std::max(edge(bin), std::numeric_limits<float>::min());
  }

  const Bfloat16Kernels& kernel_;
  const Bfloat16Operand a_, b_;
  const Bfloat16Result c_;
  const int64_t steps_;
  // A is the sum of so many packed operands, B is one.
  const int64_t parts_;
  // Whether A is float32, and its remainders are lists; the least energy of a unit in them.
  const bool listed_;
  const float least_;
};

struct Cpu {
  static const Bfloat16Kernels& kernel() {
    const Bfloat16Kernels* const found = bfloat16_kernels();
    FASTKD_CHECK_VALUE(found, "_bfloat16_capability", "this machine has no instructions for products of bfloat16");
    return *found;
  }
  static void logits(const Bfloat16Call& call) {
    Product(kernel(), operand(call.left, true), operand(call.right, true), result(call)).with_small(true);
  }
  static void hidden_gradient(const Bfloat16Call& call) {
    Product(kernel(), operand(call.left, true), operand(call.right, false), result(call)).with_long_sums();
  }
  static void weight_gradient(const Bfloat16Call& call) {
    Product(kernel(), operand(call.left, false), operand(call.right, false), result(call)).with_small(false);
  }
};

}  // namespace

const Bfloat16Kernels* bfloat16_kernels() { return in_use().kernels; }

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("_bfloat16_logits", TORCH_BOX(&bfloat16_logits<Cpu>));
  m.impl("_bfloat16_hidden_gradient", TORCH_BOX(&bfloat16_hidden_gradient<Cpu>));
  m.impl("_bfloat16_weight_gradient", TORCH_BOX(&bfloat16_weight_gradient<Cpu>));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("_bfloat16_capability", TORCH_BOX(&bfloat16_capability));
}

}  // namespace fastkd
