// Learners of gated routing on sorted rows, in float32: what one thread does with a block of rows, with some of the
// columns, or with some of the weights' gradients. Sizes and order as in csrc/arguments/gated_routing_entry.h.
//
// A pass is two matrix products: from the rows to the learner's width, then, after an elementwise step on each panel,
// to the result. Forward: x w1 + b1, the activation, and w2. Backward: grad w2^T, the activation's slope, and w1^T. A
// block of rows is gathered once and stays in the L2 cache while the weights are read. The sums over learners are
// accumulated in the result's rows.
#pragma once
#include "../math/activation.h"
#include "common/tiles.h"

namespace fastkd {

// The sorted rows from `first` on, in a buffer of their own, `stride` floats apart. Learner n's rows begin n * rows, or
// starts[n], rows after the beginning. rows = 0: the buffer holds one block of one learner at a time.
struct SortedRows {
  float* data = nullptr;
  int64_t first = 0, rows = 0, stride = 0;
  const int64_t* starts = nullptr;
  float* at(int64_t learner, int64_t row) const {
    return data + ((starts ? starts[learner] : learner * rows) + row - first) * stride;
  }
};

// The operands that the threads of a pass have in common.
struct Learners {
  int64_t learners, inputs, width, outputs;  // of the pass: in backward, `inputs` is D_out
  Activation activation;
  bool backward;
  const float *in, *w1, *b1, *w2;
  const int32_t *order, *counts;
  const float* bias;           // null, or that of choice 0
  int64_t bias_stride;         // floats from one choice's bias to the next
  float* out;                  // null: only the first product is requested
  int64_t block;               // rows per block
  float* packed;               // backward: null, or all panels of w2^T and w1^T, see PackedWeights
  SortedRows gathered;         // `in`, sorted, where threads divide the columns
  SortedRows pre_activations;  // pre-activations: forward writes them if not null, backward reads them
  SortedRows hidden;           // activations: backward if requested; forward where threads divide the columns
  SortedRows inner;            // gradients of pre-activations

  // The number of learners that have at least one row.
  int64_t running() const {
    int64_t n = 0;
    while (n < learners && counts[n] > 0) ++n;
    return n;
  }
};

// The contribution of the sorted rows [first, last) to the gradients of the weights. Null gradients are not requested.
// x and grad are not sorted.
struct WeightGradients {
  int64_t first, last;
  int64_t learners, inputs, width, outputs;
  const float *x, *grad;
  const int32_t *order, *counts;
  SortedRows hidden, inner;
  float *w1, *b1, *w2;
};

// Floats from one row to the next. The padding keeps consecutive rows from mapping to the same set of the L1 cache.
constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16 + 16; }

// How many rows' outer products are summed before the sum is added to a gradient.
inline constexpr int64_t kChunkRows = 224;

struct GatedRoutingKernels {
  int64_t tile_columns;
  int64_t (*scratch)(const Learners&);
  // Runs the pass for the sorted rows [begin, end).
  void (*rows)(const Learners&, int64_t begin, int64_t end, char* scratch);
  // `first` and `second` compute panels [begin, end) of the first and second product; panels are numbered learner by
  // learner.
  void (*first)(const Learners&, int64_t begin, int64_t end, char* scratch);
  void (*second)(const Learners&, int64_t begin, int64_t end, char* scratch);
  int64_t (*packed_floats)(const Learners&);
  // Fills panels [begin, end) of `packed`, numbered learner by learner.
  void (*pack)(const Learners&, int64_t begin, int64_t end);
  int64_t (*weights_scratch)(const WeightGradients&);
  // Computes panels [begin, end) of the gradients: for each learner those of w1, then those of w2.
  void (*weights)(const WeightGradients&, int64_t begin, int64_t end, char* scratch);
};

}  // namespace fastkd

