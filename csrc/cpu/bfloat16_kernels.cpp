// The kernels of csrc/cpu/bfloat16_products.h. This file is compiled once for each instruction set that multiplies
// bfloat16; FASTKD_ISA names it.
#include <immintrin.h>

#include "bfloat16_products.h"

namespace fastkd {

#define FASTKD_QUOTE_(x) #x
#define FASTKD_QUOTE(x) FASTKD_QUOTE_(x)
#define FASTKD_JOIN_(a, b) a##b
#define FASTKD_JOIN(a, b) FASTKD_JOIN_(a, b)

extern const Bfloat16Kernels FASTKD_JOIN(bfloat16_kernels_, FASTKD_ISA);

namespace FASTKD_ISA {
namespace {

constexpr int64_t kTile = 16;               // rows, columns or pairs of a tile
constexpr int64_t kTileBytes = kTile * 64;  // of a packed tile, and of a tile of sums
constexpr int64_t kTileSums = kTile * kTile;

int64_t within(int64_t left, int64_t most) { return left < 0 ? 0 : left < most ? left : most; }
uint32_t first_lanes(int64_t count) { return uint32_t((uint64_t(1) << count) - 1); }

// Transposes a 16 x 16 matrix of 32-bit lanes: each round interleaves rows of 32, 64, 128 and 256 bits.
inline __attribute__((always_inline)) void transpose(__m512i* v) {
  __m512i t[kTile];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      v[4 * i + 2 * j] = _mm512_unpacklo_epi64(t[4 * i + j], t[4 * i + 2 + j]);
      v[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(t[4 * i + j], t[4 * i + 2 + j]);
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    v[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    v[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    v[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// 16 pairs: `low` and `high` hold 16 values each.
inline __m512i pairs(__m512i low_then_high) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, low_then_high);
}

// 32 rounded values, those of `low` first, or what rounding them left: infinities leave NaN, and their sum is NaN or
// infinite in any case.
inline __m512i round_32(__m512 low, __m512 high, bool remainder) {
  const __m512bh rounded = _mm512_cvtne2ps_pbh(high, low);
  if (!remainder) return (__m512i)rounded;
  const __m512i bits = (__m512i)rounded;
  const auto wide = [](__m256i half) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_sub_ps(high, wide(_mm512_extracti64x4_epi64(bits, 1))),
                                      _mm512_sub_ps(low, wide(_mm512_castsi512_si256(bits))));
}

// Up to 32 consecutive values, then zeros.
template <bool kWide>
inline __m512i load_32(const void* data, int64_t at, int64_t count, bool remainder) {
  if constexpr (kWide) {
    const float* const from = static_cast<const float*>(data) + at;
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(first_lanes(within(count, 16))), from);
    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(first_lanes(within(count - 16, 16))), from + 16);
    return round_32(low, high, remainder);
  } else {
    return _mm512_maskz_loadu_epi16(first_lanes(within(count, 32)), static_cast<const uint16_t*>(data) + at);
  }
}

// Up to 16 values at `at` and, where `second`, 16 that are `stride` further, as pairs.
template <bool kWide>
inline __m512i load_pairs(const void* data, int64_t at, int64_t stride, int64_t count, bool first, bool second,
                          bool remainder) {
  const __mmask16 lanes = __mmask16(first_lanes(within(count, 16)));
  const __mmask16 of_first = first ? lanes : __mmask16(0), of_second = second ? lanes : __mmask16(0);
  if constexpr (kWide) {
    const float* const from = static_cast<const float*>(data) + at;
    return pairs(round_32(_mm512_maskz_loadu_ps(of_first, from),
                          _mm512_maskz_loadu_ps(of_second, from + (second ? stride : 0)), remainder));
  } else {
    const uint16_t* const from = static_cast<const uint16_t*>(data) + at;
    const __m256i low = _mm256_maskz_loadu_epi16(of_first, from);
    const __m256i high = _mm256_maskz_loadu_epi16(of_second, from + (second ? stride : 0));
    return pairs(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
  }
}

// One step of a panel. The data of the step after the next is prefetched: it lies in as many places as the panel has
// rows (columns), or the step has values, which the hardware prefetcher does not predict.
template <bool kWide, bool kContiguous>
inline void pack_step(const Bfloat16Operand& x, bool of_rows, int64_t index, int64_t k, char* to) {
  constexpr int64_t kAhead = 2 * kStep, kSize = kWide ? 4 : 2;
  const char* const data = static_cast<const char*>(x.data);
  for (int64_t part = 0; part < kPanel; part += kTile, to += kTileBytes) {
    const int64_t line = index * kPanel + part, lines = within(x.size - line, kTile);
    __m512i tile[kTile];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) {
      if constexpr (kContiguous) {  // a row or column: 16 pairs
        const int64_t at = i < lines ? (line + i) * x.stride + k : 0;
        for (int64_t j = 0; j < kStep * kSize; j += 64) __builtin_prefetch(data + (at + kAhead) * kSize + j, 0, 3);
        tile[i] = load_32<kWide>(data, at, i < lines ? x.depth - k : 0, x.remainder);
      } else {  // a pair of 16 rows or columns
        const int64_t pair = k + 2 * i;
        const bool one = pair < x.depth;
        const int64_t at = one ? pair * x.stride + line : 0;
        __builtin_prefetch(data + (at + kAhead * x.stride) * kSize, 0, 3);
        __builtin_prefetch(data + (at + (kAhead + 1) * x.stride) * kSize, 0, 3);
        tile[i] = load_pairs<kWide>(data, at, x.stride, lines, one, pair + 1 < x.depth, x.remainder);
      }
    }
    if (of_rows != kContiguous) transpose(tile);
#pragma GCC unroll 16
    for (int64_t i = 0; i < kTile; ++i) _mm512_store_si512(to + i * 64, tile[i]);
  }
}

// In the order in which the operand lies in memory, as far as the packed panels are long.
template <bool kWide, bool kContiguous>
void pack_panels(const Bfloat16Operand& x, bool of_rows, int64_t index, int64_t panels, int64_t first, int64_t steps,
                 void* packed, int64_t stride) {
  char* const to = static_cast<char*>(packed);
  const auto pack_one = [&](int64_t i, int64_t s) {
    pack_step<kWide, kContiguous>(x, of_rows, index + i, first + s * kStep, to + (i * stride + s * kPanelStep) * 2);
  };
  if (kContiguous) {
    for (int64_t i = 0; i < panels; ++i) {
      for (int64_t s = 0; s < steps; ++s) pack_one(i, s);
    }
  } else {
    for (int64_t s = 0; s < steps; ++s) {
      for (int64_t i = 0; i < panels; ++i) pack_one(i, s);
    }
  }
}

void pack(const Bfloat16Operand& x, bool of_rows, int64_t index, int64_t panels, int64_t first, int64_t steps,
          void* packed, int64_t stride) {
  const auto run = x.wide ? (x.contiguous ? pack_panels<true, true> : pack_panels<true, false>)
                          : (x.contiguous ? pack_panels<false, true> : pack_panels<false, false>);
  run(x, of_rows, index, panels, first, steps, packed, stride);
}

// What rounding 16 values left; 0 of infinities and NaN.
inline __m512 remainder_of(__m512 x) {
  const __m512 rounded =
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
  const __m512 left = _mm512_sub_ps(x, rounded);
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(left, left, _CMP_ORD_Q), left);
}

// Counts the energies in the lanes that `lanes` has.
inline void count(__m512 energies, __mmask16 lanes, RemainderEnergies& found) {
  alignas(64) uint32_t bins[kTile];
  _mm512_store_si512(bins, _mm512_srli_epi32(_mm512_castps_si512(energies), RemainderEnergies::kBinShift));
  for (uint32_t left = lanes; left != 0; left &= left - 1) ++found.units[bins[__builtin_ctz(left)]];
}

// Sums of neighbouring lanes: of 2, or of 8.
inline __m512 sum_lanes(__m512 x, bool eight) {
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0xb1));
  if (!eight) return x;
  x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
  return _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
}

