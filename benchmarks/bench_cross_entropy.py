"""fastkd.cross_entropy beside F.cross_entropy, eager and compiled.

Loss and gradient against one read and one write; with an entropy term and without. `--quick` is one
small shape, `--headline` what must be reached; without options it walks each axis.
"""

import sys

from benchmarks.command import walk
from benchmarks.shapes import ROWS, VOCABULARIES
from benchmarks.student_only import cross_entropy_case

AXES = {"dtype": ("float32", "bfloat16"), "vocab": VOCABULARIES, "rows": ROWS}
VARIANTS = ({"entropy": False}, {"entropy": True})

if __name__ == "__main__":
    title = __doc__.splitlines()[0]
    sys.exit(walk(title, "cross_entropy", cross_entropy_case, AXES, variants=VARIANTS))
