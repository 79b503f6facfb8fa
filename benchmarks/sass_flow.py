"""Control flow of a kernel: basic blocks, natural loops, and the main path through a loop.

The main path of a loop is the way from its first block back to it that does the most pack work: the
most 16-byte accesses (to global or shared memory), of ways with equally many the fewest
instructions. Everything else in the loop is cold: packs that are cut by the end of a row, a new
origin for the sums, labels, infinities. A caller that knows what the call does (one gradient, not
two; rows in shared memory) may ask for fewer accesses than the most: see `Work`.

A loop inside the loop that moves no 16 bytes (over the words of a pack) counts with
WORDS_A_PACK rounds, if the main path goes through it; how many it has is not read. A loop that
waits for an mbarrier counts once.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.sass_code import Instruction

WORDS_A_PACK = 4


class Work(NamedTuple):
    """What a path does: its 16-byte accesses and its MUFU operations."""

    loads: int = 0  # from global memory
    stores: int = 0  # to global memory
    shared_loads: int = 0
    shared_stores: int = 0
    copies: int = 0  # from global to shared memory, without registers
    mufu: int = 0

    @property
    def accesses(self) -> tuple[int, ...]:
        """The 16-byte accesses."""
        return self[:5]

    @property
    def total(self) -> int:
        """All accesses."""
        return sum(self.accesses)

    @property
    def shape(self) -> tuple[int, ...]:
        """The proportions of the accesses."""
        return tuple(x // max(math.gcd(*self.accesses), 1) for x in self.accesses)


@dataclass
class Block:
    """Instructions that are entered at the first and left at the last."""

    number: int
    code: list[Instruction]
    next: list[int] = field(default_factory=list)

    @property
    def work(self) -> Work:
        """What it does."""
        return work_of(self.code)


def work_of(code: Iterable[Instruction]) -> Work:
    """Count 16-byte accesses and MUFU operations."""
    kinds = [
        (x.load16, x.store16, x.shared_load16, x.shared_store16, x.copy16, x.name == "MUFU")
        for x in code
    ]
    return Work(*(sum(kind) for kind in zip(*kinds, strict=True))) if kinds else Work()


def blocks_of(code: list[Instruction]) -> list[Block]:
    """Split a kernel into basic blocks with their successors."""
    place = {instruction.address: i for i, instruction in enumerate(code)}
    goes = [_successors(code, i, place) for i in range(len(code))]
    entered = _entered_by_table(code, goes, place)
    for i, instruction in enumerate(code):
        if instruction.name in ("BRX", "BRXU"):
            goes[i] = entered
    leaders = {0}
    for i, successors in enumerate(goes):
        if successors != [i + 1]:
            leaders.update(successors)
            leaders.add(i + 1)
    starts = sorted(x for x in leaders if x < len(code))
    number = {start: n for n, start in enumerate(starts)}
    blocks = []
    for n, start in enumerate(starts):
        end = starts[n + 1] if n + 1 < len(starts) else len(code)
        successors = [number[x] for x in goes[end - 1] if x in number]
        blocks.append(Block(n, code[start:end], list(dict.fromkeys(successors))))
    return blocks


def _successors(code: list[Instruction], i: int, place: dict[int, int]) -> list[int]:
    x = code[i]
    if x.name in ("BRA", "JMP"):
        to = [place[x.target]] if x.target in place else []
        extra = ".DIV" in x.opcode or any(
            o.lstrip("!~").startswith(("P", "UP")) for o in x.operands
        )
        return [*to, i + 1] if x.conditional or extra else to
    if x.name == "BSYNC":
        return [_end_of_bssy(code, i, place)]
    if x.name in ("EXIT", "RET", "BRX", "BRXU"):
        return [i + 1] if x.conditional else []
    return [i + 1]


def _entered_by_table(
    code: list[Instruction], goes: list[list[int]], place: dict[int, int]
) -> list[int]:
    """Where a jump through a table may go: what is reached in no other way."""
    reached: set[int] = set()

    def reach(begin: int) -> None:
        waiting = [begin]
        while waiting:
            i = waiting.pop()
            if i < len(code) and i not in reached:
                reached.add(i)
                waiting += goes[i]

    reach(0)
    for x in code:
        if x.name == "CALL" and _is_hex(x) and int(x.operands[-1], 16) in place:
            reach(place[int(x.operands[-1], 16)])
    entered = []
    for i, x in enumerate(code):
        if i not in reached and x.name != "NOP":
            entered.append(i)
            reach(i)
    return entered


def _is_hex(instruction: Instruction) -> bool:
    return bool(instruction.operands) and instruction.operands[-1].startswith("0x")


def _end_of_bssy(code: list[Instruction], i: int, place: dict[int, int]) -> int:
    """Where threads go on after a BSYNC: what the BSSY of that barrier names."""
    for before in reversed(code[:i]):
        if before.name == "BSSY" and before.barrier == code[i].barrier:
            return place.get(before.target or -1, i + 1)
    return i + 1


@dataclass
class Loop:
    """A natural loop: its first block, all its blocks, the blocks that jump back."""

    head: int
    blocks: set[int]
    back: set[int]


def loops_of(blocks: list[Block]) -> list[Loop]:
    """Return the natural loops, inner ones first."""
    order, before = _reverse_postorder(blocks)
    dominator = _dominators(order, before)
    found: dict[int, Loop] = {}
    for n in order:
        for to in blocks[n].next:
            if to in dominator and _dominates(dominator, to, n):
                loop = found.setdefault(to, Loop(to, {to}, set()))
                loop.back.add(n)
                waiting = [n]
                while waiting:
                    x = waiting.pop()
                    if x not in loop.blocks:
                        loop.blocks.add(x)
                        waiting += before[x]
    return sorted(found.values(), key=lambda loop: len(loop.blocks))


def _reverse_postorder(blocks: list[Block]) -> tuple[list[int], dict[int, list[int]]]:
    seen, order = {0}, []
    stack = [(0, iter(blocks[0].next))]
    while stack:
        n, rest = stack[-1]
        to = next((x for x in rest if x not in seen), None)
        if to is None:
            order.append(n)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(blocks[to].next)))
    order.reverse()
    before: dict[int, list[int]] = {n: [] for n in order}
    for n in order:
        for to in blocks[n].next:
            before[to].append(n)
    return order, before


def _dominators(order: list[int], before: dict[int, list[int]]) -> dict[int, int]:
    rank = {n: i for i, n in enumerate(order)}
    dominator = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for n in order[1:]:
            new = None
            for x in before[n]:
                if x in dominator:
                    new = x if new is None else _meet(dominator, rank, x, new)
            if new is not None and dominator.get(n) != new:
                dominator[n] = new
                changed = True
    return dominator


def _meet(dominator: dict[int, int], rank: dict[int, int], a: int, b: int) -> int:
    while a != b:
        while rank[a] > rank[b]:
            a = dominator[a]
        while rank[b] > rank[a]:
            b = dominator[b]
    return a


def _dominates(dominator: dict[int, int], a: int, b: int) -> bool:
    while b != a and dominator[b] != b:
        b = dominator[b]
    return a == b


@dataclass(frozen=True)
class Path:
    """One round of a loop: its work, its instructions with how often each is issued."""

    work: Work
    cost: int
    parts: tuple[tuple[int, tuple[Instruction, ...]], ...]  # (rounds, instructions)

    @property
    def code(self) -> list[Instruction]:
        """The instructions in order, inner loops once."""
        return [x for _, part in self.parts for x in part]

    @property
    def inner_rounds(self) -> int:
        """Inner loops on the path."""
        return sum(rounds > 1 for rounds, _ in self.parts)

    def after(self, head: "Path") -> "Path":
        """Return the path `head`, then this."""
        work = Work(*(a + b for a, b in zip(head.work, self.work, strict=True)))
        return Path(work, head.cost + self.cost, head.parts + self.parts)


def paths_of(blocks: list[Block], loop: Loop, loops: list[Loop]) -> dict[Work, Path]:
    """Return, by what it does, the shortest path of one round of the loop."""
    inner = [x for x in loops if x.head != loop.head and x.blocks < loop.blocks]
    tops = [x for x in inner if not any(x.blocks < y.blocks for y in inner)]
    owner = {n: x for x in tops for n in x.blocks}

    def node(n: int) -> int:
        return owner[n].head if n in owner else n

    def after(n: int) -> list[int]:
        members = owner[n].blocks if n in owner else {n}
        ends = (to for m in members for to in blocks[m].next if to not in members)
        return list(dict.fromkeys(node(to) for to in ends if to in loop.blocks))

    found: dict[int, dict[Work, Path]] = {loop.head: {Work(): Path(Work(), 0, ())}}
    done: dict[Work, Path] = {}
    for n in _topological(loop.head, after):
        starts = found.pop(n).values()
        ends = [to for to in after(n) if to != loop.head]
        if (owner[n].blocks if n in owner else {n}) & loop.back:
            ends.append(loop.head)
        inside = _rounds(blocks, owner[n], loops) if n in owner else []
        for to in ends:
            into = done if to == loop.head else found.setdefault(to, {})
            for own in inside or [_straight(blocks[n], to)]:
                for start in starts:
                    _keep(into, own.after(start))
    return done


def _straight(block: Block, to: int) -> Path:
    """Return the block as it runs before block `to`.

    The branch at its end tells which of its guarded instructions do nothing: they are issued, but
    are no accesses.
    """
    last = block.code[-1]
    work = block.work
    if last.name == "BRA" and last.conditional and len(block.next) == 2:
        taken = to == block.next[0]
        off = _opposite(last.guard) if taken else last.guard
        work = work_of(x for i, x in enumerate(block.code) if not _is_off(block.code, i, off))
    return Path(work, len(block.code), ((1, tuple(block.code)),))


def _opposite(guard: str) -> str:
    return guard[1:] if guard.startswith("!") else f"!{guard}"


def _is_off(code: list[Instruction], i: int, guard: str) -> bool:
    """Whether instruction i has this guard, with the value that it has at the end of the block."""
    if code[i].guard != guard:
        return False
    name = guard.lstrip("!")
    return not any(name in x.operands[:2] and "SETP" in x.name for x in code[i:])


def _rounds(blocks: list[Block], loop: Loop, loops: list[Loop]) -> list[Path]:
    """Return the paths of all rounds of an inner loop."""
    waits = any(x.name == "SYNCS" for n in loop.blocks for x in blocks[n].code)
    times = 1 if waits else WORDS_A_PACK
    every = []
    for path in paths_of(blocks, loop, loops).values():
        parts = tuple((times * rounds, part) for rounds, part in path.parts)
        work = path.work._replace(mufu=times * path.work.mufu)
        every.append(Path(work, times * path.cost, parts))
    return every


def _keep(into: dict[Work, Path], path: Path) -> None:
    if path.work not in into or path.cost < into[path.work].cost:
        into[path.work] = path


def _topological(head: int, after: Callable[[int], list[int]]) -> list[int]:
    order: list[int] = []
    seen = {head}
    stack = [(head, iter(after(head)))]
    while stack:
        n, rest = stack[-1]
        to = next((x for x in rest if x not in seen and x != head), None)
        if to is None:
            order.append(n)
            stack.pop()
        else:
            seen.add(to)
            stack.append((to, iter(after(to))))
    return order[::-1]


def main_path(paths: Iterable[Path]) -> Path:
    """Return the path with the most 16-byte accesses, of several the shortest."""
    return min(paths, key=lambda path: (-path.work.total, path.cost))
