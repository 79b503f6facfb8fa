// softmax_divergence on the GPU: a row's loss and gradients in one launch.
//
// Memory: where a row's two logit tensors fit into the shared memory of a block, or of a cluster of blocks (sm_90 and
// later), they are read once, and every further pass reads shared memory: two reads and one write in all, whatever the
// divergence. Longer rows are read again by each pass. The direction alternates from pass to pass, since the part read
// last is still in the L2. A row of a few KiB is processed by one warp.
//
// RowPlan determines the passes. The team's leading thread runs it and publishes the results to the other threads.
#pragma once
#include "softmax_divergence_leader.cuh"

namespace fastkd::cuda {

template <class Divergence, class Source>
struct RowWorker {
  using Real = typename Source::Real;
  static constexpr int kSize = Source::kSize;
  static constexpr bool kExcludes = Divergence::kExcludesLabel;

  static_assert(sizeof(RowParameters<Real>) <= kParametersBytes && sizeof(RowLeader<Real, Divergence>) <= kPlanBytes);

  const RowArguments& arguments;
  const Team& team;
  RowParameters<Real>* shared_parameters;
  RowLeader<Real, Divergence>& leader;

  __device__ RowWorker(const RowArguments& a, const Team& t, unsigned char* shared)
      : arguments(a),
        team(t),
        shared_parameters(reinterpret_cast<RowParameters<Real>*>(shared)),
        leader(*reinterpret_cast<RowLeader<Real, Divergence>*>(shared + kParametersBytes)) {
    if (team.leads()) leader.kept = false;
  }

  __device__ __forceinline__ void run(int64_t row, Source& source) const {
    const bool at_once = arguments.count_all();
    if (at_once) source.start(team);
    const RowParameters<Real> parameters = open(row, source, at_once);
    if (!parameters.read) return;
    if (!at_once) source.start(team);
    source.normalize_teachers(team, parameters.teacher_temperature);
    finish(row, source, parameters);
  }

  // Reads the row's options before its logits. If the row is not read (mask, weight 0), its results are zeros and
  // parameters.read is false.
  // started: the source's copies have been, although it may turn out that all gradients are multiplied by 0.
  __device__ RowParameters<Real> open(int64_t row, const Source& source, bool started = false) const {
    if (team.leads()) {
      leader.weight = arguments.row_weight(row);
      const double scale = arguments.scale_of(leader.weight);
      if (scale != 0) {
        const int label = read_task(row, scale);
        shared_store(&shared_parameters->label, label);
        // Read now, since writing the gradient may overwrite it.
        leader.label.student = label >= 0 ? double(source.student_logit(label)) : 0;
      } else if (team.rank == 0) {
        global_store(arguments.losses + row, 0.0);
      }
      shared_store(&shared_parameters->read, scale != 0);
    }
    team.sync();
    if (shared_load(&shared_parameters->read)) return shared_load(shared_parameters);
    if (started) {
      source.finish_copies(team);
      team.sync();  // the zeros may overwrite what another thread copies
    }
    source.write_zeros(team);
    return RowParameters<Real>{};
  }

  // Computes the value and the gradients. The source's copies to shared memory must have been started.
  __device__ void finish(int64_t row, const Source& source, const RowParameters<Real>& opened) const {
    bool backwards = true;
    const RowParameters<Real> parameters = sum(source, opened, backwards);
    if (team.leads() && team.rank == 0) {
      const double loss = leader.plan.loss(leader.task, leader.label.student);
      global_store(arguments.losses + row, leader.weight * loss);
    }
    if (parameters.student_gradient || parameters.teacher_gradient) {
      if (parameters.near) {
        write<true>(source, parameters, backwards);
      } else {
        write<false>(source, parameters, backwards);
      }
      zero_beyond_vocab(arguments, row, team);
    }
  }

