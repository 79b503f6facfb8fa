// Matrix products C = A B of bfloat16 with sums in float32: what a thread does with panels of the operands.
//
// A panel is kPanel rows of A or kPanel columns of B, packed: for each kStep values of k two tiles of 1 KiB, as the
// matrix instructions read them. A tile of A is 16 rows of kStep values; a tile of B is 16 pairs of k, each with the
// pair's two values of 16 columns. A block is the product of two panels: four tiles of 16 x 16 sums, one after the
// other. The sums over k do not depend on which blocks a thread computes, nor, but for which remainders count, on other
// rows and columns.
//
// Of A in float32, products count what rounding it to bfloat16 left, as far as the sums need it. Where products cost
// little (AMX), that is all of it, a second packed operand. Elsewhere it is lists: a unit is kUnitRows rows of A and
// one pair of k, and units whose remainders have little energy (sums of squares) are left out, together at most
// kLeftOut^2 of the energy of A. Of softmax gradients a few units have most of it.
//
// The kernels are compiled for processors that multiply bfloat16 with vectors (AVX512_BF16) or with tiles (AMX).
#pragma once
#include <cstdint>

namespace fastkd {

inline constexpr int64_t kPanel = 32, kStep = 32;
inline constexpr int64_t kPanelStep = kPanel * kStep;  // elements of a panel for kStep values of k
inline constexpr int64_t kBlockSums = kPanel * kPanel;
// How many steps are multiplied at a time: a panel's part then stays in the L1 cache.
inline constexpr int64_t kStepsAtOnce = 8;

inline constexpr int64_t steps_of(int64_t depth) { return (depth + kStep - 1) / kStep; }
inline constexpr int64_t bfloat16_panels(int64_t size) { return (size + kPanel - 1) / kPanel; }

// Rows of A in a unit, and units of these rows in kStepsAtOnce steps.
inline constexpr int64_t kUnitRows = 8, kListUnits = kStepsAtOnce * kStep / 2;
inline constexpr double kLeftOut = 7.0 / 8192;  // of the norm; a result rounded to bfloat16 is off by 14 / 8192

// The units that count, of kUnitRows rows and kStepsAtOnce steps, in the order of k.
struct alignas(64) RemainderList {
  uint32_t pairs[kListUnits][kUnitRows];
  uint8_t place[kListUnits];  // the pair's, within the steps
  int64_t units;
};
// Lists of a panel and kStepsAtOnce steps.
inline constexpr int64_t kPanelLists = kPanel / kUnitRows;

// How many units have remainders of how much energy, by exponent and two binary digits, and the energy of A.
struct RemainderEnergies {
  static constexpr int kBins = 1024, kBinShift = 21;
  int64_t units[kBins] = {};
  double whole = 0;
};

// An operand as it is given: `size` rows of A, or columns of B, of `depth` values each. In `data` either the values or
// the rows (columns) are contiguous, and the others `stride` elements apart.
struct Bfloat16Operand {
  const void* data;
  int64_t size, depth, stride;
  bool wide;        // float32, which is rounded; else bfloat16
  bool contiguous;  // the values of a row of A, or of a column of B
  // Of float32 values: what rounding them left, rounded.
  bool remainder = false;
};

// Where blocks go: C(i, j) at data + i * stride + j.
struct Bfloat16Result {
  void* data;
  int64_t rows, columns, stride;
  bool wide;          // float32, else bfloat16
  float scale;        // C = scale A B, plus
  const float* bias;  // that of each column, if not null, or
  bool add;           // what C holds, if it is float32
  bool streamed;      // past the caches, where rows begin at multiples of 64 bytes
};

// Packed panels, `stride` elements apart. A is the sum of `parts` such operands, `part_stride` elements apart, and of
// what `lists` have, if not null: kPanelLists of each panel, those of panels `lists_stride` lists apart.
struct PackedPanels {
  const uint16_t* data;
  int64_t stride, parts = 1, part_stride = 0;
  const RemainderList* lists = nullptr;
  int64_t lists_stride = 0;
};

struct Bfloat16Kernels {
  const char* name;
  // float32 operands are multiplied as a sum of two bfloat16 numbers each, where products cost little beside the memory
  // that they read and write.
  bool twice;
  // Packs panels of A (of_rows) or B, from `index` on, for the values of k from `first` on, as many steps as said. The
  // packed panels are `stride` elements apart.
  void (*pack)(const Bfloat16Operand&, bool of_rows, int64_t index, int64_t panels, int64_t first, int64_t steps,
               void* packed, int64_t stride);
  // Adds energies of up to kUnitRows rows (columns if not `of_rows`: then units are of columns) of a float32 matrix.
  void (*measure)(const float* data, int64_t stride, int64_t rows, int64_t columns, bool of_rows, RemainderEnergies&);
  // Adds to the lists of a panel of A the units of a step, from k = `first` on, whose energy is `least` or more.
  // `step`: which of the lists' steps; the first one empties them.
  void (*list)(const Bfloat16Operand&, int64_t index, int64_t first, int64_t step, float least, RemainderList*);
  // blocks[i, j] (+)= panel i of A times panel j of B, for `rows` x `columns` panels; rows of blocks are `block_stride`
  // sums apart.
  void (*multiply)(const PackedPanels& a, int64_t rows, const PackedPanels& b, int64_t columns, int64_t steps,
                   float* blocks, int64_t block_stride, bool add);
  // Writes the block of panels (row, column) to the result.
  void (*store)(const float* block, const Bfloat16Result&, int64_t row, int64_t column);
  // To be called before another thread may read streamed results.
  void (*finish)();
};

// The kernels of the best instruction set that this machine runs, null if there are none.
const Bfloat16Kernels* bfloat16_kernels();

}  // namespace fastkd
