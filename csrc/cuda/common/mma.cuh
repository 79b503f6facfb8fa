// Products of small matrices by one warp: inline PTX, and emulator versions that distribute the registers in the same
// way. A warp holds a matrix in pairs of adjacent elements, in the order given in the PTX manual. Lane l holds, with
// g = l / 4 and t = 2 (l % 4),
//   A [16, 16]  {(g, t), (g, t + 1)}, then 8 rows below, then both 8 columns to the right
//   B [16, 8]   {(t, g), (t + 1, g)}, then 8 rows below
//   C [16, 8]   {(g, t), (g, t + 1)}, then 8 rows below
#pragma once
#include <type_traits>

#include "block.cuh"

namespace fastkd::cuda {

// Loads four 8 x 8 matrices of 16-bit elements from shared memory. Lane l passes the address of row l % 8 of matrix
// l / 8, and gets {(g, t), (g, t + 1)} of each matrix, or of its transpose.
template <bool kTransposed>
__device__ __forceinline__ void load_matrices(unsigned (&out)[4], const void* row) {
#ifdef FASTKD_SIMT
  simt::shared_read(row, 16);
  simt::warp_work(
      [](const void* const* in, void* const* results) {
        for (unsigned lane = 0; lane < 32; ++lane) {
          for (unsigned i = 0; i < 4; ++i) {
            uint16_t pair[2];
            for (unsigned j = 0; j < 2; ++j) {
              const unsigned g = lane / 4, t = lane % 4 * 2 + j;
              const void* const from = *static_cast<const void* const*>(in[i * 8 + (kTransposed ? t : g)]);
              pair[j] = static_cast<const uint16_t*>(from)[kTransposed ? g : t];
            }
            memcpy(static_cast<unsigned*>(results[lane]) + i, pair, sizeof(pair));
          }
        }
      },
      row, out);
#else
  const unsigned place = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(place)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(place)
                 : "memory");
  }
#endif
}

#ifdef FASTKD_SIMT
struct Fragments {
  unsigned a[4], b[2];
  float c[4];
};

template <class T>
inline void multiply_fragments(const void* const* in, void* const* results) {
  const auto elements = [](unsigned word, float* to) {
    T pair[2];
    memcpy(pair, &word, sizeof(pair));
    to[0] = to_float(pair[0]), to[1] = to_float(pair[1]);
  };
  float a[16][16], b[8][16];  // b by columns
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Fragments& mine = *static_cast<const Fragments*>(in[lane]);
    const unsigned g = lane / 4, t = lane % 4 * 2;
    for (unsigned i = 0; i < 4; ++i) elements(mine.a[i], &a[g + i % 2 * 8][t + i / 2 * 8]);
    for (unsigned i = 0; i < 2; ++i) elements(mine.b[i], &b[g][t + i * 8]);
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    const Fragments& mine = *static_cast<const Fragments*>(in[lane]);
    for (unsigned i = 0; i < 4; ++i) {
      const float* const row = a[lane / 4 + i / 2 * 8];
      const float* const column = b[lane % 4 * 2 + i % 2];
      float sum = mine.c[i];
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      static_cast<float*>(results[lane])[i] = sum;
    }
  }
}
#endif

// C += A B. A and B are BFloat16 (sm_80 and later) or Float16.
template <class T>
__device__ __forceinline__ void multiply_add(float* c01, float* c23, const unsigned (&a)[4], unsigned b0, unsigned b1) {
#ifdef FASTKD_SIMT
  const Fragments in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {c01[0], c01[1], c23[0], c23[1]}};
  float out[4];
  simt::warp_work(multiply_fragments<T>, in, out);
  c01[0] = out[0], c01[1] = out[1], c23[0] = out[2], c23[1] = out[3];
#else
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c01[0]), "+f"(c01[1]), "+f"(c23[0]), "+f"(c23[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};\n\t"
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%7, %8}, {%9}, {%0, %1, %2, %3};"
        : "+f"(c01[0]), "+f"(c01[1]), "+f"(c23[0]), "+f"(c23[1])
        : "r"(a[0]), "r"(a[1]), "r"(b0), "r"(a[2]), "r"(a[3]), "r"(b1));
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c01[0]), "+f"(c01[1]), "+f"(c23[0]), "+f"(c23[1])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
  }
#endif
}

// Transposes among kSize adjacent lanes: word j of lane i becomes word i of lane j.
template <int kSize>
__device__ __forceinline__ void transpose(float (&words)[kSize]) {
#pragma unroll
  for (int step = 1; step < kSize; step *= 2) {
    const bool upper = (threadIdx.x & step) != 0;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i & step) continue;
      const float low = words[i], high = words[i + step];
      const float sent = upper ? low : high, other = shuffle_xor(sent, step);
      words[i] = upper ? other : low;
      words[i + step] = upper ? high : other;
    }
  }
}

}  // namespace fastkd::cuda