  // The divergence of the source's two rows at temperature 1, without label and gradient; valid in leading threads.
  // The parameters have the rows' origins.
  __device__ double measure(const Source& source, RowParameters<Real>& parameters) const {
    if (team.leads()) {
      leader.task = RowTask{};
      leader.task.temperature = leader.task.teacher_temperature = leader.task.divergence_scale = 1;
      leader.kept = false;
      leader.open(shared_parameters);
      shared_store(&shared_parameters->label, -1);
      shared_store(&shared_parameters->read, true);
    }
    team.sync();
    bool backwards = true;
    parameters = sum(source, shared_load(shared_parameters), backwards);
    return team.leads() ? leader.plan.loss(leader.task, 0) : 0;
  }

 private:
  // The task of a row that is read, and what it determines. Returns the label's column, or -1. A task that is the last
  // row's is not made again.
  __device__ __forceinline__ int read_task(int64_t row, double scale) const {
    int label = arguments.label_column(row);
    const bool keep = arguments.alike() && (label >= 0 || !arguments.labels);
    if (!(keep && leader.kept && leader.task.scale == scale)) {
      label = arguments.read_task(row, scale, leader.task);
      if (leader.task.label_weight == 0) leader.task.has_label = false;
      leader.open(shared_parameters);
      leader.kept = keep;
    }
    return kExcludes || leader.task.has_label ? label : -1;
  }

  // All passes before the gradients are written. Returns the parameters for writing them.
  __device__ RowParameters<Real> sum(const Source& source, RowParameters<Real> parameters, bool& backwards) const {
    const RowState<double> state = first_pass<Divergence::kPass, kExcludes>(source, team, parameters);
    const RowLses lses = lses_of(state);
    parameters = after_leader([&] {
      if constexpr (kExcludes) leader.label.teacher = source.teacher_logit(parameters.label);
      leader.state = state;
      leader.lses = lses;
      leader.begin(shared_parameters);
    });
    while (parameters.step != Step::kWrite) {
      const Sums sums = parameters.step == Step::kSumNear ? sum_terms<true>(source, parameters, backwards)
                                                          : sum_terms<false>(source, parameters, backwards);
      backwards = !backwards;
      parameters = after_leader([&] {
        leader.sums = sums;
        leader.add(shared_parameters);
      });
    }
    return parameters;
  }

  // Both logarithms at once, in two lanes of the first warp. Valid in the leading thread.
  __device__ __forceinline__ RowLses lses_of(const RowState<double>& state) const {
    if (team.thread >= kWarp) return {};
    const bool odd = team.thread % 2 != 0;
    const OriginSum<double> side = chosen(odd, state.teacher, state.student);
    const double mine = side.log2();
    return {mine, shuffle_xor(mine, 1)};
  }

  // What the leading thread publishes in `body`.
  template <class Body>
  __device__ __forceinline__ RowParameters<Real> after_leader(const Body& body) const {
    team.sync();
    if (team.leads()) body();
    team.sync();
    return shared_load(shared_parameters);
  }

  template <bool kNear>
  __device__ Sums sum_terms(const Source& source, const RowParameters<Real>& parameters, bool backwards) const {
    if constexpr (kQuick && !kNear) {
      if (quick(parameters)) return sum_quickly(source, parameters, backwards);
    }
    ThreadSums<kNear, Divergence, Real> mine;
    for_packs<false>(source, team, backwards, [&](int pack, const typename Source::Raw& raw) {
      add_terms(mine, without_label<kExcludes>(source, pack, raw, parameters.label), parameters);
    });
    return team.sum(mine.whole(), [](Sums& all, const Sums& next) { all.add(next); });
  }

  // A few entries are processed at a time: the logarithms of a whole pack would need too many registers.
  template <bool kNear>
  static __device__ __forceinline__ void add_terms(ThreadSums<kNear, Divergence, Real>& sums, typename Source::Raw raw,
                                                   const RowParameters<Real>& parameters) {
    const Divergence divergence{parameters.beta, parameters.alpha};
#pragma unroll 1
    for (int words = kSize / Source::kWord; words > 0; --words, Source::next_word(raw)) {
#pragma unroll
      for (int j = 0; j < Source::kWord; ++j) {
        const Outcome<Real> o =
            parameters.at.template outcome<kNear>(Source::student_of(raw, j), Source::teacher_of(raw, j));
        sums.add(divergence, o, parameters.teacher_gradient);
      }
    }
  }

