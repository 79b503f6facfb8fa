"""The numbers fastkd promises, each beside what this machine gives."""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

import fastkd
from benchmarks.byte_level import (
    alm_loss_case,
    byte_log_probs_case,
    chunk_log_likelihood_case,
)
from benchmarks.cases import kl_div_case, softmax_divergence_case
from benchmarks.command import budget_of, finish, run_cases
from benchmarks.compressed import (
    clipped_divergence_case,
    teacher_topk_case,
    token_stats_case,
    topk_divergence_case,
)
from benchmarks.harness import Case, CaseResult, make_step
from benchmarks.measure import MIB, memory_of
from benchmarks.shapes import GEMMA_3, Shape, correlated_logits
from benchmarks.student_only import cross_entropy_case, token_log_probs_case

_ours = partial(softmax_divergence_case, peers=False)
_with_torch = partial(softmax_divergence_case, packages=False)
CASES: dict[str, Callable[[], Case]] = {
    "float32": partial(_with_torch, "forward_kl"),
    "bfloat16": partial(_with_torch, "forward_kl", "bfloat16"),
    "reverse_kl": partial(_ours, "reverse_kl"),
    "jsd": partial(_ours, "jsd"),
    "tvd": partial(_ours, "tvd"),
    "loss": partial(_ours, "forward_kl", gradient=False),
    "long row": partial(_ours, "forward_kl", vocab=GEMMA_3, rows=1),
    "call": partial(_ours, "forward_kl", vocab=8, rows=1, gradient=False),
    "call with backward": partial(_ours, "forward_kl", vocab=8, rows=1),
    "kl_div": kl_div_case,
    "teacher_topk": teacher_topk_case,
    "token_stats": token_stats_case,
    "topk_divergence": topk_divergence_case,
    "clipped_divergence": clipped_divergence_case,
    "chunk_log_likelihood": chunk_log_likelihood_case,
    "chunk_log_likelihood, forward": partial(chunk_log_likelihood_case, gradient=False),
    "byte_log_probs": byte_log_probs_case,
    "byte_log_probs, forward": partial(byte_log_probs_case, gradient=False),
    "alm_loss": alm_loss_case,
    "cross_entropy": cross_entropy_case,
    "cross_entropy, entropy": partial(cross_entropy_case, entropy=True),
    "token_log_probs": token_log_probs_case,
    "token_log_probs, forward": partial(token_log_probs_case, gradient=False),
    "token_log_probs, entropy": partial(token_log_probs_case, entropy=True),
}
ALL = tuple(CASES)
#: What a step may hold beyond its gradient: vectors over rows, allocator and page granularity.
SLACK_BYTES = MIB