void measure(const float* data, int64_t stride, int64_t rows, int64_t columns, bool of_rows, RemainderEnergies& found) {
  static_assert(kUnitRows == 8);
  __m512 whole = _mm512_setzero_ps();
  for (int64_t column = 0; column < columns; column += kTile) {
    const __mmask16 lanes = __mmask16(first_lanes(within(columns - column, kTile)));
    __m512 energy[kUnitRows];
#pragma GCC unroll 8
    for (int64_t i = 0; i < kUnitRows; ++i) {
      const __m512 x = i < rows ? _mm512_maskz_loadu_ps(lanes, data + i * stride + column) : _mm512_setzero_ps();
      const __m512 left = remainder_of(x);
      energy[i] = _mm512_mul_ps(left, left);
      const __m512 zero = _mm512_sub_ps(x, x);
      whole = _mm512_mask3_fmadd_ps(x, x, whole, _mm512_cmp_ps_mask(zero, zero, _CMP_ORD_Q));
    }
#pragma GCC unroll 4
    for (int64_t i = 0; i < kUnitRows; i += 2) energy[i] = _mm512_add_ps(energy[i], energy[i + 1]);
    if (of_rows) {
      const __m512 all = _mm512_add_ps(_mm512_add_ps(energy[0], energy[2]), _mm512_add_ps(energy[4], energy[6]));
      count(sum_lanes(all, false), 0x5555, found);
    } else {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kUnitRows; i += 2) count(sum_lanes(energy[i], true), 0x0101, found);
    }
  }
  found.whole += _mm512_reduce_add_ps(whole);
}

