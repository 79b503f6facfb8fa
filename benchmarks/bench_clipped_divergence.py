"""fastkd.clipped_divergence beside eager PyTorch.

`--quick` is one small case, `--headline` what must be reached; without options it walks each axis.
"""

import sys

from benchmarks.command import walk
from benchmarks.compressed import clipped_divergence_case
from benchmarks.shapes import ROWS, VOCABULARIES

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}

if __name__ == "__main__":
    sys.exit(walk(__doc__.splitlines()[0], "clipped_divergence", clipped_divergence_case, AXES))