  static constexpr double kSteepest = 4;  // temperatures of 0.36 and more

  // Whether the terms and the student's gradient have a short formula (quick_terms.h).
  static constexpr bool kQuick = Source::kPacked && Quick<Divergence>::kExists;
  static __device__ __forceinline__ bool quick(const RowParameters<Real>& parameters) {
    return !parameters.teacher_gradient && has_short_formula(parameters);
  }
  static __device__ __forceinline__ bool has_short_formula(const RowParameters<Real>& parameters) {
    // Of steep softmaxes, differences of logarithms have too few digits left.
    const bool steep = at_least(parameters.student_scale, parameters.teacher_scale) > Real(kSteepest);
    if (Quick<Divergence>::kPairs && !(at_most(parameters.beta, 1 - parameters.beta) > kLeastWeight)) return false;
    return parameters.student_shift.usable && parameters.teacher_shift.usable && !(Quick<Divergence>::kFinite && steep);
  }

  // Packs in these ranges have finite log-ratios.
  template <class Item>
  static __device__ __forceinline__ void set_finite(PackRange<Item>& u, PackRange<Item>& w,
                                                    const RowParameters<Real>& parameters) {
    const Real far = Real(kFarLogit);
    u.set(parameters.at.student_origin - far, Real(INFINITY));
    w.set(parameters.at.teacher_origin - far / at_least(Real(1), parameters.teacher_ratio), Real(INFINITY));
  }

  // Terms of a pack's entries. Both logarithms, and so both probabilities, lack student_shift's unit.
  struct QuickPack {
    using Item = typename Source::Item;
    const RowParameters<Real>& parameters;
    Quick<Divergence> divergence;
    const Real rest;
    PackRange<Item> u_range, w_range;

    __device__ __forceinline__ explicit QuickPack(const RowParameters<Real>& p)
        : parameters(p), divergence(p.beta), rest(p.student_shift.rest - p.teacher_shift.rest) {
      if constexpr (Quick<Divergence>::kBinary) divergence.p_unit = exp2_of(rest);
      if constexpr (Quick<Divergence>::kFinite) {
        set_finite(u_range, w_range, p);
      } else {
        u_range.set((p.student_shift.shift + Real(kLeastLog2)) / p.student_scale, Real(INFINITY));
        w_range.set((p.teacher_shift.shift + Real(kLeastLog2)) / p.teacher_scale, Real(INFINITY));
      }
    }
    __device__ __forceinline__ bool takes(const typename Source::Raw& raw) const {
      return !Quick<Divergence>::kFinite || (u_range.above(raw.student) && w_range.above(raw.teacher));
    }
    __device__ __forceinline__ typename Source::Raw raised(const typename Source::Raw& raw) const {
      if (!Quick<Divergence>::kLogs) return raw;
      return {u_range.raised(raw.student), w_range.raised(raw.teacher)};
    }
    // Of entries j and j + 1.
    template <QuickUse kUse>
    __device__ __forceinline__ QuickPairTerms<Real> terms(const typename Source::Raw& raw, int j) const {
      return pair_terms<kUse>(divergence, student_log(raw, j), teacher_log(raw, j), student_log(raw, j + 1),
                              teacher_log(raw, j + 1));
    }

   private:
    __device__ __forceinline__ Real student_log(const typename Source::Raw& raw, int j) const {
      return fused(Source::student_of(raw, j), parameters.student_scale, -parameters.student_shift.shift);
    }
    __device__ __forceinline__ Real teacher_log(const typename Source::Raw& raw, int j) const {
      const Real log = fused(Source::teacher_of(raw, j), parameters.teacher_scale, -parameters.teacher_shift.shift);
      return Quick<Divergence>::kBinary ? log : log + rest;
    }
  };

