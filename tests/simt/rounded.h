// A GPU's functions, with errors within the bounds that the CUDA programming guide (exp2f, log2f) and the PTX manual
// (the others) give. An error is a pseudo-random function of the argument's bits and the seed. 2^0 = 1 and log2(1) = 0
// are exact, as for exp2f and log2f in the guide.
#pragma once

namespace simt::rounded {

float exp2(float x);               // 2 units in the last place
float log2(float x);               // 1 unit
float exp2_approx(float x);        // 2 units; subnormal numbers count as 0
float log2_approx(float x);        // 2^-22.6 for x in (1/2, 2), else relative to the result 2^-22; as above
float reciprocal_approx(float x);  // relative to the result 2^-23; as above
// Correctly rounded. A caller's contraction does not reach into another file.
float product(float a, float b);
float sum(float a, float b);

}  // namespace simt::rounded
