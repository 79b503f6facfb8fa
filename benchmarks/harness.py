"""Running a case: check every contestant against float64, time them in turn, read their memory."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.measure import (
    Memory,
    Step,
    Timing,
    available_memory,
    cpu_seconds_of_others,
    memory_of,
    roofs,
    time_interleaved,
)
from benchmarks.shapes import Shape, Traffic

#: Student's and teacher's side [rows, vocab] to a scalar, reduced as "batchmean".
Loss = Callable[[Tensor, Tensor], Tensor]
#: The same arguments in float64 to one value a row: the definition.
Exact = Callable[[Tensor, Tensor], Tensor]

#: Relative error against float64 beyond which a contestant is wrong: some roundings of float32
#: arithmetic, or the one rounding that storing a 16-bit gradient takes.
TOLERANCES = {
    torch.float64: 1e-10,
    torch.float32: 2e-5,
    torch.bfloat16: 6e-3,
    torch.float16: 2e-3,
}
#: Gradients of a mean over many rows underflow in float16 unless scaled, as GradScaler does.
LOSS_SCALES = {torch.float16: 2.0**15}
#: So many rows differ, and are repeated: that makes the float64 truth of a large case affordable.
DISTINCT_ROWS = 8
#: With strangers on more cores than this, ratios say little.
SHARED_CORES = 0.15
OURS = "fastkd"


@dataclass(frozen=True)
class Contestant:
    """One way to compute a loss."""

    name: str
    loss: Loss
    #: About how many float32 tensors [rows, vocab] a step holds: it is not started without room.
    copies: float = 2
    #: Set where the contestant's value differs by design from the case's (gradients must agree).
    exact: Exact | None = None
    #: Gives back memory that a step keeps for the next one: such memory is a cost of the step.
    release: Callable[[], object] = lambda: None
    #: Its kernels are for a GPU alone: elsewhere it is left out.
    cuda_only: bool = False


@dataclass(frozen=True)
class Case:
    """One comparison: a shape, a definition, and those who claim to compute it."""

    name: str
    shape: Shape
    #: float64 student's and teacher's side for a number of rows and a vocabulary.
    inputs: Callable[[int, int], tuple[Tensor, Tensor]]
    exact: Exact
    contestants: Sequence[Contestant]
    gradient: bool = True
    #: Logits tensors that are read: of both sides, or of one.
    reads: int = 2

    @property
    def traffic(self) -> Traffic:
        """What the case has to move."""
        return Traffic(self.reads, int(self.gradient))

    @property
    def title(self) -> str:
        """Name, shape and what is computed."""
        return f"{self.name}, {self.shape}{', loss + gradient' if self.gradient else ''}"


@dataclass
class Measurement:
    """What became of one contestant. `wrong` and `failed` say why a time is not to be trusted."""

    name: str
    timing: Timing | None = None
    memory: Memory | None = None
    loss_error: float = math.nan
    gradient_error: float = math.nan
    wrong: str | None = None
    failed: str | None = None

    @property
    def seconds(self) -> float:
        """Median time of a step, NaN where there is none."""
        return self.timing.median if self.timing else math.nan


@dataclass
class CaseResult:
    """A case's roof and its contestants, in their order."""

    case: Case
    roof_name: str
    roof: Timing
    #: Cores that other processes kept busy meanwhile, None where unknown.
    other_cores: float | None
    measurements: list[Measurement] = field(default_factory=list)

    @property
    def shared(self) -> bool:
        """Whether other processes took part of the machine, which spoils the numbers."""
        return self.other_cores is not None and self.other_cores > SHARED_CORES

    @property
    def title(self) -> str:
        """The case's, with a mark on numbers that do not count."""
        mark = f" (shared with {self.other_cores:.1f} busy cores)" if self.shared else ""
        return self.case.title + mark

    def find(self, name: str = OURS) -> Measurement:
        """Return a contestant's measurement."""
        return next(m for m in self.measurements if m.name == name)

    def times_roof(self, measurement: Measurement) -> float:
        """Median time over the roof's."""
        return measurement.seconds / self.roof.median

    def speedup_over(self, measurement: Measurement) -> float:
        """How many times as long as fastkd it takes."""
        return measurement.seconds / self.find().seconds