template <bool kContiguous>
void list_step(const Bfloat16Operand& x, int64_t index, int64_t first, int64_t step, float least,
               RemainderList* lists) {
  alignas(64) uint32_t tiles[kPanel][kTile];
  Bfloat16Operand left = x;
  left.remainder = true;
  pack_step<true, kContiguous>(left, true, index, first, reinterpret_cast<char*>(tiles));
  for (int64_t i = 0; i < kPanelLists; ++i) {
    const uint32_t (*const rows)[kTile] = tiles + i * kUnitRows;
    __m512 energy = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int64_t j = 0; j < kUnitRows; ++j) {
      const __m512bh both = (__m512bh)_mm512_load_si512(rows[j]);
      energy = _mm512_dpbf16_ps(energy, both, both);
    }
    RemainderList& list = lists[i];
    int64_t units = step == 0 ? 0 : list.units;
    for (uint32_t some = _mm512_cmp_ps_mask(energy, _mm512_set1_ps(least), _CMP_GE_OQ); some != 0; some &= some - 1) {
      const int pair = __builtin_ctz(some);
#pragma GCC unroll 8
      for (int64_t j = 0; j < kUnitRows; ++j) list.pairs[units][j] = rows[j][pair];
      list.place[units++] = uint8_t(step * kTile + pair);
    }
    list.units = units;
  }
}

void list(const Bfloat16Operand& x, int64_t index, int64_t first, int64_t step, float least, RemainderList* lists) {
  x.contiguous ? list_step<true>(x, index, first, step, least, lists)
               : list_step<false>(x, index, first, step, least, lists);
}

#ifdef __AMX_BF16__

constexpr bool kTwice = true;

// The tiles' shape, for as long as it lives: 8 tiles of 16 rows of 64 bytes. The shape that was set before is set
// again; no library keeps values in tiles between its calls.
class Tiles {
 public:
  Tiles() {
    _tile_storeconfig(&before_);
    alignas(64) Config config = {};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = kTile;
    }
    _tile_loadconfig(&config);
  }
  Tiles(const Tiles&) = delete;
  ~Tiles() {
    if (before_.palette == 0) {
      _tile_release();
    } else {
      _tile_loadconfig(&before_);
    }
  }

 private:
  struct Config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
  static_assert(sizeof(Config) == 64);
  alignas(64) Config before_ = {};
};

