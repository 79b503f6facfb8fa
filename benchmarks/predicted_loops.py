"""From SASS to instructions an entry: which loop of a kernel is which pass of an op.

A loop is taken for a pass if on some path through it the 16-byte accesses are a multiple of the
tensors that the pass reads and writes, with the MUFU operations that it needs at least. Of several
such loops a pass takes the one with the most packs a round, of these the one with the fewest
instructions: loops for rare rows (a divergence near 0, soft bounds) do more. Each loop is one pass.
A pass that writes nothing takes a loop without 16-byte stores.
A pass that fills shared memory takes a loop that does so, if there is one, and any pass a loop
without a barrier. Where rows are copied to shared memory (cp.async, bulk), the first pass takes the
first of its loops. If rows stay there, a loop that only copies is added to it. Not so in a kernel
with bulk copies: one thread copies the rows that stay, and the loop that copies is for other rows.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.predicted_ops import DTYPES, OPS, Dtype, Op, Over, Part
from benchmarks.sass import Kernel, Pass, Round, read
from benchmarks.sass_code import Instruction


@dataclass(frozen=True)
class Count:
    """One pass, by entry of a row (a pair, where it reads two tensors)."""

    instructions: float
    pipes: dict[str, float]
    in_flight: int
    checked: float  # exponentials and logarithms that also take denormals


@dataclass(frozen=True)
class Recorded:
    """One kernel of a call: its passes if rows stay in shared memory, and if they do not."""

    kept: list[Count]
    reread: list[Count]
    registers: int
    local: int
    copies: int  # copies to shared memory that need no register, in the code

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Recorded":
        """Return what `as_json` wrote."""
        passes = {k: [Count(**x) for x in data[k]] for k in ("kept", "reread")}
        return Recorded(**{**data, **passes})


@dataclass
class _Found:
    loop: Pass
    packs: int  # a round
    round: Round = field(repr=False)


def count_kernel(
    kernel: Kernel, passes: tuple[Over, ...], dtype: str, registers: int = 0
) -> Recorded:
    """Find an op's passes in a kernel."""
    used: set[int] = set()
    kept, reread = [], []
    of_dtype = DTYPES[dtype]
    for over in passes:
        entries = 16 // (over.item or of_dtype.pack)
        every = [x for loop in kernel.passes for x in _matches(loop, over, entries, of_dtype)]
        # Other loads of 8 bytes look like packs of 8 bytes: a round with one pack has none of them.
        if of_dtype.unit < 16:
            every = [x for x in every if x.packs == 1] or every
        free = [x for x in every if x.loop.begin not in used] or every
        if not free:
            raise LookupError(f"{kernel.name}: no loop is the pass {over}")
        best = _best(free, over, kernel, of_dtype, kept_rows=True)
        used.add(best.loop.begin)
        same = [x for x in every if x.loop is best.loop and x.packs == best.packs]
        other = _best(same, over, kernel, of_dtype, kept_rows=False)
        first = None if over.again or kernel.bulk else _start(kernel, over, of_dtype)
        kept.append(_count(best, entries, first))
        reread.append(_count(other, entries))
    return Recorded(kept, reread, registers, kernel.local, kernel.copies)


def _matches(loop: Pass, over: Over, entries: int, dtype: Dtype) -> Iterator[_Found]:
    accesses = dtype.accesses(over.reads, over.writes)
    rounds = {} if loop.stores and not over.writes else loop.rounds
    for work, found in rounds.items():
        reads = work.loads + work.shared_loads
        packs = reads // accesses[0]
        moves = (packs * accesses[0], packs * accesses[1]) == (reads, work.stores)
        if packs and moves and work.mufu >= packs * entries * over.mufu:
            yield _Found(loop, packs, found)


def _best(found: list[_Found], over: Over, kernel: Kernel, dtype: Dtype, kept_rows: bool) -> _Found:
    def order(x: _Found) -> tuple[int, ...]:
        source = _source(x, over, kernel, dtype, kept_rows)
        place = x.loop.begin if kernel.copies and not over.again else 0
        return *source, x.loop.barrier, -x.packs, place, x.round.instructions

    return min(found, key=order)


def _source(x: _Found, over: Over, kernel: Kernel, dtype: Dtype, kept: bool) -> tuple[int, ...]:
    """Smaller: more like what the pass does. kept: rows stay in shared memory."""
    work, reads = x.round.work, x.packs * dtype.accesses(over.reads, 0)[0]
    from_memory = work.loads + work.copies
    if over.again:
        return (from_memory if kept else abs(reads - from_memory),)
    if kernel.copies:  # copied to shared memory by loops of their own, or by one thread
        return (from_memory if kept else abs(reads - from_memory), work.shared_stores)
    # A store under a condition counts, so that there may be more of them than this call makes.
    stores_else = work.shared_stores < reads if kept else work.shared_stores > 0
    return (work.shared_loads if over.rows else work.loads, stores_else)


def _start(kernel: Kernel, over: Over, dtype: Dtype) -> _Found | None:
    """Return the shortest loop that only copies the tensors of a pass to shared memory."""
    every = []
    for loop in kernel.passes:
        work = loop.main.work
        reads = dtype.accesses(over.reads, 0)[0]
        packs = work.copies // reads
        if packs and work.copies == packs * reads == work.total:
            every.append(_Found(loop, packs, loop.main))
    return min(every, key=lambda x: x.round.instructions / x.packs, default=None)


def _count(x: _Found, entries: int, start: _Found | None = None) -> Count:
    """Return a pass by entry. start: the loop that copies the rows before it."""
    count = _each(x, entries)
    if start is None:
        return count
    more = _each(start, entries)
    pipes = {k: count.pipes.get(k, 0) + more.pipes.get(k, 0) for k in count.pipes | more.pipes}
    instructions = count.instructions + more.instructions
    return Count(instructions, pipes, count.in_flight, count.checked)


def _each(x: _Found, entries: int) -> Count:
    def each(number: float) -> float:
        return round(number / (x.packs * entries), 3)

    pipes = {pipe: each(n) for pipe, n in x.round.pipes.items() if n}
    return Count(each(x.round.instructions), pipes, x.round.in_flight, each(x.round.checked))


def record(
    code: dict[str, list[Instruction]],
    registers: dict[str, int],
    ops: dict[str, Op] = OPS,
) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return, by op and dtype, the counts of its kernels."""
    known: dict[str, Kernel] = {}

    def counts(part: Part, dtype: str) -> dict[str, Any]:
        pattern = re.compile(part.pattern(dtype))
        names = [name for name in code if pattern.search(name)]
        if len(names) != 1:
            raise LookupError(f"{part.kernel}, {dtype}: {len(names)} kernels match")
        name = names[0]
        if name not in known:
            unit = DTYPES[dtype].unit
            known[name] = read(name, [replace(x, unit=unit) for x in code[name]])
        return count_kernel(known[name], part.passes, dtype, registers.get(name, 0)).as_json()

    return {
        name: {dtype: [counts(part, dtype) for part in op.parts] for dtype in op.dtypes}
        for name, op in ops.items()
    }
