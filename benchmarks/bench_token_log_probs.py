"""fastkd.token_log_probs beside log_softmax and gather, eager and compiled.

Forward alone against one read, with backward against two reads and one write; with the entropy and
without. `--quick` is one small shape, `--headline` what must be reached; without options it walks
each axis.
"""

import sys

from benchmarks.command import walk
from benchmarks.shapes import ROWS, VOCABULARIES
from benchmarks.student_only import token_log_probs_case

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}
VARIANTS = tuple(
    {"entropy": entropy, "gradient": gradient}
    for entropy in (False, True)
    for gradient in (False, True)
)

if __name__ == "__main__":
    title = __doc__.splitlines()[0]
    sys.exit(walk(title, "token_log_probs", token_log_probs_case, AXES, variants=VARIANTS))
