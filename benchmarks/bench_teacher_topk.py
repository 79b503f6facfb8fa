"""fastkd.teacher_topk, k = 64, beside log_softmax and topk.

`--quick` is one small case, `--headline` what must be reached; without options it walks each axis.
"""

import sys

from benchmarks.command import walk
from benchmarks.compressed import teacher_topk_case
from benchmarks.shapes import ROWS, VOCABULARIES

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}

if __name__ == "__main__":
    sys.exit(walk(__doc__.splitlines()[0], "teacher_topk", teacher_topk_case, AXES))
