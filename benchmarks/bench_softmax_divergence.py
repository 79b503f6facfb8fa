"""fastkd.softmax_divergence beside eager PyTorch, torch.compile, Liger's and torchtune's losses.

Run `python -m benchmarks.bench_softmax_divergence --quick` first. Without options it walks each
axis (divergence, dtype, vocabulary, rows) alone from the middle, 256 x 128,256 float32 forward KL;
with any of them it runs every combination of those given.
"""

import sys
from functools import partial

from benchmarks import headline
from benchmarks.cases import MIDDLE_ROWS, MIDDLE_VOCAB, softmax_divergence_case
from benchmarks.command import budget_of, device_of, finish, parser, run_cases, settings_of
from benchmarks.shapes import DIVERGENCES, ROWS, VOCABULARIES

MIDDLE = {
    "divergence": "forward_kl",
    "dtype": "float32",
    "vocab": MIDDLE_VOCAB,
    "rows": MIDDLE_ROWS,
}
AXES = {
    "divergence": DIVERGENCES,
    "dtype": ("float32", "bfloat16", "float16"),
    "vocab": VOCABULARIES,
    "rows": ROWS,
}


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for."""
    command = parser(__doc__.splitlines()[0], MIDDLE)
    command.add_argument("--divergence", nargs="+", choices=DIVERGENCES)
    command.add_argument("--loss-only", action="store_true", help="time the loss without gradient")
    options = command.parse_args(arguments)
    device = device_of(options)
    if options.headline:
        return headline.run(options, device, headline.ALL)
    if options.quick and not options.divergence:
        options.divergence = ["forward_kl", "jsd"]
    makers = [
        partial(
            softmax_divergence_case,
            **setting,
            gradient=not options.loss_only,
            peers=not options.only_fastkd,
        )
        for setting in settings_of(options, MIDDLE, AXES)
    ]
    results = run_cases(makers, device, budget_of(options), options.fresh_memory)
    return finish(results, options, "softmax_divergence")


if __name__ == "__main__":
    sys.exit(main())