namespace fastkd::FASTKD_ISA {

FASTKD_INLINE int64_t panels_of(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

FASTKD_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

FASTKD_INLINE Panel panel_of(const float* data, int64_t stride, bool transposed, int64_t index, int64_t columns,
                             int64_t panels = 1, float* packed = nullptr) {
  const int64_t column = index * kTileColumns;
  return {data, stride, nullptr, transposed, column, smaller(columns - column, panels * kTileColumns), packed};
}

// The matrices that backward multiplies by: for each learner the panels of w2^T, then those of w1^T if x's gradient is
// requested. They are transposed once where many blocks of rows read them.
struct PackedWeights {
  const Learners& l;
  int64_t first_panels() const { return panels_of(l.width); }
  int64_t second_panels() const { return l.out ? panels_of(l.outputs) : 0; }
  int64_t floats_of_learner() const { return kTileColumns * (first_panels() * l.inputs + second_panels() * l.width); }
  Panel first(int64_t n, int64_t index) const {
    return panel_of(l.w2 + n * l.inputs * l.width, l.inputs, true, index, l.width, 1,
                    at(n, index * kTileColumns * l.inputs));
  }
  Panel second(int64_t n, int64_t index) const {
    return panel_of(l.w1 + n * l.width * l.outputs, l.width, true, index, l.outputs, 1,
                    at(n, kTileColumns * (first_panels() * l.inputs + index * l.width)));
  }

 private:
  float* at(int64_t n, int64_t offset) const {
    return l.packed ? l.packed + n * floats_of_learner() + offset : nullptr;
  }
};

template <class Body>
FASTKD_INLINE void with_activation(Activation kind, const Body& body) {
  switch (kind) {
    case Activation::kIdentity:
      return body(Count<int(Activation::kIdentity)>());
    case Activation::kRelu:
      return body(Count<int(Activation::kRelu)>());
    case Activation::kGelu:
      return body(Count<int(Activation::kGelu)>());
    case Activation::kGeluTanh:
      return body(Count<int(Activation::kGeluTanh)>());
    case Activation::kSilu:
      return body(Count<int(Activation::kSilu)>());
  }
}

inline int64_t learners_scratch(const Learners& l) {
  const int64_t floats = l.gathered.data ? 0 : l.block * (padded(l.inputs) + padded(l.width));
  return (kPackedFloats + floats) * int64_t(sizeof(float)) + 3 * l.block * int64_t(sizeof(float*));
}

// Processes a block of sorted rows through the learners.
class Block {
 public:
  Block(const Learners& l, char* scratch) : l_(l) {
    packed_ = reinterpret_cast<float*>(scratch);
    rows_ = packed_ + kPackedFloats;
    float** pointers =
        reinterpret_cast<float**>(rows_ + (l.gathered.data ? 0 : l.block * (padded(l.inputs) + padded(l.width))));
    targets_ = pointers;
    results_ = pointers + l.block;
    starts_ = const_cast<const float**>(pointers + 2 * l.block);
  }

  // Starts the block of sorted rows [first, first + rows), of which the first `running(0)` run a learner.
  void begin(int64_t first, int64_t rows) {
    first_ = first;
    size_ = rows;
    if (l_.out == nullptr) return;
    int64_t choice = l_.learners;
    for (int64_t i = 0; i < rows; ++i) {
      while (choice > 0 && l_.counts[choice - 1] <= first + i) --choice;
      results_[i] = l_.out + l_.order[first + i] * l_.outputs;
      if (choice > 0) continue;
      if (l_.bias == nullptr) {
        __builtin_memset(results_[i], 0, sizeof(float) * l_.outputs);
      } else {
        __builtin_memcpy(results_[i], l_.bias, sizeof(float) * l_.outputs);
      }
    }
  }

  int64_t running(int64_t learner) const {
    const int64_t rows = l_.counts[learner] - first_;
    return rows < 0 ? 0 : smaller(rows, size_);
  }

  RowMajor inputs() const {
    return l_.gathered.data ? RowMajor{l_.gathered.at(0, first_), l_.gathered.stride}
                            : RowMajor{rows_, padded(l_.inputs)};
  }

  void gather() {
    for (int64_t i = 0; l_.inputs > 0 && i < running(0); ++i) {
      __builtin_memcpy(rows_ + i * padded(l_.inputs), l_.in + l_.order[first_ + i] * l_.inputs,
                       sizeof(float) * l_.inputs);
    }
  }

  // How many panels, of those up to `end`, to process at once.
  int64_t panels_at_once(int64_t index, int64_t end) const {
    return few() ? smaller(end - index, kPackedFloats / (size_ * kTileColumns)) : 1;
  }

  // Computes panels of learner n's first product.
  void first_product(int64_t n, int64_t index, int64_t panels) {
    const int64_t rows = running(n);
    const SortedRows activations = hidden(), pre = l_.pre_activations.data ? l_.pre_activations : activations;
    const SortedRows& target = l_.backward ? l_.inner : pre;
    for (int64_t i = 0; i < rows; ++i) targets_[i] = row(target, n, i);
    if (l_.backward) {
      const Panel panel = PackedWeights{l_}.first(n, index);
      // Prefetches pieces of rows far apart, which the hardware prefetcher does not predict.
      for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < panel.columns; j += 16) {
          __builtin_prefetch(row(pre, n, i) + panel.column + j, 0, 2);
        }
      }
      multiply_panel(inputs(), rows, panel, l_.inputs, packed_, nullptr, targets_);
      return with_activation(l_.activation, [&](auto kind) {
        for (int64_t i = 0; i < rows; ++i) {
          differentiate<Activation(decltype(kind)::value)>(
              row(pre, n, i) + panel.column, targets_[i] + panel.column,
              activations.data ? row(activations, n, i) + panel.column : nullptr, panel.columns);
        }
      });
    }
    const Panel panel = panel_of(l_.w1 + n * l_.inputs * l_.width, l_.width, false, index, l_.width, panels);
    for (int64_t i = 0; i < rows; ++i) starts_[i] = l_.b1 + n * l_.width;
    multiply(inputs(), rows, panel, l_.inputs, starts_, targets_);
    with_activation(l_.activation, [&](auto kind) {
      for (int64_t i = 0; i < rows; ++i) {
        activate<Activation(decltype(kind)::value)>(targets_[i] + panel.column, row(activations, n, i) + panel.column,
                                                    panel.columns);
      }
    });
  }

