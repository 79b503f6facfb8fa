#include "../teacher_topk.h"

namespace fastkd::FASTKD_ISA {

const TeacherTopkKernel<float> teacher_topk_float{scan_slice<float>, collect_block<float>};
const TeacherTopkKernel<double> teacher_topk_double{scan_slice<double>, collect_block<double>};

}  // namespace fastkd::FASTKD_ISA
