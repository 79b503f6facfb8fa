"""fastkd beside eager PyTorch, torch.compile, Liger and a Triton kernel of the same loss."""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.cases import kl_div_case, softmax_divergence_case
from benchmarks.gpu.stage import Record, options_of, require_kernels, run
from benchmarks.harness import OURS, Case, run_case
from benchmarks.shapes import QWEN

ROWS = 4096
#: The case and its dtype, the most telling first: compiling the others may take all the time.
CASES = (
    *(("forward_kl", "bfloat16"), ("forward_kl", "float32"), ("kl_div", "bfloat16")),
    *(("jsd", "bfloat16"), ("reverse_kl", "bfloat16")),
)
PACKAGES = {"triton": "triton", "liger": "liger_kernel", "CuPy": "cupy"}


def case_of(name: str, dtype: str, rows: int, vocab: int) -> Case:
    """One of benchmarks/cases.py."""
    if name == "kl_div":
        return kl_div_case(dtype, vocab, rows)
    return softmax_divergence_case(name, dtype, vocab, rows)


def peers(record: Record, options: argparse.Namespace) -> tuple[bool, str]:
    """Run each case; every contestant is checked against float64 first."""
    from benchmarks.report import as_json

    device = torch.device(options.device)
    if device.type == "cuda":
        require_kernels()
        device = torch.device("cuda", torch.cuda.current_device())
        record.facts["gpu"] = torch.cuda.get_device_name(device)
    record.facts["torch"] = torch.__version__
    missing = [name for name, module in PACKAGES.items() if not importlib.util.find_spec(module)]
    record.facts["missing"] = missing
    chosen = [x for x in CASES if not options.cases or x[0] in options.cases]
    ours, fastest = [], 0
    show: Callable[[str, float], None] = lambda text, done: print(text, flush=True)  # noqa: E731
    for name, dtype in chosen:
        case = case_of(name, dtype, options.rows, options.vocab)
        if options.contestants:
            kept = [c for c in case.contestants if c.name in options.contestants]
            case = replace(case, contestants=kept)
        result = run_case(case, device, options.budget, show)
        record.add(as_json(result))
        mine = result.find(OURS)
        ours += [f"{name}: {mine.failed or mine.wrong}"] if mine.failed or mine.wrong else []
        others = [m.seconds for m in result.measurements if m.timing and m.name != OURS]
        fastest += bool(mine.timing) and all(mine.seconds <= x for x in others)
    summary = f"fastkd is the fastest in {fastest} of {len(chosen)}"
    if missing:
        summary += f"; not installed: {', '.join(missing)}"
    if ours:
        summary += f"; {'; '.join(ours)}"
    return not ours, summary


def main(arguments: list[str] | None = None) -> int:
    """Run the stage."""
    parser = options_of(__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=ROWS)
    add("--vocab", type=int, default=QWEN)
    add("--cases", nargs="+", choices=[*dict.fromkeys(name for name, _ in CASES)])
    add("--contestants", nargs="+", help="default: all that are installed")
    add("--budget", type=float, default=1.5, help="seconds of timing a case")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script")
    return run("peers", peers, parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