@dataclass(frozen=True)
class Goal:
    """A promise: `measured` must not pass `limit`, from above or, `at_least`, from below."""

    what: str
    limit: float
    measured: float
    unit: str
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether it is kept; not measured is not kept."""
        if self.at_least:
            return self.measured >= self.limit
        return self.measured <= self.limit

    def as_json(self) -> dict[str, Any]:
        """Everything about it; JSON knows no NaN."""
        measured = None if math.isnan(self.measured) else self.measured
        return asdict(self) | {"measured": measured, "reached": self.reached}


def run(options: argparse.Namespace, device: torch.device, names: tuple[str, ...]) -> int:
    """Run the named cases and their variants (`name, variant`), then print goals with verdicts."""
    from rich.console import Console
    from rich.table import Table

    names = tuple(name for name in CASES if {name, name.partition(", ")[0]} & set(names))
    found = run_cases(
        [CASES[name] for name in names], device, budget_of(options), options.fresh_memory
    )
    results = dict(zip(names, found, strict=True))
    goals = [goal for name in names for goal in _goals(name, results)]
    if "float32" in names:
        goals += _memory_goals(results["float32"], device)
    kept = [goal.as_json() for goal in goals]
    status = finish(found, options, "headline" if names == ALL else f"headline_{names[0]}", kept)

    table = Table(title=f"{sum(g.reached for g in goals)} of {len(goals)} goals reached")
    table.add_column("goal")
    table.add_column("limit", justify="right")
    table.add_column("measured", justify="right")
    table.add_column("verdict")
    for goal in goals:
        sign = ">=" if goal.at_least else "<="
        verdict = "[green]pass" if goal.reached else "[bold red]MISS"
        limit = f"{sign} {goal.limit:.4g} {goal.unit}"
        table.add_row(goal.what, limit, f"{goal.measured:.4g} {goal.unit}", verdict)
    Console(width=110).print(table)
    return status


def _goals(name: str, results: dict[str, CaseResult]) -> list[Goal]:
    result = results[name]
    title = result.title
    seconds, roof = result.find().seconds, result.times_roof(result.find())

    def faster(than: str, limit: float) -> Goal:
        speedup = result.speedup_over(result.find(than))
        return Goal(f"{title}: faster than {than}", limit, speedup, "x", at_least=True)

    if name == "float32":
        ours = Goal(f"{title}: over the copy roof", 1.8, roof, "x")
        return [ours, faster("torch.compile", 8), faster("eager", 20)]
    if name == "bfloat16":
        return [Goal(f"{title}: over its roof", 3.5, roof, "x"), faster("torch.compile", 15)]
    if name in ("reverse_kl", "jsd", "tvd"):
        return [Goal(f"{title}: over the copy roof", 2.8, roof, "x")]
    if name == "loss":
        return [Goal(f"{title}: over reading both once", 2.5, roof, "x")]
    if name == "kl_div":
        return [faster("F.kl_div", 8)]
    if name == "teacher_topk":
        return [Goal(f"{title}: over one read", 3, roof, "x"), faster("eager", 8)]
    if name == "token_stats":
        return [Goal(f"{title}: over reading both once", 3.5, roof, "x"), faster("eager", 25)]
    if name == "topk_divergence":
        return [Goal(f"{title}: over one read and one write", 2, roof, "x")]
    if name == "clipped_divergence":
        return [Goal(f"{title}: over two reads and one write", 3, roof, "x")]
    if name == "chunk_log_likelihood":
        return [Goal(f"{title}: over two reads and one write", 1.8, roof, "x")]
    if name == "chunk_log_likelihood, forward":
        return [Goal(f"{title}: over one read", 2, roof, "x")]
    if name == "byte_log_probs":
        return []
    if name == "byte_log_probs, forward":
        return [Goal(f"{title}: over one read", 4, roof, "x"), faster("eager", 5)]
    if name == "alm_loss":
        return [Goal(f"{title}: over three reads and one write", 2, roof, "x")]
    if name == "cross_entropy":
        ours = Goal(f"{title}: over one read and one write", 1.5, roof, "x")
        return [ours, faster("eager", 8)]
    if name == "cross_entropy, entropy":
        return [Goal(f"{title}: over one read and one write", 2, roof, "x")]
    if name in ("token_log_probs", "token_log_probs, entropy"):
        return [Goal(f"{title}: over two reads and one write", 1.7, roof, "x")]
    if name == "token_log_probs, forward":
        return [Goal(f"{title}: over one read", 1.5, roof, "x")]
    if name == "long row":
        large = results["float32"]
        share = result.case.shape.bytes / large.case.shape.bytes
        call = results["call with backward"].find().seconds
        limit = 1.3 * share * large.find().seconds + call
        what = f"{title}: 1.3 x the large case's time a byte + call overhead"
        return [Goal(what, limit * 1e6, seconds * 1e6, "µs")]
    limit = {"call": 30, "call with backward": 80}[name]
    return [Goal(f"{title}: call overhead", limit, seconds * 1e6, "µs")]


def _memory_goals(result: CaseResult, device: torch.device) -> list[Goal]:
    title, shape, memory = result.title, result.case.shape, result.find().memory
    peak = math.nan if memory is None else memory.peak
    inplace = _inplace_peak(shape, device)
    limit = (shape.bytes + SLACK_BYTES) / MIB
    return [
        Goal(f"{title}: peak memory, one gradient + O(rows)", limit, peak / MIB, "MiB"),
        Goal(f"{title}: inplace, O(rows)", SLACK_BYTES / MIB, inplace / MIB, "MiB"),
    ]


def _inplace_peak(shape: Shape, device: torch.device) -> float:
    """Peak of an inplace step; its logits are lost to the gradient, so they are its own."""
    small = (side.to(device, shape.dtype) for side in correlated_logits(1, shape.vocab))
    student, teacher = (side.expand(shape.rows, -1).contiguous() for side in small)
    step = make_step(
        partial(fastkd.softmax_divergence, reduction="batchmean", inplace=True),
        student.requires_grad_(),
        teacher,
    )
    step()
    fastkd.release_memory()
    memory = memory_of(step, device)
    return math.nan if memory is None else memory.peak