  __device__ Sums sum_quickly(const Source& source, const RowParameters<Real>& parameters, bool backwards) const {
    const QuickPack pack(parameters);
    Real f = 0, qg = 0, q = 0, apart = 0;
    const auto fast = [&](int, const typename Source::Raw& any) {
      if (!pack.takes(any)) return false;
      const typename Source::Raw raw = pack.raised(any);
      const auto add = [&](const QuickTerms<Real>& t) {
        f = fused(t.x, t.y, f);
        qg = fused(t.q, t.g, qg);
        q += t.q;
        if constexpr (Quick<Divergence>::kFinite) apart += t.q - t.x;
      };
#pragma unroll
      for (int j = 0; j < kSize; j += 2) {
        const QuickPairTerms<Real> t = pack.template terms<QuickUse::kSums>(raw, j);
        add(t.first);
        add(t.second);
      }
      return true;
    };
    Sums mine{};  // of packs that the short formula does not take
    RowPass<false, Source> pass(source, team, backwards);
    if constexpr (Quick<Divergence>::kFinite) {
      ThreadSums<false, Divergence, Real> sums;
      for_packs(pass, fast, [&](int, const typename Source::Raw& raw) { add_terms(sums, raw, parameters); });
      mine = sums.whole();
    } else {
      for_packs(pass, fast);
    }
    const QuickScales<double> scales = pack.divergence.scales();
    const double unit = parameters.student_shift.unit;
    const LaneSums<3> all = team.sum(LaneSums<3>{
        {mine.f + unit * (scales.f * double(f) + scales.f_from_g * double(qg) + scales.f_apart * double(apart)),
         mine.qg + unit * (scales.g * double(qg) + scales.g_offset * double(q)), mine.q + unit * double(q)}});
    return {all.each[0], all.each[1], 0, all.each[2], 0, 0};
  }

  template <bool kNear>
  __device__ void write(const Source& source, const RowParameters<Real>& parameters, bool backwards) const {
    const Divergence divergence{parameters.beta, parameters.alpha};
    const auto& gradients = source.gradients();
    // The parameters are loaded again for each pack that needs them all, to leave the registers to the fast loop.
    const auto write_teacher = [&](int pack, const typename Source::Raw& raw) {
      const RowParameters<Real> all = shared_load(shared_parameters);
      const int label = all.label - source.column(pack);
      const auto entry = [&](Real, Real, const Outcome<Real>& o, int j) {
        const Real h = teacher_gradient<kNear>(divergence, o, all.teacher_mean, all.factors);
        return kExcludes && j == label ? h + all.factors.teacher_at_label : h;
      };
      gradients.store_teacher(pack, map<kNear>(without_label<kExcludes>(source, pack, raw, all.label), all, entry));
    };
    const auto write_student = [&](int pack, const typename Source::Raw& raw) {
      const RowParameters<Real> all = shared_load(shared_parameters);
      const int label = all.label - source.column(pack);
      const auto entry = [&](Real u, Real w, const Outcome<Real>& o, int j) {
        Real g = student_gradient<kNear>(divergence, o, all.student_mean, all.factors);
        if constexpr (kCentred && !kNear) {
          if (magnitude(o.logits_apart) < Real(kDead)) g = o.q * centred(u, w, all);
        }
        if (all.label_scale != Real(0)) g += label_share(u, all);
        return all.label >= 0 && j == label ? g + all.factors.at_label : g;
      };
      gradients.store_student(pack, map<kNear>(without_label<kExcludes>(source, pack, raw, all.label), all, entry));
    };
    RowPass<false, Source> pass(source, team, backwards);
    if constexpr (Source::kPacked && !kNear && (kDifference || kCentred || kQuick)) {
      if (has_short_formula(parameters)) {
        const PackFormula formula(source, gradients, parameters);
        const auto fast = [&](int pack, const typename Source::Raw& raw) { return formula.write(pack, raw); };
        if (!parameters.teacher_gradient) return for_packs(pass, fast, write_student);
        // The teacher's gradient is written first: writing the student's may overwrite the student's logits.
        return for_packs(pass, [&](int pack, const typename Source::Raw& raw) {
          write_teacher(pack, raw);
          if (parameters.student_gradient && !fast(pack, raw)) write_student(pack, raw);
        });
      }
    }
    for_packs(pass, [&](int pack, const typename Source::Raw& raw) {
      if (parameters.teacher_gradient) write_teacher(pack, raw);
      if (parameters.student_gradient) write_student(pack, raw);
    });
  }

