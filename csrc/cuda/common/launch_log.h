// FASTKD_LOG=launch: one line on stderr for each CUDA launch, and for each cluster that a device cannot run. The
// variable is read at the first launch of the process.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "policy.cuh"

namespace fastkd::cuda {

// What the caller knows of a launch besides its configuration.
struct LaunchNote {
  const char* role;    // which of the op's kernels
  const char* reason;  // for the configuration
  bool resident = false;

  LaunchNote(const char* kernel_role, const char* why) : role(kernel_role), reason(why) {}
  LaunchNote(const char* kernel_role, const RowLaunch& launch)
      : role(kernel_role), reason(text_of(launch.reason)), resident(launch.resident) {}
};

inline bool read_launch_log() {
  const char* const value = std::getenv("FASTKD_LOG");
  const std::string text = value != nullptr ? value : "";
  if (!text.empty() && text != "launch") {
    std::fputs(("fastkd warning: FASTKD_LOG must be launch or unset, got " + text + "; nothing is logged\n").c_str(),
               stderr);
  }
  return text == "launch";
}

inline bool logs_launches() {
  static const bool on = read_launch_log();
  return on;
}

inline const char* dtype_name(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  switch (type) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    default:
      return torch::headeronly::toString(type);
  }
}

// "256x128256 float32": rows (all leading dimensions), columns, dtype.
inline std::string launch_shape(const torch::stable::Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  const int64_t columns = tensor.dim() > 0 ? tensor.size(tensor.dim() - 1) : 1;
  return std::to_string(rows) + "x" + std::to_string(columns) + " " + dtype_name(tensor.scalar_type());
}

struct LoggedLaunch {
  const char* function;
  const std::string& shape;
  int capability;
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;

  void print(const LaunchNote& note) const {
    write("launch", note.role,
          " blocks=" + std::to_string(blocks) + " resident=" + (note.resident ? "yes" : "no") + ": " + note.reason);
  }
  // instead: what runs in place of the cluster.
  void print_refused(const char* role, const char* instead) const {
    write("refused", role, std::string(": the device cannot run this cluster; used instead: ") + instead);
  }

 private:
  // One call of fputs: lines of several threads do not mix.
  void write(const char* event, const char* role, const std::string& rest) const {
    const std::string line = std::string("fastkd ") + event + ": " + function + " (" + role + ") " + shape + " sm_" +
                             std::to_string(capability) + " threads=" + std::to_string(threads) +
                             " cluster=" + std::to_string(cluster) + " shared=" + std::to_string(shared_bytes) + rest +
                             "\n";
    std::fputs(line.c_str(), stderr);
  }
};

}  // namespace fastkd::cuda