// `lower`: null, or A's second part.
inline void multiply_block(const char* a, const char* lower, const RemainderList*, const char* b, int64_t steps,
                           float* block, bool add) {
  if (add) {
    _tile_loadd(0, block, 64);
    _tile_loadd(1, block + kTileSums, 64);
    _tile_loadd(2, block + 2 * kTileSums, 64);
    _tile_loadd(3, block + 3 * kTileSums, 64);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += 2 * kTileBytes, b += 2 * kTileBytes) {
    _tile_loadd(6, b, 64);
    _tile_loadd(4, a, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    if (lower == nullptr) continue;
    _tile_loadd(4, lower, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, lower + kTileBytes, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    lower += 2 * kTileBytes;
  }
  _tile_stored(0, block, 64);
  _tile_stored(1, block + kTileSums, 64);
  _tile_stored(2, block + 2 * kTileSums, 64);
  _tile_stored(3, block + 3 * kTileSums, 64);
}

#else

constexpr bool kTwice = false;

struct Tiles {
  Tiles() {}
};

// A quarter of a block's rows at a time: 16 vectors of sums stay in registers.
inline void multiply_block(const char* a, const char*, const RemainderList* lists, const char* b, int64_t steps,
                           float* block, bool add) {
  constexpr int kRows = kUnitRows;
  for (int64_t row = 0; row < kPanel; row += kRows) {
    const char* const rows = a + row / kTile * kTileBytes + row % kTile * 64;
    float* const out = block + row / kTile * 2 * kTileSums + row % kTile * kTile;
    __m512 sums[kRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        sums[i][j] = add ? _mm512_load_ps(out + j * kTileSums + i * kTile) : _mm512_setzero_ps();
      }
    }
    for (int64_t s = 0; s < steps; ++s) {
      const char *const of_a = rows + s * 2 * kTileBytes, *const of_b = b + s * 2 * kTileBytes;
#pragma GCC unroll 1
      for (int64_t pair = 0; pair < kTile; ++pair) {
        const __m512bh left = (__m512bh)_mm512_load_si512(of_b + pair * 64);
        const __m512bh right = (__m512bh)_mm512_load_si512(of_b + kTileBytes + pair * 64);
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
          int32_t both;
          __builtin_memcpy(&both, of_a + i * 64 + pair * 4, sizeof(both));
          const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
          sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, left);
          sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, right);
        }
      }
    }
    const RemainderList* const list = lists == nullptr ? nullptr : lists + row / kRows;
    for (int64_t unit = 0; list != nullptr && unit < list->units; ++unit) {
      const int64_t place = list->place[unit];
      const char* const of_b = b + place / kTile * 2 * kTileBytes + place % kTile * 64;
      const __m512bh left = (__m512bh)_mm512_load_si512(of_b);
      const __m512bh right = (__m512bh)_mm512_load_si512(of_b + kTileBytes);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const __m512bh x = (__m512bh)_mm512_set1_epi32(int32_t(list->pairs[unit][i]));
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, left);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, right);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) _mm512_store_ps(out + j * kTileSums + i * kTile, sums[i][j]);
    }
  }
}

#endif

void multiply(const PackedPanels& a, int64_t rows, const PackedPanels& b, int64_t columns, int64_t steps, float* blocks,
              int64_t block_stride, bool add) {
  const Tiles tiles;
  for (int64_t i = 0; i < rows; ++i) {
    const char* const of_a = reinterpret_cast<const char*>(a.data + i * a.stride);
    const char* const lower = a.parts > 1 ? of_a + a.part_stride * 2 : nullptr;
    const RemainderList* const lists = a.lists == nullptr ? nullptr : a.lists + i * a.lists_stride;
    for (int64_t j = 0; j < columns; ++j) {
      multiply_block(of_a, lower, lists, reinterpret_cast<const char*>(b.data + j * b.stride), steps,
                     blocks + i * block_stride + j * kBlockSums, add);
    }
  }
}

void store(const float* block, const Bfloat16Result& c, int64_t row, int64_t column) {
  const int64_t first_row = row * kPanel, rows = within(c.rows - first_row, kPanel);
  const __m512 scale = _mm512_set1_ps(c.scale);
  for (int64_t j = 0; j < kPanel; j += kTile) {
    const int64_t at = column * kPanel + j;
    const __mmask16 lanes = __mmask16(first_lanes(within(c.columns - at, kTile)));
    if (lanes == 0) return;
    const __m512 bias = c.bias ? _mm512_maskz_loadu_ps(lanes, c.bias + at) : _mm512_setzero_ps();
    for (int64_t i = 0; i < rows; ++i) {
      const float* const sums = block + (i / kTile * 2 + j / kTile) * kTileSums + i % kTile * kTile;
      __m512 x = _mm512_fmadd_ps(_mm512_load_ps(sums), scale, bias);
      const int64_t place = (first_row + i) * c.stride + at;
      if (c.wide) {
        float* const to = static_cast<float*>(c.data) + place;
        if (c.add) x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(lanes, to));
        if (c.streamed && lanes == 0xffff) {
          _mm512_stream_ps(to, x);
        } else {
          _mm512_mask_storeu_ps(to, lanes, x);
        }
      } else {
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(c.data) + place, lanes, (__m256i)_mm512_cvtneps_pbh(x));
      }
    }
  }
}

void finish() { _mm_sfence(); }

}  // namespace
}  // namespace FASTKD_ISA

const Bfloat16Kernels FASTKD_JOIN(bfloat16_kernels_, FASTKD_ISA) = {
    FASTKD_QUOTE(FASTKD_ISA), FASTKD_ISA::kTwice,   FASTKD_ISA::pack,  FASTKD_ISA::measure,
    FASTKD_ISA::list,         FASTKD_ISA::multiply, FASTKD_ISA::store, FASTKD_ISA::finish};

}  // namespace fastkd
