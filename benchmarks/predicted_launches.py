"""The launches of a call on a device, from the launch log of the emulated kernels (tests/simt).

    python -m benchmarks.predicted_launches '{"calls": [...], "vocab": ..., "capabilities": [...]}'

is the process that makes the calls; `launches` starts it, since FASTKD_LOG is read once.
"""

import json
import os
import subprocess
import sys
from typing import Any

import torch

from benchmarks.time_model import Launch

#: Rows of each call: a launch does not depend on their number.
ROWS = 1


def launches(
    calls: list[tuple[str, str]], vocab: int, capabilities: list[int]
) -> dict[tuple[str, str, int], dict[str, Launch]]:
    """Return, by (op, dtype, capability), the launch of each role in the log."""
    from tests import emulator

    if not emulator.is_built():
        raise SystemExit(f"{emulator.PATH} is missing: run `make build/simt/.built`")
    given = json.dumps({"calls": calls, "vocab": vocab, "capabilities": capabilities})
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.predicted_launches", given],
        env={**os.environ, "FASTKD_LOG": "launch"},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr[-2000:])
    found: dict[tuple[str, str, int], dict[str, Launch]] = {}
    here: dict[str, Launch] = {}
    for line in done.stderr.splitlines():
        if line.startswith("== "):
            op, dtype, capability = json.loads(line[3:])
            here = found.setdefault((op, dtype, capability), {})
        elif match := emulator.LAUNCH_LINE.fullmatch(line):
            launch = Launch(
                int(match["threads"]),
                int(match["cluster"]),
                int(match["shared"]),
                match["resident"] == "yes",
            )
            here.setdefault(match["role"], launch)
    return found


def _call(calls: list[tuple[str, str]], vocab: int, capabilities: list[int]) -> None:
    from benchmarks.predicted_ops import OPS
    from tests import emulator

    torch.ops.fastkd = emulator.ops()
    for name, dtype_name in calls:
        op, (dtype, *others) = OPS[name], (getattr(torch, x) for x in dtype_name.split("+"))
        for capability in capabilities:
            emulator.configure(capability)
            student = torch.randn(ROWS, vocab).to(dtype).requires_grad_(op.gradient)
            teacher = torch.randn(ROWS, vocab).to(*(others or [dtype]))
            print(f"== {json.dumps([name, dtype_name, capability])}", file=sys.stderr, flush=True)
            found: Any = op.call(student, teacher)
            if op.gradient:
                found.sum().backward()


if __name__ == "__main__":
    torch.manual_seed(0)
    _call(**json.loads(sys.argv[1]))
