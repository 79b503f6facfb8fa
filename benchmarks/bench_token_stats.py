"""fastkd.token_stats beside the same in PyTorch, eager and compiled.

`--quick` is one small case, `--headline` what must be reached; without options it walks each axis.
"""

import sys

from benchmarks.command import walk
from benchmarks.compressed import token_stats_case
from benchmarks.shapes import ROWS, VOCABULARIES

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}

if __name__ == "__main__":
    sys.exit(walk(__doc__.splitlines()[0], "token_stats", token_stats_case, AXES))
