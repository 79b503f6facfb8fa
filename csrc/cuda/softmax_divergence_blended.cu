// softmax_divergence's reverse KL from a mixture of two teachers' logits (fixed weights, contrast or share), where all
// three rows stay in shared memory: three reads and one write. The mixture overwrites the teachers' logits there, in
// float32. From then on the row is that of a single teacher.
#include "softmax_divergence.cuh"
#include "softmax_divergence_launch.h"

namespace fastkd::cuda {
namespace {

using Rows = PackedSource<Mixed>;  // any dtypes
using Blended = portable::ReverseKl;

// A teacher's part of the mixture: weight (logit - origin), and nothing where the weight is 0.
struct Part {
  float weight, origin;

  static __device__ __forceinline__ Part from(double weight, float origin) {
    return {float(weight), origin == -INFINITY ? 0 : origin};
  }
  // weight (logit - origin). Sets gone if a logit of nonzero weight is impossible: the token's probability is then 0.
  __device__ __forceinline__ float of(float logit, bool& gone) const {
    const float x = logit - origin;
    const bool dead = x < float(-kDead);
    if (weight == 0) return 0;
    gone = gone || dead;
    return dead ? 0 : weight * x;
  }
};

// What the leading thread stores for the others: whether the row is read; then the parts that the teachers have.
struct Mixture {
  int read;
  Part first, second;
};

// Writes the mixture over the first teacher's logits in shared memory. Each thread does so in the packs that it reads.
__device__ __forceinline__ void blend(const Rows& teachers, const Team& team, const Mixture& mixture) {
  for (int pack = team.thread; pack < teachers.packs(); pack += team.threads) {
    const Rows::Raw raw = teachers.read(pack);
    uint4 out;
#pragma unroll
    for (int j = 0; j < Rows::kSize; ++j) {
      bool gone = false;
      const float first = mixture.first.of(Rows::student_of(raw, j), gone);
      const float mixed = first + mixture.second.of(Rows::teacher_of(raw, j), gone);
      set_word(out, j, bit_cast<unsigned>(gone ? mixed + -INFINITY : mixed));
    }
    shared_store(teachers.student_slots + pack, out);
  }
}

// A mixed pack takes a 16-byte slot of the first teacher. Two 16-bit teachers' packs, 8 bytes each, share that slot;
// otherwise the second teacher has slots of its own.
__host__ __device__ inline bool share_slots(const RowArguments& a) {
  return a.teachers[0].element_size == 2 && a.teachers[1].element_size == 2;
}
__host__ __device__ inline int64_t blended_bytes(const RowArguments& a, const RowLaunch& launch) {
  return team_bytes(launch.warp_rows > 0) + rows_bytes(launch, share_slots(a) ? 2 : 3);
}

__global__ void __launch_bounds__(2 * kRowThreads, 1)
    softmax_divergence_blended_kernel(const __grid_constant__ RowArguments arguments, const RowLaunch launch) {
  const bool by_warp = launch.warp_rows > 0;
  unsigned char* const shared = team_memory(launch, blended_bytes(arguments, launch));
  const Team team(shared + kParametersBytes + kPlanBytes + kTeachersBytes, unsigned(launch.cluster), by_warp);
  const RowWorker<portable::Tvd, Rows> meter(arguments, team, shared);
  const RowWorker<Blended, Rows> worker(arguments, team, shared);
  Mixture& mixture = *reinterpret_cast<Mixture*>(shared + kParametersBytes + kPlanBytes);
  static_assert(sizeof(Mixture) <= kTeachersBytes);
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    const Rows rows(arguments, row, launch, team.rank, nullptr, shared + team_bytes(by_warp));
    if (team.leads()) shared_store(&mixture.read, int(arguments.scale(row) != 0));
    team.sync();
    if (shared_load(&mixture.read)) {
      uint4* const second_slots = share_slots(arguments)
                                      ? reinterpret_cast<uint4*>(reinterpret_cast<uint2*>(rows.teacher_slots) + 1)
                                      : rows.teacher_slots + rows.all_slots;
      const Rows teachers(rows, rows.teacher, rows.teacher_slots,
                          Rows::Packs(arguments.teachers[1], arguments.teacher_row(row)), second_slots);
      rows.student_alone().start(team);
      teachers.start(team);
      RowParameters<float> measured;
      const double distance = meter.measure(teachers, measured);
      teachers.finish_copies(team);
      if (team.leads()) {
        if (arguments.distances != nullptr) global_store(arguments.distances + row, distance);
        shared_store(&mixture.first, Part::from(arguments.teacher_weight(row, 0), measured.at.student_origin));
        shared_store(&mixture.second, Part::from(arguments.teacher_weight(row, 1), measured.at.teacher_origin));
      }
      team.sync();
      blend(teachers, team, shared_load(&mixture));
    }
    const Rows blended(rows, rows.student, rows.student_slots, Rows::Packs::in_shared_memory(), rows.teacher_slots);
    const RowParameters<float> parameters = worker.open(row, blended);
    if (parameters.read) worker.finish(row, blended, parameters);
  });
}

// Whether packs of four can be read and written in all rows.
bool packed(const RowArguments& a) {
  const auto moves = [&](const DeviceRows& x, bool any_row) {
    return !x || moves_like(x, a.student, Rows::kSize, any_row);
  };
  const bool any_row = bool(a.teacher_places);
  return moves(a.student, false) && moves(a.teachers[0], any_row) && moves(a.teachers[1], any_row) &&
         moves(a.student_gradient, false);
}

}  // namespace

bool launch_blended(int divergence, const Device& device, const RowArguments& a) {
  if (divergence != portable::place_in<Blended>(portable::Divergences{}) || a.teacher_count != 2 || a.mix_probs ||
      a.student_map || a.teacher_map || a.teacher_gradient || !packed(a)) {
    return false;
  }
  const RowNeeds needs{team_bytes(false), /*packed=*/true, share_slots(a) ? 2 : 3};
  const auto bytes = [&](const RowLaunch& launch) { return blended_bytes(a, launch); };
  const RowLaunch launch =
      teams_launch(device, softmax_divergence_blended_kernel, a.vocab, sizeof(float), needs, bytes, "rows");
  if (!launch.resident) return false;
  launch_teams(device, softmax_divergence_blended_kernel, a, launch, bytes(launch), "rows");
  return true;
}

}  // namespace fastkd::cuda
