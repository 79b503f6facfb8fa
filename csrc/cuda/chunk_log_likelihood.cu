// chunk_log_likelihood on CUDA: the kernel that combines rows to chunks, arguments and launches.
//
// A text is invalid if its chunk ids lie outside [-1, chunks), do not ascend or are not contiguous, or if it scores a
// token outside the vocabulary. Its results are NaN with counts of 0. Its gradient is NaN in rows that score a token,
// except for chunks whose upstream gradients are 0.
#include <torch/csrc/stable/library.h>

#include "../arguments/chunk_log_likelihood_entry.h"
#include "chunk_log_likelihood.cuh"
#include "common/register.h"

namespace fastkd::cuda {
namespace {

constexpr int kTextThreads = 256;

// Packs the boundary set into bits, 16 columns per thread. Column 0 gets place BoundaryBits::first.
__global__ void __launch_bounds__(kFlatThreads)
    boundary_bits_kernel(unsigned char* set, int vocab, uint16_t* halves, int count) {
  const PackedRow<unsigned char> row(set, vocab);
  for (int i = int(blockIdx.x * blockDim.x + threadIdx.x); i < count; i += int(gridDim.x * blockDim.x)) {
    const Packed<unsigned char> pack = row.load<false>(i - BoundaryBits::kBefore / 16, 0);
    unsigned bits = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) bits |= unsigned(pack.item[j] != 0) << j;
    global_store(halves + i, uint16_t(bits));
  }
}

// The sum over the tokens of a chunk, or over some of them.
struct ChunkSum {
  double log_likelihood;
  int64_t tokens;

  __device__ __forceinline__ void add(const ChunkSum& next) {
    log_likelihood += next.log_likelihood;
    tokens += next.tokens;
  }
};

// Combines the rows of a text to its chunks. Each thread has a contiguous range of rows, and writes the chunks that
// begin in its range. The part of such a chunk that lies in later ranges is found in those threads' heads.
struct TextWorker {
  const ChunkArguments& arguments;
  const Team& team;
  ChunkSum* const heads;  // per thread: the sum over its first rows that continue the chunk before them
  int64_t* const tops;    // per thread: the largest chunk id
  const int64_t text, stretch;

  __device__ __forceinline__ void run() const {
    const bool valid = check();
    if (team.block_sum<true>(int(valid), [](int& all, int next) { all &= next; })) {
      write();
    } else {
      refuse();
    }
  }

 private:
  __device__ int64_t begin(int thread) const {
    const int64_t place = thread * stretch;
    return place < arguments.length ? place : arguments.length;
  }
  __device__ int64_t row(int64_t place) const { return text * arguments.length + place; }
  __device__ int64_t chunk(int64_t place) const { return arguments.chunk(row(place)); }
  __device__ int64_t chunk_before(int64_t place) const { return place > 0 ? chunk(place - 1) : -1; }
  __device__ ChunkSum sum_of(int64_t place) const { return {global_load(arguments.label_log_prob + row(place)), 1}; }

  // Whether this thread's range is valid: each chunk that begins in it has a larger id than all chunks before it.
  __device__ bool check() const {
    const int64_t first = begin(team.thread), end = begin(team.thread + 1);
    bool valid = true;
    int64_t before = chunk_before(first), top = -1, opening = -1;
    ChunkSum head{};
    for (int64_t place = first; place < end; ++place) {
      const int64_t id = chunk(place);
      valid = valid && id >= -1 && id < arguments.chunks && (id == -1 || arguments.token(row(place)) >= 0);
      if (id >= 0 && id != before) {
        valid = valid && id > top;
        opening = opening < 0 ? id : opening;
      } else if (id >= 0 && head.tokens == place - first) {
        head.add(sum_of(place));
      }
      top = id > top ? id : top;
      before = id;
    }
    shared_store(heads + team.thread, head);
    shared_store(tops + team.thread, top);
    team.sync();
    for (int i = 0; i < team.thread && opening >= 0; ++i) valid = valid && opening > shared_load(tops + i);
    return valid;
  }

