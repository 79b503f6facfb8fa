"""fastkd.alm_loss, a whole step, beside the same in PyTorch, eager and compiled.

Against reading the student's logits twice and the teacher's once, and writing the gradient.
`--quick` is one small shape, `--headline` what must be reached; without options it walks each axis.
"""

import sys

from benchmarks.byte_level import alm_loss_case
from benchmarks.command import walk
from benchmarks.shapes import ROWS, VOCABULARIES

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}

if __name__ == "__main__":
    sys.exit(walk(__doc__.splitlines()[0], "alm_loss", alm_loss_case, AXES))
