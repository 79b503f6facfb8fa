"""fastkd.chunk_log_likelihood beside log_softmax, gather, logsumexp, index_add; eager, compiled.

Forward alone against one read, with backward against two reads and one write. `--quick` is one
small shape, `--headline` what must be reached; without options it walks each axis.
"""

import sys

from benchmarks.byte_level import chunk_log_likelihood_case
from benchmarks.command import walk
from benchmarks.shapes import ROWS, VOCABULARIES

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}
VARIANTS = ({"gradient": False}, {"gradient": True})

if __name__ == "__main__":
    title = __doc__.splitlines()[0]
    sys.exit(
        walk(title, "chunk_log_likelihood", chunk_log_likelihood_case, AXES, variants=VARIANTS)
    )
