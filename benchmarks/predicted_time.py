"""How long a call should take on a GPU, and what limits it. A model: nothing here ran on a GPU.

    python -m benchmarks.predicted_time [--gpu H200 ...] [--op softmax_divergence ...]
        [--dtype bfloat16 ...] [--rows 8192] [--vocab 151936] [--json] [--record]

Instructions come from the kernels' SASS, as recorded in predicted_loops.json; `--record` reads them
again from a library that nvcc built (tests/test_cuda_build.py builds build/cuda_1/_C.so). Launches
come from the launch log of the emulated kernels: recorded for the default vocabulary, else logged
on the spot (`make build/simt/.built` builds the emulator).
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.predicted_launches import launches
from benchmarks.predicted_loops import Count, Recorded, record
from benchmarks.predicted_ops import DTYPES, OPS, Dtype, Op, Over, Part
from benchmarks.sass import disassemble, registers
from benchmarks.sass_code import parse
from benchmarks.time_model import ASSUMPTIONS, GPUS, Gpu, Launch, PassCount, Stage, Times, times_of

if TYPE_CHECKING:
    from rich.table import Table

ROOT = Path(__file__).parents[1]
RECORD, LIBRARY = Path(__file__).with_name("predicted_loops.json"), ROOT / "build/cuda_1/_C.so"
ROWS, VOCAB = 8192, 151_936

ABOUT = "written by python -m benchmarks.predicted_time --record"

Counts = dict[str, dict[str, list[Recorded]]]
Launches = dict[tuple[str, str, int], dict[str, Launch]]


def sources_hash() -> str:
    """Return a hash of all that the kernels are compiled from."""
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
    content = b"".join(p.read_bytes() for p in (ROOT / "CMakeLists.txt", *sources))
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class Prediction:
    """A call on a GPU."""

    op: Op
    dtype: str
    gpu: Gpu
    launches: tuple[Launch, ...]
    instructions: float  # an entry, all passes
    mufu: float
    checked: float  # exponentials and logarithms that also take denormals
    under_way: float  # bytes a multiprocessor, the least of the passes that read memory
    moved: float  # bytes
    floor: float  # seconds of the bytes that must move, at the copy roof
    times: Times

    @property
    def of_roof(self) -> float:
        """The share of the copy roof: floor / predicted."""
        return self.floor / self.times.predicted

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "op": self.op.name,
            "dtype": self.dtype,
            "gpu": self.gpu.name,
            "launches": [x._asdict() for x in self.launches],
            "instructions": self.instructions,
            "mufu": self.mufu,
            "checked": self.checked,
            "bytes_under_way": self.under_way,
            "bytes": self.moved,
            "floor_ms": 1e3 * self.floor,
            **{f"{k}_ms": 1e3 * v for k, v in self.times._asdict().items()},
            "binds": self.times.binds,
            "of_roof": self.of_roof,
        }


def count_of_pass(
    over: Over,
    count: Count,
    launch: Launch,
    entries: float,
    dtype: Dtype,
    blocks: int,
    copied: bool,
) -> PassCount:
    """Scale a pass's counts to the call. blocks: on a multiprocessor."""
    from_memory = over.rows and not (over.again and launch.resident)
    under_way = 16.0 * max(1, count.in_flight) * launch.threads * blocks
    if copied:  # as long as a row is read, half of it on the average
        under_way = launch.shared * blocks / 2
    return PassCount(
        read=entries * dtype.bytes(over.reads, 0) * from_memory,
        written=entries * dtype.bytes(0, over.writes),
        instructions=entries * count.instructions,
        mufu=entries * count.pipes.get("mufu", 0.0),
        under_way=under_way,
    )


def passes_of(part: Part, recorded: Recorded, launch: Launch) -> list[Count]:
    """Return the passes as they run in this launch."""
    return recorded.kept if launch.resident or part.kept else recorded.reread


def predict(
    op: Op,
    dtype: str,
    gpu: Gpu,
    rows: int,
    vocab: int,
    recorded: list[Recorded],
    logged: dict[str, Launch],
) -> Prediction:
    """Apply the model to a call."""
    entries, of_dtype = float(rows) * vocab, DTYPES[dtype]
    stages, used, every = [], [], []
    for part, counted in zip(op.parts, recorded, strict=True):
        launch = next(x for role, x in logged.items() if re.fullmatch(part.role, role))
        blocks = launch.blocks(gpu, counted.registers)
        counts = passes_of(part, counted, launch)
        scaled = tuple(
            count_of_pass(over, count, launch, entries, of_dtype, blocks, counted.copies > 0)
            for over, count in zip(part.passes, counts, strict=True)
        )
        at_a_time = launch.teams(gpu, counted.registers)
        serial = rows * part.serial.seconds(gpu, launch) / at_a_time
        stages.append(Stage(scaled, serial, blocks))
        used.append(launch)
        every += counts
    passes = [x for stage in stages for x in stage.passes]
    return Prediction(
        *(op, dtype, gpu, tuple(used)),
        instructions=sum(x.instructions for x in every),
        mufu=sum(x.pipes.get("mufu", 0.0) for x in every),
        checked=sum(x.checked for x in every),
        under_way=min(x.under_way for x in passes if x.read),
        moved=sum(x.read + x.written for x in passes),
        floor=of_dtype.bytes(op.reads, op.writes) * entries / gpu.roof,
        times=times_of(gpu, stages),
    )


