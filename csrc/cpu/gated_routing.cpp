// Gated routing on the CPU: distributes the work on the tensors to threads.
//
// Many rows: each thread gets some of the rows, with about the same total of learners to run. Few rows: reading the
// weights is the main cost, and each thread gets some of the columns. Both ways give bit-identical results.
#include "gated_routing.h"

#include <torch/csrc/stable/library.h>

#include "../arguments/gated_routing_entry.h"
#include "common/parallel.h"
#include "isa.h"

namespace fastkd {
namespace {

// The number of rows per thread from which on it is worth that every thread reads all weights.
constexpr int64_t kRowsForAll = 84;
// Threads' shares of the rows are multiples of this: whole tiles.
constexpr int64_t kRowStep = 14;

float* floats(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

int64_t panels_of(int64_t columns) {
  const int64_t at_once = kernels().gated_routing.tile_columns;
  return (columns + at_once - 1) / at_once;
}

// How many rows fit into an L2 cache of 2 MiB beside a panel. Where caches are smaller, the rows are read from the L3
// in sequence.
int64_t rows_of_block(int64_t inputs, int64_t width) {
  const int64_t rows = (int64_t(3) << 17) / (padded(inputs) + padded(width)) / kRowStep * kRowStep;
  return rows < 2 * kRowStep ? 2 * kRowStep : rows > 16 * kRowStep ? 16 * kRowStep : rows;
}

// Divides [first, last) into one part per thread, with costs (differences of cost_before) as equal as possible, and
// calls run(begin, end, scratch) on each.
template <class CostBefore, class Run>
void share_out(int64_t first, int64_t last, int64_t step, int64_t scratch, const CostBefore& cost_before,
               const Run& run) {
  if (first >= last) return;
  const int64_t threads = torch::stable::get_num_threads();
  const double start = cost_before(first), all = cost_before(last) - start;
  const auto boundary = [&](int64_t thread) {
    int64_t low = 0, high = (last - first + step - 1) / step;
    while (low < high && thread < threads) {
      const int64_t middle = (low + high) / 2;
      if ((cost_before(first + middle * step) - start) * threads < all * thread) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return first + high * step < last ? first + high * step : last;
  };
  torch::stable::parallel_for(0, threads, 1, [&](int64_t from, int64_t to) {
    for (int64_t thread = from; thread < to; ++thread) {
      const int64_t begin = boundary(thread), end = boundary(thread + 1);
      if (begin < end) run(begin, end, Scratch::of_thread(scratch));
    }
  });
}

bool share_rows(const Learners& l) {
  return l.counts[0] >= torch::stable::get_num_threads() * kRowsForAll || l.counts[0] == 0;
}

// A pass over the sorted rows [first, last) in which each thread processes some of the rows.
void pass_by_rows(Learners& l, int64_t first, int64_t last) {
  const GatedRoutingKernels& kernel = kernels().gated_routing;
  l.block = rows_of_block(l.inputs, l.width);
  // The cost of a row besides its learners: copying it. The cost of a block: fetching the learners' weights.
  const auto cost_before = [&](int64_t row) {
    double all = row / 8.0;
    for (int64_t n = 0; n < l.learners; ++n) {
      const int64_t rows = row < l.counts[n] ? row : l.counts[n];
      all += rows + 16.0 * ((rows + l.block - 1) / l.block);
    }
    return all;
  };
  share_out(first, last, kRowStep, kernel.scratch(l), cost_before,
            [&](int64_t begin, int64_t end, char* scratch) { kernel.rows(l, begin, end, scratch); });
}

// Transposes the weights of the learners that have rows, once for all blocks of rows.
void pack_weights(const Learners& l) {
  const int64_t panels = panels_of(l.width) + (l.out ? panels_of(l.outputs) : 0);
  share_out(
      0, l.running() * panels, 1, 0, [](int64_t panel) { return double(panel); },
      [&](int64_t begin, int64_t end, char*) { kernels().gated_routing.pack(l, begin, end); });
}

// A pass over all rows in which each thread processes some of the columns, first of the first product, then of the
// second.
void pass_by_columns(Learners& l, int64_t rows) {
  const GatedRoutingKernels& kernel = kernels().gated_routing;
  const int64_t chosen = l.counts[0];
  const auto cost_before = [&](int64_t panel) { return double(panel); };
  thread_local Scratch scratch;
  const int64_t of_gathered = chosen * padded(l.inputs), of_hidden = l.learners * chosen * padded(l.width);
  float* const memory =
      reinterpret_cast<float*>(scratch.at_least((of_gathered + (l.backward ? 0 : of_hidden)) * int64_t(sizeof(float))));
  l.gathered = {memory, 0, chosen, padded(l.inputs), nullptr};
  if (!l.backward) l.hidden = {memory + of_gathered, 0, chosen, padded(l.width), nullptr};
  for (int64_t i = 0; i < chosen; ++i) {
    __builtin_memcpy(l.gathered.at(0, i), l.in + l.order[i] * l.inputs, sizeof(float) * l.inputs);
  }
  l.block = chosen;
  share_out(0, l.running() * panels_of(l.width), 1, kernel.scratch(l), cost_before,
            [&](int64_t begin, int64_t end, char* scratch) { kernel.first(l, begin, end, scratch); });
  if (l.out == nullptr) return;
  share_out(0, panels_of(l.outputs), 1, kernel.scratch(l), cost_before,
            [&](int64_t begin, int64_t end, char* scratch) { kernel.second(l, begin, end, scratch); });
  l.gathered = {};
  pass_by_rows(l, chosen, rows);  // the rows that run no learner
}

SortedRows pre_activation_rows(const Tensor& pre_activations, const AcmOperands& operands,
                               std::vector<int64_t>& starts) {
  const AcmSizes& sizes = operands.sizes;
  SortedRows rows{floats(pre_activations), 0, sizes.rows, sizes.width, nullptr};
  if (pre_activations.size(0) == sizes.learners && pre_activations.size(1) == sizes.rows) return rows;
  starts.assign(sizes.learners, 0);
  for (int64_t n = 1; n < sizes.learners; ++n) {
    starts[n] = starts[n - 1] + static_cast<const int32_t*>(operands.counts.data_ptr())[n - 1];
  }
  rows.starts = starts.data();
  return rows;
}

Learners learners_of(const AcmOperands& operands, bool backward, const Tensor& in) {
  const AcmSizes& sizes = operands.sizes;
  Learners l{};
  l.learners = sizes.learners;
  l.inputs = backward ? sizes.outputs : sizes.inputs;
  l.width = sizes.width;
  l.outputs = backward ? sizes.inputs : sizes.outputs;
  l.activation = operands.activation;
  l.backward = backward;
  l.in = floats(in);
  l.w1 = floats(operands.w1);
  l.b1 = floats(operands.b1);
  l.w2 = floats(operands.w2);
  l.order = static_cast<const int32_t*>(operands.order.data_ptr());
  l.counts = static_cast<const int32_t*>(operands.counts.data_ptr());
  return l;
}

struct Cpu {
  static void solve(const AcmRouteCall& call) {
    const int64_t rows = call.choices.numel(), learners = call.learners;
    const Rows choices(call.choices, call.choices.dim());
    int32_t* const order = static_cast<int32_t*>(call.order.data_ptr());
    int32_t* const counts = static_cast<int32_t*>(call.counts.data_ptr());
    // of_choice[k]: first the number of rows that choose k, then the place of the next such row.
    std::vector<int32_t> of_choice(learners + 1, 0);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t choice = choices.integer(row);
      FASTKD_CHECK_INDEX(choice >= 0 && choice <= learners, kAcm, "choices must lie in [0, N = ", learners, "], got ",
                         choice);
      ++of_choice[choice];
    }
    int32_t before = 0;
    for (int64_t choice = learners; choice >= 0; --choice) {
      const int32_t here = of_choice[choice];
      of_choice[choice] = before;
      before += here;
      if (choice > 0) counts[choice - 1] = before;
    }
    counts[learners] = before;
    for (int64_t row = 0; row < rows; ++row) order[of_choice[choices.integer(row)]++] = int32_t(row);
  }

  static void solve(const AcmRowsCall& call) {
    check(call.operands);
    const AcmSizes& sizes = call.operands.sizes;
    Learners l = learners_of(call.operands, false, call.operands.x);
    l.out = floats(call.out);
    if (call.bias) {
      l.bias = floats(*call.bias);
      l.bias_stride = call.bias->dim() == 1 ? 0 : sizes.outputs;
    }
    std::vector<int64_t> starts;
    if (call.pre_activations) l.pre_activations = pre_activation_rows(*call.pre_activations, call.operands, starts);
    share_rows(l) ? pass_by_rows(l, 0, sizes.rows) : pass_by_columns(l, sizes.rows);
  }

  static void solve(const AcmGradientCall& call) {
    check(call.operands);
    const AcmSizes& sizes = call.operands.sizes;
    Learners l = learners_of(call.operands, true, call.grad);
    const int64_t chosen = l.counts[0], rows = call.x ? sizes.rows : chosen;
    std::vector<int64_t> starts;
    l.pre_activations = pre_activation_rows(call.pre_activations, call.operands, starts);
    l.out = call.x ? floats(*call.x) : nullptr;
    const bool by_rows = share_rows(l);
    // When divided by rows, two blocks per thread are processed at a time, so that their hidden rows are still in a
    // cache when the weights' gradients read them. The parts are whole chunks, so that sums over rows are the same for
    // any number of threads.
    const int64_t blocks = 2 * torch::stable::get_num_threads() * rows_of_block(l.inputs, l.width);
    const int64_t part = by_rows ? (blocks + kChunkRows - 1) / kChunkRows * kChunkRows : chosen;
    const int64_t held = part < chosen ? part : chosen, stride = padded(sizes.width);
    const int64_t of_rows = sizes.learners * held * stride,
                  of_packed = by_rows ? kernels().gated_routing.packed_floats(l) : 0;
    const WorkingMemory memory((of_packed + (call.w2 ? 2 : 1) * of_rows) * int64_t(sizeof(float)));
    float* data = reinterpret_cast<float*>(memory.data());
    l.inner = {data, 0, held, stride, nullptr};
    if (call.w2) l.hidden = {data += of_rows, 0, held, stride, nullptr};
    if (by_rows) {
      l.packed = data + of_rows;
      pack_weights(l);
    }
    int64_t first = 0;
    do {
      const int64_t last = first + part < chosen ? first + part : chosen;
      l.hidden.first = l.inner.first = first;
      by_rows ? pass_by_rows(l, first, last) : pass_by_columns(l, last);
      weights(call, l, first, last);
      first = last;
    } while (first < chosen);
    pass_by_rows(l, chosen, rows);
  }

 private:
  static void check(const AcmOperands& operands) {
    FASTKD_CHECK_TYPE(operands.x.scalar_type() == ScalarType::Float, kAcm, "x must be float32, got ",
                      torch::headeronly::toString(operands.x.scalar_type()));
    const int64_t rows = operands.sizes.rows;
    const int32_t* const order = static_cast<const int32_t*>(operands.order.data_ptr());
    const int32_t* const counts = static_cast<const int32_t*>(operands.counts.data_ptr());
    for (int64_t i = 0; i < rows; ++i) {
      FASTKD_CHECK_INDEX(order[i] >= 0 && order[i] < rows, kAcm, "order must lie in [0, rows = ", rows, "), got ",
                         order[i]);
    }
    for (int64_t n = 0, most = rows; n < operands.sizes.learners; most = counts[n++]) {
      FASTKD_CHECK_VALUE(counts[n] >= 0 && counts[n] <= most, kAcm, "counts must fall from at most rows = ", rows,
                         ", got ", counts[n], " after ", most);
    }
  }

  static void weights(const AcmGradientCall& call, const Learners& l, int64_t first, int64_t last) {
    const GatedRoutingKernels& kernel = kernels().gated_routing;
    const AcmSizes& sizes = call.operands.sizes;
    const auto of = [](const std::optional<Tensor>& gradient) { return gradient ? floats(*gradient) : nullptr; };
    const WeightGradients g{first,
                            last,
                            sizes.learners,
                            sizes.inputs,
                            sizes.width,
                            sizes.outputs,
                            floats(call.operands.x),
                            floats(call.grad),
                            l.order,
                            l.counts,
                            l.hidden,
                            l.inner,
                            of(call.w1),
                            of(call.b1),
                            of(call.w2)};
    const int64_t all = (call.w1 || call.b1 ? panels_of(sizes.width) : 0) + (call.w2 ? panels_of(sizes.outputs) : 0);
    const auto cost_before = [&](int64_t panel) {
      double sum = 0;
      for (int64_t n = 0; n < sizes.learners && n * all < panel; ++n) {
        const int64_t rows = (l.counts[n] < last ? l.counts[n] : last) - first;
        // Gradients of learners without rows are still written once, with zeros.
        const double cost = rows > 0 ? rows + 8.0 : first == 0 ? 8.0 : 0.0;
        sum += cost * (panel - n * all < all ? panel - n * all : all);
      }
      return sum;
    };
    share_out(0, sizes.learners * all, 1, kernel.weights_scratch(g), cost_before,
              [&](int64_t begin, int64_t end, char* scratch) { kernel.weights(g, begin, end, scratch); });
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("_acm_route", TORCH_BOX(&acm_route<Cpu>));
  m.impl("_acm_value", TORCH_BOX(&acm_value<Cpu>));
  m.impl("_acm_rows", TORCH_BOX((&acm_rows<Cpu, true>)));
  m.impl("_acm_rows_backward", TORCH_BOX((&acm_rows_backward<Cpu, true>)));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("_release_memory", TORCH_BOX(&WorkingMemory::release));
}

}  // namespace fastkd