  __device__ void write() const {
    const int64_t end = begin(team.thread + 1), to = text * arguments.chunks;
    int64_t place = begin(team.thread), before = chunk_before(place);
    while (place < end) {
      const int64_t id = chunk(place);
      if (id < 0 || id == before) {
        ++place;
      } else {
        ChunkSum sum{};
        for (; place < end && chunk(place) == id; ++place) sum.add(sum_of(place));
        if (place == end) add_heads(sum);
        global_store(arguments.log_likelihood + to + id, float(sum.log_likelihood));
        global_store(arguments.token_count + to + id, sum.tokens);
      }
      before = id;
    }
  }

  __device__ void add_heads(ChunkSum& sum) const {
    for (int i = team.thread + 1; i < team.threads; ++i) {
      const ChunkSum head = shared_load(heads + i);
      sum.add(head);
      if (head.tokens < begin(i + 1) - begin(i)) return;
    }
  }

  __device__ void refuse() const {
    for (int64_t i = team.thread; i < arguments.chunks; i += team.threads) {
      const int64_t at = text * arguments.chunks + i;
      global_store(arguments.log_likelihood + at, float(NAN));
      if (arguments.boundary.words != nullptr) global_store(arguments.boundary_log_prob + at, float(NAN));
    }
    for (int64_t place = team.thread; place < arguments.length; place += team.threads) {
      arguments.put_normalizer(row(place), false, {0, double(NAN)});
      arguments.put_normalizer(row(place), true, {0, double(NAN)});
    }
  }
};

__global__ void __launch_bounds__(kTextThreads, 1) chunk_text_kernel(const __grid_constant__ ChunkArguments arguments) {
  const Team team(shared_memory(), 1);
  ChunkSum* const heads = reinterpret_cast<ChunkSum*>(shared_memory() + Team::kSharedBytes);
  int64_t* const tops = reinterpret_cast<int64_t*>(heads + team.threads);
  const int64_t stretch = (arguments.length + team.threads - 1) / team.threads;
  for (int64_t text = blockIdx.x; text < arguments.batch; text += gridDim.x) {
    TextWorker{arguments, team, heads, tops, text, stretch}.run();
    team.sync();  // before the next text overwrites the shared memory
  }
}

void launch_texts(const Device& device, const ChunkArguments& arguments) {
  const int64_t warps = (arguments.length + kWarp - 1) / kWarp;
  const int threads = warps < kTextThreads / kWarp ? int(warps) * kWarp : kTextThreads;
  device.launch({"texts", "one block per text, one thread per token up to the limit"}, chunk_text_kernel,
                arguments.batch < kFlatBlocks ? arguments.batch : kFlatBlocks, threads,
                Team::kSharedBytes + threads * int64_t(sizeof(ChunkSum) + sizeof(int64_t)), 1, arguments);
}

// kernel_of: returns the kernel for a type of source.
template <class KernelOf>
void launch_rows(const char* role, const Device& device, const ChunkArguments& arguments, const KernelOf& kernel_of) {
  with_source<false>(source_kind(arguments), [&](auto source, int element_size) {
    using Source = typename decltype(source)::Type;
    RowLaunch launch = one_pass(row_launch(device.capability(), element_size, arguments.vocab, {0, Source::kPacked}));
    launch.cluster = 1;
    const bool by_warp = launch.warp_rows > 0;
    const int64_t block_rows = by_warp ? launch.warp_rows : 1;
    const int64_t blocks = (arguments.rows + block_rows - 1) / block_rows;
    // If there is a boundary set to copy to shared memory, each block takes several rows.
    const bool few = arguments.boundary.words != nullptr && blocks > kFlatBlocks;
    const int64_t used = few ? kFlatBlocks : teams_of(blocks, 1);
    launch.teams = used * block_rows;
    device.launch({role, launch}, kernel_of(source), used, launch.threads,
                  block_rows * (chunk_team_bytes(arguments.boundary, by_warp) + rows_bytes(launch, 1)), 1, arguments,
                  launch);
  });
}

// The arguments of forward and backward. A temporary tensor holds the boundary set's bits.
class ChunkCall {
 public:
  ChunkCall(const ChunkProblem& problem, const Tensor& numbers) : device(problem.student_tensor, kChunkLogLikelihood) {
    FASTKD_CHECK_TYPE(!problem.float64, kChunkLogLikelihood, "float64 logits are supported on the CPU only");
    FASTKD_CHECK_VALUE(problem.vocab < kMaxColumns, kChunkLogLikelihood,
                       "a vocabulary on CUDA must have fewer than 2^31 - 1024 columns, got ", problem.vocab);
    arguments.student = rows_of(problem, problem.student_tensor);
    arguments.ids = rows_of(problem, *problem.ids_tensor);
    arguments.chunk_ids = rows_of(problem, *problem.chunk_ids_tensor);
    arguments.rows = problem.rows;
    arguments.vocab = arguments.student_width = int(problem.vocab);
    arguments.temperature = problem.options.temperature;
    arguments.to_base_2 = kLog2E / problem.options.temperature;
    arguments.length = problem.length;
    arguments.batch = problem.batch;
    arguments.chunks = problem.chunks;
    arguments.numbers = static_cast<double*>(numbers.data_ptr());
    if (problem.boundary != nullptr) pack_boundary(problem);
  }

