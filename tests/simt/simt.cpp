// The functions through which tests configure the emulator and read its counts, by ctypes.
#include "simt.h"

extern "C" {

struct SimtTraffic {
  unsigned long long read, written, read_16, written_16, launches, largest_cluster, largest_shared_memory,
      attributes_set, occupancy_queries;
};

// `capability`: 10 * major + minor. Seed 0 runs the threads in order, any other seed in a pseudo-random order of its
// own.
__attribute__((visibility("default"))) void simt_configure(int capability, unsigned seed) {
  simt::settings().capability = capability;
  simt::settings().seed = seed;
}

// A device, or a partition of one, that cannot run clusters of more blocks than these. No query finds room for one, and
// its launch is an error.
__attribute__((visibility("default"))) void simt_limit_clusters(int most) {
  simt::settings().most_blocks = unsigned(most);
}

// Kernels that loop over rows then launch so many blocks at most, or one cluster.
__attribute__((visibility("default"))) void simt_limit_grids(int most) { simt::settings().most_grid_blocks = most; }

__attribute__((visibility("default"))) void simt_reset() {
  std::lock_guard<std::mutex> lock(simt::settings().mutex);
  simt::settings().totals = {};
}

// Since the reset: bytes of global memory moved, in all and in accesses of 16 bytes; launches, and what was asked for
// them.
__attribute__((visibility("default"))) void simt_traffic(SimtTraffic* out) {
  const simt::Totals totals = simt::totals();
  *out = {0,
          0,
          totals.traffic.read[4],
          totals.traffic.written[4],
          totals.launches,
          totals.largest_cluster,
          totals.largest_shared_memory,
          totals.attributes_set,
          totals.occupancy_queries};
  for (int i = 0; i < 5; ++i) {
    out->read += totals.traffic.read[i];
    out->written += totals.traffic.written[i];
  }
}
}
