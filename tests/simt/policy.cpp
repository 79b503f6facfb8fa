// The launch policy, for the table in tests/test_launch.py.
#include "../../csrc/cuda/common/policy.cuh"

extern "C" {

struct SimtRowLaunch {
  int threads, warp_rows, cluster, resident;
  long long slice_bytes;
  const char* reason;
};

__attribute__((visibility("default"))) void simt_row_launch(int capability, int element_size, long long vocab,
                                                            long long overhead, int packed, int tensors, int threads,
                                                            SimtRowLaunch* out) {
  using namespace fastkd::cuda;
  const RowLaunch launch = row_launch(capability, element_size, vocab, {overhead, packed != 0, tensors, threads});
  *out = {launch.threads,  launch.warp_rows,   launch.cluster,
          launch.resident, launch.slice_bytes, text_of(launch.reason)};
}
}