  // Adds panels of learner n's second product to the result.
  void second_product(int64_t n, int64_t index, int64_t panels) {
    const int64_t rows = running(n);
    const SortedRows from = l_.backward ? l_.inner : hidden();
    const float* const w2 = l_.w2 + n * l_.width * l_.outputs;
    const Panel panel =
        l_.backward ? PackedWeights{l_}.second(n, index) : panel_of(w2, l_.outputs, false, index, l_.outputs, panels);
    ConstRowPointers start = n > 0 ? results_ : nullptr;
    if (n == 0 && l_.bias) {
      int64_t choice = l_.learners;
      for (int64_t i = 0; i < rows; ++i) {
        while (l_.counts[choice - 1] <= first_ + i) --choice;
        starts_[i] = l_.bias + choice * l_.bias_stride;
      }
      start = starts_;
    }
    multiply(RowMajor{row(from, n, 0), from.stride}, rows, panel, l_.width, start, results_);
  }

 private:
  bool few() const { return !l_.backward && l_.gathered.data && size_ <= kFewRows; }

  void multiply(RowMajor a, int64_t rows, const Panel& panel, int64_t depth, ConstRowPointers start,
                RowPointers out) const {
    if (!few()) return multiply_panel(a, rows, panel, depth, packed_, start, out);
    multiply_few(a, rows, panel, depth, packed_, start, out);
  }

  // A thread's own buffer holds one learner's rows of one block at a time.
  SortedRows hidden() const {
    if (l_.backward || l_.gathered.data) return l_.hidden;
    return {rows_ + l_.block * padded(l_.inputs), 0, 0, padded(l_.width), nullptr};
  }
  float* row(const SortedRows& rows, int64_t n, int64_t i) const {
    return rows.rows == 0 ? rows.data + i * rows.stride : rows.at(n, first_ + i);
  }

