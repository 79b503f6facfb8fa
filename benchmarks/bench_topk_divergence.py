"""fastkd.topk_divergence, k = 64, beside what training loops write, eager and compiled.

`--quick` is one small case, `--headline` what must be reached; without options it walks each axis.
"""

import sys

from benchmarks.command import walk
from benchmarks.compressed import topk_divergence_case
from benchmarks.shapes import ROWS, VOCABULARIES

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}

if __name__ == "__main__":
    sys.exit(walk(__doc__.splitlines()[0], "topk_divergence", topk_divergence_case, AXES))
