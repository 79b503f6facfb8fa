// What the driver has answered about kernels' launches. Each question takes it microseconds, at every call.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>

#include "device.cuh"

namespace fastkd::cuda {

struct DriverQuestion {
  const void* kernel;
  int device;
  cudaStream_t stream;  // since it may belong to a part of the device: a green context
  int attribute;        // to be set; 0: how many blocks run at a time
  int threads = 0;
  int64_t shared_bytes = 0;
  int cluster = 0;

  bool operator<(const DriverQuestion& o) const {
    const auto key = [](const DriverQuestion& q) {
      return std::tie(q.kernel, q.device, q.stream, q.attribute, q.threads, q.shared_bytes, q.cluster);
    };
    return key(*this) < key(o);
  }
};

struct DriverAnswers {
  static constexpr size_t kMost = 4096;  // shapes and streams of a long process
  std::mutex mutex;                      // guards `known`
  std::map<DriverQuestion, int64_t> known;
};

// Never destroyed: other threads may launch while the process ends.
inline DriverAnswers& driver_answers() {
  static DriverAnswers& answers = *new DriverAnswers;
  return answers;
}

// The known answer, or ask()'s, which is kept unless it is negative. Two threads may ask the same question.
template <class Ask>
int64_t driver_answer(const DriverQuestion& question, const Ask& ask) {
  DriverAnswers& all = driver_answers();
  {
    std::lock_guard<std::mutex> lock(all.mutex);
    const auto found = all.known.find(question);
    if (found != all.known.end()) return found->second;
  }
  const int64_t answer = ask();
  if (answer < 0) return answer;
  std::lock_guard<std::mutex> lock(all.mutex);
  if (all.known.size() >= DriverAnswers::kMost) all.known.clear();
  all.known[question] = answer;
  return answer;
}

}  // namespace fastkd::cuda