def load() -> tuple[Counts, Launches]:
    """Return the recorded counts, by op and dtype, and launches for the default vocabulary."""
    data = json.loads(RECORD.read_text())
    counts: Counts = {}
    for key, parts in data["loops"].items():
        op, _, dtype = key.rpartition(", ")
        counts.setdefault(op, {})[dtype] = [Recorded.from_json(x) for x in parts]
    logged = {
        (x["op"], x["dtype"], x["capability"]): {r: Launch(**y) for r, y in x["roles"].items()}
        for x in data["launches"]
    }
    return counts, logged


def save(library: Path) -> None:
    """Write predicted_loops.json from a library and the launch log."""
    loops = record(parse(disassemble(library, "sm_90")), registers(library, "sm_90"))
    capabilities = sorted({gpu.capability for gpu in GPUS.values()})
    logged = launches(
        [(op.name, dtype) for op in OPS.values() for dtype in op.dtypes], VOCAB, capabilities
    )
    head = {"about": ABOUT, "sources": sources_hash(), "vocab": VOCAB}
    calls = [
        {"op": op, "dtype": dtype, "capability": capability, "roles": _used(OPS[op], roles)}
        for (op, dtype, capability), roles in logged.items()
    ]
    counts = {
        f"{op}, {dtype}": parts for op, each in loops.items() for dtype, parts in each.items()
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in counts.items()]
    # One line a call and a kernel, so that a difference can be read.
    RECORD.write_text(
        f"{json.dumps(head)[:-1]},\n"
        f'"launches": [\n{_lines(json.dumps(x) for x in calls)}\n],\n'
        f'"loops": {{\n{_lines(lines)}\n}}}}\n'
    )


def _lines(items: Iterable[str]) -> str:
    return ",\n".join(f" {x}" for x in items)


def _used(op: Op, roles: dict[str, Launch]) -> dict[str, dict[str, Any]]:
    """Return the launches of the op's parts; its other kernels do next to nothing."""
    return {
        role: launch._asdict()
        for role, launch in roles.items()
        if any(re.fullmatch(part.role, role) for part in op.parts)
    }


def predictions(
    ops: list[Op], dtypes: list[str], gpus: list[Gpu], rows: int, vocab: int
) -> list[Prediction]:
    """Predict every combination."""
    counts, logged = load()
    if vocab != VOCAB:
        calls = [(op.name, dtype) for op in ops for dtype in dtypes if dtype in op.dtypes]
        logged = launches(calls, vocab, sorted({gpu.capability for gpu in gpus}))
    return [
        predict(
            *(op, dtype, gpu, rows, vocab, counts[op.name][dtype]),
            logged[op.name, dtype, gpu.capability],
        )
        for gpu in gpus
        for dtype in dtypes
        for op in ops
        if dtype in op.dtypes
    ]


def table(found: list[Prediction], rows: int, vocab: int) -> "Table":
    """One row a call. Times in ms."""
    from rich.table import Table

    out = Table(title=f"Predicted, not measured: {rows:,} x {vocab:,}. Times in ms")
    for name in ("GPU", "dtype", "op"):
        out.add_column(name, no_wrap=True)
    numbers = ("instr. an entry", "bytes", "issue", "mufu", "loads", "serial")
    for name in (*numbers, "binds", "sum", "predicted", "copy floor", "of the roof"):
        out.add_column(name, justify="right")
    for x in found:
        causes = (f"{1e3 * seconds:.2f}" for seconds in x.times[:5])
        out.add_row(
            *(x.gpu.name, x.dtype, x.op.name, f"{x.instructions:.0f}", *causes, x.times.binds),
            *(f"{1e3 * seconds:.2f}" for seconds in (x.times.total, x.times.predicted, x.floor)),
            f"{x.of_roof:.0%}",
        )
    return out


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--gpu", nargs="+", choices=GPUS, default=["H200"])
    add("--op", nargs="+", default=[""], help="names or their beginnings; default: all")
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--rows", type=int, default=ROWS)
    add("--vocab", type=int, default=VOCAB)
    add("--json", action="store_true")
    add("--record", action="store_true", help="read the SASS and the launch log again first")
    add("--library", type=Path, default=LIBRARY, help="for --record")
    given = options.parse_args()
    if given.record:
        if not given.library.exists():
            raise SystemExit(f"{given.library} is missing: run tests/test_cuda_build.py")
        save(given.library)
    recorded = load()[0]
    ops = [OPS[name] for name in recorded if name.startswith(tuple(given.op))]
    if not ops:
        raise SystemExit(f"--op: none of {', '.join(recorded)}")
    gpus = [GPUS[name] for name in given.gpu]
    found = predictions(ops, given.dtype, gpus, given.rows, given.vocab)
    if json.loads(RECORD.read_text())["sources"] != sources_hash():
        note = "note: the sources have changed since the instructions were recorded (--record)"
        print(note, file=sys.stderr)
    if given.json:
        print(json.dumps([x.as_json() for x in found], indent=1))
        return
    try:
        from rich.console import Console
    except ImportError:
        raise SystemExit("the table needs rich: pip install fastkd[bench]") from None
    Console(width=170).print(table(found, given.rows, given.vocab))
    print(ASSUMPTIONS)


if __name__ == "__main__":
    main()