  // Whether the student's gradient has a short formula in packs without the label and with finite log-ratios.
  static constexpr bool kDifference = Divergence::kStudent == Form::kClosed;     // q - p
  static constexpr bool kCentred = Divergence::kPass == Pass::kStudentWeighted;  // q (d - mean of d)

  static __device__ __forceinline__ Real label_share(Real u, const RowParameters<Real>& parameters) {
    const Real x = (u - parameters.at.student_origin) * parameters.label_scale;
    return parameters.factors.label * exp2_fast(x - parameters.label_shift);
  }

  // d - mean of d times the factor, and the label's part of what q is multiplied by. The mean is subtracted from
  // differences of logits, which are exact, since it may be close to the log-ratio of a certain student's token.
  static __device__ __forceinline__ Real centred(Real u, Real w, const RowParameters<Real>& parameters) {
    const Normalized<Real>& at = parameters.at;
    const Real slope = parameters.factors.student * (at.student_scale * Real(kLn2));
    const Real x = u - at.student_origin, y = w - at.teacher_origin;
    const Real apart = fused(-at.teacher_ratio, y, x - parameters.centre.high);
    return fused(apart, slope, parameters.factors.label_q - parameters.centre.low * slope);
  }

  // The student's gradient by that formula.
  struct PackFormula {
    using Item = typename Source::Item;
    struct None {
      __device__ explicit None(const RowParameters<Real>&) {}
    };
    const Source& source;
    const typename Source::Gradients& gradients;
    const RowParameters<Real>& parameters;
    const int label_pack;
    PackRange<Item> u_range, w_range;
    typename std::conditional<kQuick, QuickPack, None>::type quick_pack;
    Real by_q, by_p, slope, mean;

    __device__ __forceinline__ PackFormula(const Source& s, const typename Source::Gradients& g,
                                           const RowParameters<Real>& p)
        : source(s),
          gradients(g),
          parameters(p),
          label_pack(p.label >= 0 ? s.pack_of(p.label) - s.begin : INT32_MAX),
          quick_pack(p) {
      const Real unit = p.student_shift.unit;
      if constexpr (kQuick) {
        const QuickScales<double> scales = quick_pack.divergence.scales();
        slope = p.factors.student * Real(scales.g) * unit;
        const double exact = (double(p.student_mean.high) + double(p.student_mean.low) - scales.g_offset) * p.by_scale;
        mean = Real(exact);
        by_p = -p.factors.student * Real(scales.closed) * unit;
        by_q = p.factors.label_q * unit - by_p - Real(exact - double(mean)) * slope;
        if constexpr (Quick<Divergence>::kBinary) {
          // q (g - mean) slope as q (g slope + rest) with a small rest: beside a token of nearly all the mass, the
          // others keep their digits.
          const bool turned = exact > 0.5;
          by_q = fused(Real(turned ? 1 - exact : -exact), slope, p.factors.label_q * unit);
          if (turned) quick_pack.divergence.turn();
          slope = turned ? -slope : slope;
        }
      } else if constexpr (kCentred) {
        set_finite(u_range, w_range, p);
      } else {
        by_q = (p.factors.student + p.factors.label_q) * unit;
        by_p = -p.factors.student * p.teacher_shift.unit;
      }
    }

    // Returns false where the formula does not apply.
    __device__ __forceinline__ bool write(int pack, const typename Source::Raw& raw) const {
      if (pack == label_pack || !source.is_whole(pack)) return false;
      if constexpr (kQuick) {
        if (!quick_pack.takes(raw)) return false;
      }
      if (kCentred && !(u_range.above(raw.student) && w_range.above(raw.teacher))) return false;
      gradients.store_whole_student(pack, parameters.label_scale != Real(0) ? words<true>(raw) : words<false>(raw));
      return true;
    }