  template <Activation kKind>
  static void activate(const float* pre, float* out, int64_t count) {
    FASTKD_SIMD
    for (int64_t j = 0; j < count; ++j) out[j] = activated<kKind>(pre[j]).value;
  }
  template <Activation kKind>
  static void differentiate(const float* pre, float* inner, float* hidden, int64_t count) {
    if (hidden) {
      FASTKD_SIMD
      for (int64_t j = 0; j < count; ++j) {
        const Activated<float> found = activated<kKind>(pre[j]);
        hidden[j] = found.value;
        inner[j] *= found.slope;
      }
    } else {
      FASTKD_SIMD
      for (int64_t j = 0; j < count; ++j) inner[j] *= activated<kKind>(pre[j]).slope;
    }
  }

  const Learners& l_;
  float *packed_, *rows_;
  float **targets_, **results_;
  const float** starts_;
  int64_t first_ = 0, size_ = 0;
};

inline void learner_rows(const Learners& l, int64_t begin, int64_t end, char* scratch) {
  Block block(l, scratch);
  for (int64_t first = begin; first < end; first += l.block) {
    block.begin(first, smaller(end - first, l.block));
    block.gather();
    for (int64_t n = 0; n < l.learners && block.running(n) > 0; ++n) {
      for (int64_t panel = 0; panel < panels_of(l.width); ++panel) block.first_product(n, panel, 1);
      for (int64_t panel = 0; l.out && panel < panels_of(l.outputs); ++panel) block.second_product(n, panel, 1);
    }
  }
}

inline void learner_first(const Learners& l, int64_t begin, int64_t end, char* scratch) {
  Block block(l, scratch);
  block.begin(0, l.counts[0]);
  const int64_t panels = panels_of(l.width);
  for (int64_t i = begin, step; i < end; i += step) {
    const int64_t n = i / panels, index = i - n * panels;
    step = block.panels_at_once(index, smaller(end - n * panels, panels));
    block.first_product(n, index, step);
  }
}

inline void learner_second(const Learners& l, int64_t begin, int64_t end, char* scratch) {
  Block block(l, scratch);
  block.begin(0, l.counts[0]);
  for (int64_t index = begin, step; index < end; index += step) {
    step = block.panels_at_once(index, end);
    for (int64_t n = 0; n < l.learners && block.running(n) > 0; ++n) block.second_product(n, index, step);
  }
}

inline int64_t packed_floats(const Learners& l) { return l.running() * PackedWeights{l}.floats_of_learner(); }

inline void pack_weights(const Learners& l, int64_t begin, int64_t end) {
  const PackedWeights weights{l};
  const int64_t of_first = weights.first_panels(), all = of_first + weights.second_panels();
  for (int64_t i = begin; i < end; ++i) {
    const int64_t n = i / all, index = i - n * all;
    const bool second = index >= of_first;
    const Panel panel = second ? weights.second(n, index - of_first) : weights.first(n, index);
    pack(panel, 0, second ? l.width : l.inputs, panel.packed);
  }
}

inline int64_t weights_scratch(const WeightGradients& g) {
  const int64_t height = (g.inputs > g.width ? g.inputs : g.width) + kTileRows;
  return (kPackedFloats + kChunkRows * height) * int64_t(sizeof(float)) +
         (2 * kChunkRows + height) * int64_t(sizeof(float*));
}

// A^T B over the rows of a learner, chunk by chunk: some panels of one weight's gradient.
struct OuterProduct {
  int64_t rows, height, columns;  // of A and B; of A; of B
  bool fresh;                     // the gradient is not initialised yet
  const float *a, *b;
  const int32_t *a_order, *b_order;  // null: rows are used in memory order
  int64_t a_stride, b_stride;
  float *gradient, *sums;  // [height, columns], and the sums of B's columns; null: not requested

