"""What nvcc made of the kernels' loops, read from their SASS. No GPU is needed.

    python -m benchmarks.sass FILE [--match TEXT] [--arch sm_90] [--all] [--json]

FILE: a library, object or cubin (disassembled with `cuobjdump` of the CUDA toolkit or of the pip
packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm), or the text that `cuobjdump -sass` prints.

A pass over packs is a loop with 16-byte accesses of its own (outside the loops in it), without a
shuffle on its main path. A loop with a barrier of the block or cluster is one only if no loop in it
is: a loop over rows is none. Of each pass:

  path          its main path (see `sass_flow`): one round with the most 16-byte accesses and, of
                such rounds, the fewest instructions. The rest of the loop is cold.
  instructions  on that path, by pipe. A scheduler issues one warp instruction a cycle.
  accesses      16-byte loads and stores on that path, to global and to shared memory, and copies
                from one to the other (cp.async)
  in flight     the most 16-byte global loads of one thread that are under way at once: issued, and
                no later instruction has read their result yet. 1: each load waits for the last.
  checked       exp2 and log2 on that path that also take denormals, which costs instructions

A pass is hot if no other pass of the kernel has the same kinds of accesses in the same proportion,
but more of them a round: of an unrolled loop and the loop over its remainder, the first is hot.

Of a kernel: accesses to local memory (spills, arrays that are not in registers).

Limits: the rounds of an inner loop are assumed, not read; the order of the text stands for the
order of issue; jumps through tables are taken to reach all code that nothing else reaches.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.sass_code import PIPES, Instruction, is_range_checked, parse
from benchmarks.sass_flow import (
    Block,
    Loop,
    Work,
    blocks_of,
    loops_of,
    main_path,
    paths_of,
)
from benchmarks.sass_flow import Path as Way

BARRIERS = ("BAR", "UCGABAR_ARV", "UCGABAR_WAIT")


def find_tool(name: str) -> str | None:
    """Return the path of a tool of the CUDA toolkit, or of NVIDIA's packages on PyPI."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        for path in Path(folder).rglob(name):
            return str(path)
    return None


def disassemble(path: Path, arch: str = "") -> str:
    """Return the SASS of a binary, or the file's text if it is none."""
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return path.read_text(errors="replace")
    return _cuobjdump("-sass", path, arch)


def registers(path: Path, arch: str = "") -> dict[str, int]:
    """Return the registers a thread of each kernel of a binary."""
    found, name = {}, ""
    for line in _cuobjdump("-res-usage", path, arch).splitlines():
        head, _, rest = line.strip().partition(" ")
        if head == "Function":
            name = rest.rstrip(":")
        elif head.startswith("REG:"):
            found[name] = int(head.removeprefix("REG:"))
    return found


def _cuobjdump(what: str, path: Path, arch: str) -> str:
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if not (cuobjdump and nvdisasm):
        raise SystemExit("needs cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    search = f"{Path(nvdisasm).parent}{os.pathsep}{os.environ['PATH']}"
    command = [cuobjdump, what, *(["-arch", arch] if arch else []), str(path)]
    environment = {**os.environ, "PATH": search}
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


def in_flight(code: list[Instruction]) -> int:
    """Return the most 16-byte global loads under way at once if this code runs in a loop."""
    waiting: list[frozenset[int]] = []
    most = 0
    for x in code + code:  # a load for the next round is read in the next round
        waiting = [w for w in waiting if not w & (x.reads | x.writes)]
        if x.load16:
            waiting.append(x.writes)
            most = max(most, len(waiting))
    return most


def _accesses(work: Work) -> dict[str, int]:
    return dict(zip(Work._fields[:5], work.accesses, strict=True))


@dataclass(frozen=True)
class Round:
    """One round on one path of a pass."""

    way: Way

    @property
    def work(self) -> Work:
        """Its 16-byte accesses."""
        return self.way.work

    @cached_property
    def pipes(self) -> dict[str, int]:
        """Instructions by pipe."""
        count = Counter({pipe: 0 for pipe in PIPES})
        for rounds, part in self.way.parts:
            for x in part:
                count[x.pipe] += rounds
        return dict(count)

    @property
    def instructions(self) -> int:
        """All instructions."""
        return self.way.cost

    @cached_property
    def in_flight(self) -> int:
        """Loads under way: see the module."""
        return in_flight(self.way.code)

    @cached_property
    def checked(self) -> int:
        """Exponentials and logarithms that also take denormals."""
        code, found, place = self.way.code, 0, 0
        for rounds, part in self.way.parts:
            found += rounds * sum(
                is_range_checked(code, i) for i in range(place, place + len(part))
            )
            place += len(part)
        return found

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "instructions": self.instructions,
            "pipes": self.pipes,
            **_accesses(self.work),
            "in_flight": self.in_flight,
            "checked": self.checked,
            "inner_loops": self.way.inner_rounds,
        }