def run_case(
    case: Case,
    device: torch.device,
    budget: float,
    on_progress: Callable[[str, float], None] = lambda text, done: None,
    *,
    fresh_memory: bool = False,
) -> CaseResult:
    """Check, time and weigh every contestant of `case`; timing takes `budget` seconds or so.

    `fresh_memory` times steps that keep no memory from one to the next: every step is a first.
    """
    torch.compiler.reset()
    sides = case.inputs(min(case.shape.rows, DISTINCT_ROWS), case.shape.vocab)
    distinct = tuple(side.to(device=device, dtype=case.shape.dtype) for side in sides)
    which = torch.arange(case.shape.rows, device=device) % distinct[0].size(0)
    student, teacher = (side[which] for side in distinct)
    student.requires_grad_(case.gradient)

    contestants = [c for c in case.contestants if device.type == "cuda" or not c.cuda_only]
    measurements, steps = [], {}
    for index, contestant in enumerate(contestants):
        on_progress(f"checking {contestant.name}", 0.5 * index / len(contestants))
        measurement = Measurement(contestant.name)
        measurements.append(measurement)
        try:
            _require_memory(contestant, case.shape, device)
            _check(measurement, case, contestant, student, teacher, distinct)
            step = make_step(contestant.loss, student, teacher)
            steps[contestant.name] = _then(step, contestant.release) if fresh_memory else step
            steps[contestant.name]()
        except Exception as error:  # a peer may raise anything, and must not end the others' run
            steps.pop(contestant.name, None)
            student.grad = None
            measurement.failed = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    plain = roofs(student, teacher, case.traffic)
    for step in plain.values():
        step()
    others, start = cpu_seconds_of_others(), time.perf_counter()
    timings = time_interleaved(
        {**plain, **steps},
        device,
        budget,
        lambda done: on_progress("timing", 0.5 + 0.45 * done),
    )
    other_cores = None
    if others is not None and (now := cpu_seconds_of_others()) is not None:
        other_cores = max(0.0, (now - others) / (time.perf_counter() - start))
    on_progress("reading peak memory", 0.95)
    for contestant, measurement in zip(contestants, measurements, strict=True):
        if measurement.name in steps:
            measurement.timing = timings[measurement.name]
            contestant.release()
            measurement.memory = memory_of(steps[measurement.name], device)
            contestant.release()
    roof_name = min(plain, key=lambda name: timings[name].median)
    return CaseResult(case, roof_name, timings[roof_name], other_cores, measurements)


def _then(step: Step, release: Callable[[], object]) -> Step:
    def both() -> None:
        step()
        release()

    return both


def make_step(loss: Loss, student: Tensor, teacher: Tensor) -> Step:
    """Return the loss step to time: with backward if the student requires grad, else without."""

    def forward() -> None:
        with torch.no_grad():
            loss(student, teacher)

    def forward_backward() -> None:
        _backward(loss(student, teacher), student.dtype)
        student.grad = None

    return forward_backward if student.requires_grad else forward


def _backward(value: Tensor, dtype: torch.dtype) -> float:
    scale = LOSS_SCALES.get(dtype, 1.0)
    value.backward(None if scale == 1 else value.new_full((), scale))
    return scale


def _require_memory(contestant: Contestant, shape: Shape, device: torch.device) -> None:
    needed = contestant.copies * shape.rows * shape.vocab * 4
    available = available_memory(device)
    if available is not None and needed > 0.9 * available:
        raise MemoryError(
            f"a step holds about {needed / 2**30:.1f} GiB, {available / 2**30:.1f} GiB are free"
        )


def _check(
    measurement: Measurement,
    case: Case,
    contestant: Contestant,
    student: Tensor,
    teacher: Tensor,
    distinct: tuple[Tensor, ...],
) -> None:
    """Compare loss and gradient of the very shape that is timed with float64's."""
    exact_student, exact_teacher = (side.double() for side in distinct)
    exact_student.requires_grad_(case.gradient)
    values = (contestant.exact or case.exact)(exact_student, exact_teacher)
    rows, count = case.shape.rows, distinct[0].size(0)
    repeats = torch.bincount(torch.arange(rows, device=values.device) % count)
    expected = (values.detach() * repeats).sum() / rows

    with torch.set_grad_enabled(case.gradient):
        value = contestant.loss(student, teacher)
    measurement.loss_error = (abs(value.detach().double() - expected) / abs(expected)).item()
    tolerance = TOLERANCES[case.shape.dtype]
    if not measurement.loss_error <= tolerance:
        measurement.wrong = f"loss off by {measurement.loss_error:.1e}"
    if not case.gradient:
        return
    scale = _backward(value, student.dtype) / rows
    (exact_gradient,) = torch.autograd.grad(values.sum(), exact_student)
    gradient, student.grad = student.grad, None
    if gradient is None:
        raise RuntimeError("no gradient came back")
    square_error = square_norm = 0.0
    for row, truth in enumerate(exact_gradient * scale):
        found = gradient[row::count].double()
        square_error += (found - truth).square().sum().item()
        square_norm += truth.square().sum().item() * found.size(0)
    measurement.gradient_error = math.sqrt(square_error / square_norm)
    if not measurement.gradient_error <= tolerance:
        measurement.wrong = f"gradient off by {measurement.gradient_error:.1e}"
