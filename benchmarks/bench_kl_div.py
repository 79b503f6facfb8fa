"""fastkd.kl_div beside torch.nn.functional.kl_div, eager and compiled, on ready log-probabilities.

Run `python -m benchmarks.bench_kl_div --quick` first. Without options it walks each axis (dtype,
vocabulary, rows) alone from the middle, 256 x 128,256 float32; with any of them it runs every
combination of those given.
"""

import sys
from functools import partial

from benchmarks import headline
from benchmarks.cases import MIDDLE_ROWS, MIDDLE_VOCAB, kl_div_case
from benchmarks.command import budget_of, device_of, finish, parser, run_cases, settings_of
from benchmarks.shapes import ROWS, VOCABULARIES

MIDDLE = {"dtype": "float32", "vocab": MIDDLE_VOCAB, "rows": MIDDLE_ROWS}
AXES = {"dtype": ("float32", "bfloat16", "float16"), "vocab": VOCABULARIES, "rows": ROWS}


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for."""
    options = parser(__doc__.splitlines()[0], MIDDLE).parse_args(arguments)
    device = device_of(options)
    if options.headline:
        return headline.run(options, device, headline.KL_DIV)
    makers = [
        partial(kl_div_case, **setting, peers=not options.only_fastkd)
        for setting in settings_of(options, MIDDLE, AXES)
    ]
    results = run_cases(makers, device, budget_of(options), options.fresh_memory)
    return finish(results, options, "kl_div")


if __name__ == "__main__":
    sys.exit(main())
