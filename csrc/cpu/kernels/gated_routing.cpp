#include "../gated_routing.h"

namespace fastkd::FASTKD_ISA {

const GatedRoutingKernels gated_routing_kernels{kTileColumns,  learners_scratch, learner_rows,
                                                learner_first, learner_second,   packed_floats,
                                                pack_weights,  weights_scratch,  learner_weights};

}  // namespace fastkd::FASTKD_ISA
