"""The calls that a profiler looks at: each once, after one that warms up.

python -m benchmarks.gpu.profiled --rows 1024 --dtype bfloat16
"""

import argparse
import sys

import torch

from benchmarks.gpu.problems import PROBLEMS
from benchmarks.gpu.stage import require_kernels
from benchmarks.gpu.times import step_of
from benchmarks.shapes import DTYPES, QWEN

FOUR = (
    *("softmax_divergence forward_kl", "softmax_divergence jsd", "token_stats pair"),
    "topk_divergence k=64",
)


def main(arguments: list[str] | None = None) -> None:
    """Make the calls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rows", type=int, default=1024)
    add("--vocab", type=int, default=QWEN)
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--problems", nargs="+", choices=PROBLEMS, default=FOUR, metavar="PROBLEM")
    options = parser.parse_args(arguments)
    require_kernels()
    device = torch.device("cuda", torch.cuda.current_device())
    for name in options.problems:
        problem = PROBLEMS[name]
        tensors = problem.make(options.rows, options.vocab, DTYPES[options.dtype], device)
        step = step_of(problem, tensors)
        step()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()
        print(f"profiled: {name}", flush=True)
        del tensors, step


if __name__ == "__main__":
    sys.exit(main())