@dataclass
class Pass:
    """A loop over packs."""

    begin: int  # address of the loop's first instruction
    size: int  # instructions in the loop, hot or not
    bulk: int  # copies of many bytes from global to shared memory
    barrier: bool  # of the block or cluster, in the loop
    rounds: dict[Work, Round]
    stores: bool  # 16 bytes to global memory, on some path
    hot: bool = False

    @cached_property
    def main(self) -> Round:
        """Its main path."""
        best = main_path(x.way for x in self.rounds.values())
        return self.rounds[best.work]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "begin": f"{self.begin:#x}",
            "hot": self.hot,
            "size": self.size,
            "bulk": self.bulk,
            **self.main.as_json(),
        }


@dataclass
class Kernel:
    """A kernel's passes over packs, in the order of its code."""

    name: str
    passes: list[Pass]
    local: int  # accesses to local memory
    copies: int  # from global to shared memory without registers: of 16 bytes, or in bulk
    bulk: int = 0  # of these, those in bulk

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "local": self.local,
            "copies": self.copies,
            "bulk": self.bulk,
            "passes": [x.as_json() for x in self.passes],
        }


def read(name: str, code: list[Instruction]) -> Kernel:
    """Find a kernel's passes."""
    blocks = blocks_of(code) if code else []
    loops = loops_of(blocks) if blocks else []
    passes = sorted(_passes(blocks, loops), key=lambda x: x.begin)
    for x in passes:
        alike = (y.main.work.total for y in passes if y.main.work.shape == x.main.work.shape)
        x.hot = x.main.work.total == max(alike)
    local, bulk = sum(x.local for x in code), sum(x.bulk for x in code)
    return Kernel(name, passes, local, bulk + sum(x.copy16 > 0 for x in code), bulk)


def _passes(blocks: list[Block], loops: list[Loop]) -> Iterator[Pass]:
    moving: list[Loop] = []  # loops with accesses of their own, inner ones first
    for loop in loops:
        inside = [x for x in loops if x.blocks < loop.blocks]
        own = loop.blocks.difference(*(x.blocks for x in inside))
        code = [x for n in loop.blocks for x in blocks[n].code]
        if not any(blocks[n].work.total for n in own):
            continue
        barrier = any(x.name in BARRIERS for x in code)
        if barrier and any(x.blocks < loop.blocks for x in moving):
            continue
        moving.append(loop)
        rounds = {work: Round(way) for work, way in paths_of(blocks, loop, loops).items()}
        found = Pass(
            blocks[loop.head].code[0].address,
            len(code),
            sum(x.bulk for x in code),
            barrier,
            rounds,
            any(blocks[n].work.stores for n in loop.blocks),
        )
        if not any(x.name == "SHFL" for x in found.main.way.code):
            yield found


def kernels(text: str, match: str = "") -> dict[str, Kernel]:
    """Read the kernels of a disassembly whose mangled names contain `match`."""
    return {name: read(name, code) for name, code in parse(text).items() if match in name}


def _print(kernel: Kernel, every: bool) -> None:
    print(
        f"{kernel.name}\n    local memory accesses {kernel.local}, "
        f"copies to shared {kernel.copies}, in bulk {kernel.bulk}"
    )
    for x in kernel.passes:
        if not (x.hot or every):
            continue
        main = x.main
        pipes = ", ".join(f"{pipe} {n}" for pipe, n in main.pipes.items() if n)
        work = ", ".join(f"{k.replace('_', ' ')} {n}" for k, n in _accesses(main.work).items() if n)
        print(
            f"    {x.begin:#x}{'' if x.hot else ' (cold)'}: {main.instructions} instructions of "
            f"{x.size} ({pipes}); 16-byte {work}; in flight {main.in_flight}; "
            f"checked {main.checked}"
        )


def main() -> None:
    """Print the report."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("file", type=Path)
    options.add_argument("--match", default="", help="only kernels whose mangled name has this")
    options.add_argument("--arch", default="", help="for example sm_90")
    options.add_argument("--all", action="store_true", help="cold passes, too")
    options.add_argument("--json", action="store_true")
    given = options.parse_args()
    found = kernels(disassemble(given.file, given.arch), given.match)
    if given.json:
        print(json.dumps([x.as_json() for x in found.values()], indent=1))
        return
    for kernel in found.values():
        _print(kernel, given.all)


if __name__ == "__main__":
    main()