  void panels(int64_t begin, int64_t end, char* scratch) const {
    float* const packed = reinterpret_cast<float*>(scratch);
    float* const tiles = packed + kPackedFloats;
    const int64_t padded_height = (height + kTileRows - 1) / kTileRows * kTileRows;
    const float** const b_rows = reinterpret_cast<const float**>(tiles + kChunkRows * padded_height);
    float** const targets = const_cast<float**>(b_rows + kChunkRows);
    for (int64_t i = 0; gradient && i < height; ++i) targets[i] = gradient + i * columns;
    for (int64_t first = 0; first < rows || (fresh && first == 0); first += kChunkRows) {
      const bool adds = first > 0 || !fresh;
      const int64_t depth = smaller(rows - first, kChunkRows);
      for (int64_t k = 0; k < depth; ++k) {
        b_rows[k] = b + (b_order ? b_order[first + k] : first + k) * b_stride;
        if (gradient) pack_column(a + (a_order ? a_order[first + k] : first + k) * a_stride, tiles, k, depth);
      }
      for (int64_t index = begin; index < end; ++index) {
        Panel panel = panel_of(nullptr, 0, false, index, columns);
        panel.rows = b_rows;
        for (int64_t k = 0; index + 1 < end && k < depth; ++k) {
          for (int j = 0; j < kTileColumns; j += 16) {
            __builtin_prefetch(b_rows[k] + panel.column + kTileColumns + j, 0, 2);
          }
        }
        if (gradient) {
          multiply_panel(TileMajor{tiles, depth}, height, panel, depth, packed, adds ? targets : nullptr, targets);
        } else {
          pack(panel, 0, depth, packed);
        }
        if (sums) add_up(packed, depth, panel, adds);
      }
    }
  }

 private:
  // A row of A is a column of A^T: its elements are distributed over the tiles.
  void pack_column(const float* row, float* tiles, int64_t k, int64_t depth) const {
    float* out = tiles + k * kTileRows;
    int64_t i = 0;
    for (; i + kTileRows <= height; i += kTileRows, out += kTileRows * depth) {
      __builtin_memcpy(out, row + i, sizeof(float) * kTileRows);
    }
    __builtin_memcpy(out, row + i, sizeof(float) * (height - i));
  }

  void add_up(const float* packed, int64_t depth, const Panel& panel, bool adds) const {
    Vector all[kTileVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      for (int j = 0; j < kTileVectors; ++j) {
        all[j] += *reinterpret_cast<const Vector*>(packed + k * kTileColumns + j * kLanes);
      }
    }
    for (int64_t j = 0; j < panel.columns; ++j) {
      float& sum = sums[panel.column + j];
      sum = (adds ? sum : 0) + all[j / kLanes][j % kLanes];
    }
  }
};

inline void learner_weights(const WeightGradients& g, int64_t begin, int64_t end, char* scratch) {
  const int64_t of_w1 = g.w1 || g.b1 ? panels_of(g.width) : 0, all = of_w1 + (g.w2 ? panels_of(g.outputs) : 0);
  const int32_t* const order = g.order + g.first;
  while (begin < end) {
    const int64_t n = begin / all, base = n * all, slab = n * g.width;
    const int64_t left = smaller(g.counts[n], g.last) - g.first, rows = left < 0 ? 0 : left;
    const bool second = begin - base >= of_w1, fresh = g.first == 0;
    const int64_t stop = smaller(end, base + (second ? all : of_w1));
    if (second) {
      const OuterProduct product{rows,    g.width, g.outputs,       fresh,     g.hidden.at(n, g.first), g.grad,
                                 nullptr, order,   g.hidden.stride, g.outputs, g.w2 + slab * g.outputs, nullptr};
      product.panels(begin - base - of_w1, stop - base - of_w1, scratch);
    } else {
      const OuterProduct product{rows,
                                 g.inputs,
                                 g.width,
                                 fresh,
                                 g.x,
                                 g.inner.at(n, g.first),
                                 order,
                                 nullptr,
                                 g.inputs,
                                 g.inner.stride,
                                 g.w1 ? g.w1 + slab * g.inputs : nullptr,
                                 g.b1 ? g.b1 + slab : nullptr};
      product.panels(begin - base, stop - base, scratch);
    }
    begin = stop;
  }
}

extern const GatedRoutingKernels gated_routing_kernels;

}  // namespace fastkd::FASTKD_ISA