  Device device;
  ChunkArguments arguments{};

  static DeviceRows rows_of(const ChunkProblem& problem, const Tensor& x) {
    return device_rows(x, problem.leading, kChunkLogLikelihood);
  }

 private:
  void pack_boundary(const ChunkProblem& problem) {
    const int64_t bytes = BoundaryBits::bytes_for(problem.vocab), halves = bytes / 2;
    bits_ = torch::stable::new_empty(problem.student_tensor, {bytes}, ScalarType::Byte);
    arguments.boundary = {static_cast<const unsigned*>(bits_->data_ptr()), int(bytes),
                          BoundaryBits::kBefore + int(reinterpret_cast<uintptr_t>(problem.boundary) % 16),
                          bytes <= half_limit(device.capability()) - chunk_overhead(false)};
    const int64_t blocks = (halves + kFlatThreads - 1) / kFlatThreads;
    device.launch({"boundary set", "one thread for 16 ids"}, boundary_bits_kernel,
                  blocks < kFlatBlocks ? blocks : kFlatBlocks, kFlatThreads, 0, 1,
                  reinterpret_cast<unsigned char*>(const_cast<bool*>(problem.boundary)), int(problem.vocab),
                  static_cast<uint16_t*>(bits_->data_ptr()), int(halves));
  }

  std::optional<Tensor> bits_;
};

struct Cuda {
  static constexpr bool kValuesChecked = false;

  static void solve(const ChunkProblem& problem, ChunkOutput& out) {
    ChunkCall call(problem, out.numbers);
    if (problem.rows == 0) return;
    const Tensor label_log_prob = torch::stable::new_empty(problem.student_tensor, {problem.rows}, ScalarType::Double);
    ChunkArguments& a = call.arguments;
    a.label_log_prob = static_cast<double*>(label_log_prob.data_ptr());
    a.log_likelihood = static_cast<float*>(out.log_likelihood.data_ptr());
    a.boundary_log_prob = static_cast<float*>(out.boundary_log_prob.data_ptr());
    a.token_count = static_cast<int64_t*>(out.token_count.data_ptr());
    launch_rows("rows", call.device, a,
                [](auto source) { return chunk_log_likelihood_kernel<typename decltype(source)::Type>; });
    launch_texts(call.device, a);
  }

  static void differentiate(const ChunkProblem& problem, const Tensor& gradient, const Tensor& numbers,
                            const Tensor& likelihood_gradient, const Tensor* boundary_gradient) {
    ChunkCall call(problem, numbers);
    ChunkArguments& a = call.arguments;
    a.student_gradient = ChunkCall::rows_of(problem, gradient);
    a.likelihood_gradient = static_cast<const float*>(likelihood_gradient.data_ptr());
    if (boundary_gradient != nullptr) {
      a.boundary_gradient = static_cast<const float*>(boundary_gradient->data_ptr());
    }
    launch_rows("gradient", call.device, a,
                [](auto source) { return chunk_gradient_kernel<typename decltype(source)::Type>; });
  }
};

}  // namespace

FASTKD_IMPL(m) { implement_differentiable<ChunkLogLikelihood, ChunkLogLikelihoodBackward, Cuda>(m); }

}  // namespace fastkd::cuda
