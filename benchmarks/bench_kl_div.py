"""fastkd.kl_div beside torch.nn.functional.kl_div, eager and compiled, on ready log-probabilities.

Run `python -m benchmarks.bench_kl_div --quick` first. Without options it walks each axis (dtype,
vocabulary, rows) alone from the middle, 256 x 128,256 float32; with any of them it runs every
combination of those given.
"""

import sys

from benchmarks.cases import kl_div_case
from benchmarks.command import walk
from benchmarks.shapes import ROWS, VOCABULARIES

AXES = {"dtype": ("float32", "bfloat16", "float16"), "vocab": VOCABULARIES, "rows": ROWS}

if __name__ == "__main__":
    sys.exit(walk(__doc__.splitlines()[0], "kl_div", kl_div_case, AXES))