   private:
    // kLabelApart: the label's softmax has another temperature than q.
    template <bool kLabelApart>
    __device__ __forceinline__ typename Source::Out words(const typename Source::Raw& given) const {
      typename Source::Raw raw = given;
      if constexpr (kQuick) raw = quick_pack.raised(raw);
      Real entries[kSize];
#pragma unroll
      for (int j = 0; j < kSize; j += 2) {
        if constexpr (kQuick) {
          const QuickPairTerms<Real> t = quick_pack.template terms<QuickUse::kGradient>(raw, j);
          entries[j] = entry(t.first);
          entries[j + 1] = entry(t.second);
        } else {
          entries[j] = entry(Source::student_of(raw, j), Source::teacher_of(raw, j));
          entries[j + 1] = entry(Source::student_of(raw, j + 1), Source::teacher_of(raw, j + 1));
        }
      }
      typename Source::Out out{};
#pragma unroll
      for (int k = 0; k < kSize / Source::kWord; ++k) {
        Real word[Source::kWord];
#pragma unroll
        for (int j = 0; j < Source::kWord; ++j) {
          const int place = k * Source::kWord + j;
          word[j] = entries[place];
          if constexpr (kLabelApart) word[j] += label_share(Source::student_of(given, place), parameters);
        }
        set_word(out, k, word_from<Item>(word));
      }
      return out;
    }

    __device__ __forceinline__ Real entry(const QuickTerms<Real>& t) const {
      const Real centred_part = t.q * fused(Quick<Divergence>::kBinary ? t.g : t.g - mean, slope, by_q);
      return Quick<Divergence>::kFinite ? fused(t.x, by_p, centred_part) : centred_part;
    }
    __device__ __forceinline__ Real entry(Real u, Real w) const {
      const Real q = exp2_fast(fused(u, parameters.student_scale, -parameters.student_shift.shift));
      if constexpr (kCentred) return q * (centred(u, w, parameters) * parameters.student_shift.unit);
      return fused(q, by_q, exp2_fast(fused(w, parameters.teacher_scale, -parameters.teacher_shift.shift)) * by_p);
    }
  };

  // The pack of f(student's logit, teacher's logit, outcome, place in the pack) for each entry. A few entries are
  // processed at a time: the logarithms of a whole pack would need too many registers.
  template <bool kNear, class Function>
  __device__ __forceinline__ typename Source::Out map(typename Source::Raw raw, const RowParameters<Real>& parameters,
                                                      const Function& f) const {
    typename Source::Out out{};
#pragma unroll 1
    for (int first = 0; first < kSize; first += Source::kWord, Source::next_word(raw)) {
      Real word[Source::kWord];
#pragma unroll
      for (int j = 0; j < Source::kWord; ++j) {
        const Real u = Source::student_of(raw, j), w = Source::teacher_of(raw, j);
        word[j] = f(u, w, parameters.at.template outcome<kNear>(u, w), first + j);
      }
      Source::append(out, word);
    }
    return out;
  }
};

// Threads per block where two share a multiprocessor. More registers are needed for two dtypes, and where rows are read
// element by element.
template <class Divergence, class Source>
constexpr int threads_for() {
  const bool more = std::is_same<Source, PackedSource<Mixed>>::value || !Source::kPacked;
  return Divergence::kPass == Pass::kNormalizersOnly || more ? kRowThreads : kManyRowThreads;
}

template <class Divergence, class Source>
__global__ void __launch_bounds__(2 * threads_for<Divergence, Source>(), 1)
    softmax_divergence_kernel(const __grid_constant__ RowArguments arguments, const RowLaunch launch) {
  const bool by_warp = launch.warp_rows > 0;
  unsigned char* shared = team_memory(launch, team_bytes(by_warp) + rows_bytes(launch, 2));
  const Team team(shared + kParametersBytes + kPlanBytes + kTeachersBytes, unsigned(launch.cluster), by_warp);
  const RowWorker<Divergence, Source> worker(arguments, team, shared);
  for_rows(team, launch, arguments.rows, [&](int64_t row) FASTKD_INLINE_BODY {
    if (!arguments.takes(row)) return;
    Source source(arguments, row, launch, team.rank, shared + kParametersBytes + kPlanBytes,
                  shared + team_bytes(by_warp));
    worker.run(row, source);
  });
}

}  // namespace fastkd::cuda
