"""fastkd.byte_log_probs beside softmax, index_add; eager, compiled.

Forward alone against one read, with backward against two reads and one write. `--quick` is one
small shape, `--headline` what must be reached; without options it walks each axis.
"""

import sys

from benchmarks.byte_level import byte_log_probs_case, walk_both
from benchmarks.shapes import ROWS, VOCABULARIES

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}

if __name__ == "__main__":
    sys.exit(walk_both(__doc__.splitlines()[0], "byte_log_probs", byte_log_probs_case, AXES))
