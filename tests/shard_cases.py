"""Cases of vocabularies split across processes, which every process of a group runs.

A case is a function of the process's :class:`Ranks`; it compares with the op of one process on the
whole vocabulary. ``run`` is what a spawned process calls: it runs all cases and saves what failed.
"""

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import fastkd
from fastkd._ops.arguments import choices

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
SIZES = (2, 4)
Case = Callable[["Ranks"], None]


class Ranks:
    """This process in its group, and the columns that it has of a vocabulary."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.group = rank, size, dist.group.WORLD

    def even(self, width: int) -> slice:
        return slice(self.rank * width, (self.rank + 1) * width)

    def compare(
        self,
        function: Callable[..., Any],
        tensors: list[Tensor],
        *,
        tolerance: float,
        columns: slice | None = None,
        relative: bool = False,
        collectives: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Compare with one process. function(*tensors, **place): a tensor; the tensors: logits.

        Returns the loss of the group.
        """
        vocab = tensors[0].size(-1)
        columns = self.even(vocab // self.size) if columns is None else columns
        whole = [x.clone().requires_grad_() for x in tensors]
        local = [x[..., columns].clone().requires_grad_() for x in tensors]
        expected = function(*whole)
        with counted() as count:
            found = function(*local, group=self.group, **options)
        scale = expected.detach().abs().clamp(min=1) if not relative else expected.detach().abs()
        scale = torch.where(scale.isfinite(), scale, 1)
        torch.testing.assert_close(
            (found / scale).double(),
            (expected / scale).double(),
            rtol=0,
            atol=tolerance,
            equal_nan=True,
        )
        if collectives is not None:
            assert count() == collectives, f"{count()} collectives"
        if expected.requires_grad:
            weights = torch.linspace(0.5, 1.5, max(expected.numel(), 1)).to(expected.dtype)
            for x in (found, expected):
                x.reshape(-1).mul(weights).sum().backward()
            if collectives is not None:
                assert count() == collectives, f"{count()} collectives with the backward pass"
        for x, y in zip(local, whole, strict=True):
            if y.grad is not None:
                torch.testing.assert_close(
                    x.grad, y.grad[..., columns], rtol=0, atol=tolerance, equal_nan=True
                )
        self.same_bits(found.detach())
        return found.detach()

    def same_bits(self, x: Tensor) -> None:
        """Every process has the same bits."""
        found = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous())
        bits = torch.int64 if x.dtype == torch.float64 else torch.int32
        for other in found:
            assert torch.equal(other.view(bits), x.contiguous().view(bits))


@contextlib.contextmanager
def counted() -> Iterator[Callable[[], int]]:
    from torch.distributed.tensor.debug import CommDebugMode

    with CommDebugMode() as mode:
        yield mode.get_total_counts
        # The backward pass is counted, too.
        mode.__exit__ = lambda *_: None


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


ROWS, WIDTH = 6, 13
LABELS = {size: torch.arange(ROWS) * (WIDTH * size - 1) // (ROWS - 1) for size in SIZES}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "labels": {"labels": True, "temperature": 2.0, "square_temperature": True, "weight": True},
    "one": {"labels": True, "label_weight": 0.5, "mask": True, "reduction": "sum"},
    "rows": {"temperature": "rows", "reduction": "none", "labels": True, "label_weight": "rows"},
    "softcap": {"logit_softcap": 5.0, "normalizer": 3.0},
}


def row_options(name: str, size: int) -> dict[str, Any]:
    """The options of that name, with their tensors."""
    tensors = {
        "labels": LABELS[size].clone(),
        "weight": torch.linspace(0, 1.5, ROWS),
        "mask": torch.arange(ROWS) != 2,
        "temperature": torch.linspace(0.7, 2, ROWS),
        "label_weight": torch.linspace(0, 2, ROWS),
    }
    tensors["labels"][1] = -100
    return {
        k: tensors[k] if (v is True and k in tensors) or v == "rows" else v
        for k, v in OPTIONS[name].items()
    }


# --- Values and gradients -------------------------------------------------------------------------


def divergence_case(name: str, options: str, dtype: torch.dtype, ranks: Ranks) -> None:
    vocab = WIDTH * ranks.size
    student, teacher = (logits(ROWS, vocab, seed=i, dtype=dtype) for i in range(2))
    given = row_options(options, ranks.size)
    if options == "rows":
        given["beta"] = torch.linspace(0, 1, ROWS)
    if name != "alpha_beta" and options == "softcap":
        given["teacher_temperature"] = 1.3
    function = functools.partial(fastkd.softmax_divergence, divergence=name, **given)
    ranks.compare(function, [student, teacher], tolerance=TOLERANCE[dtype], collectives=2)


def near_case(name: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Rows that are equal to 1e-3: the value is relatively accurate."""
    student = logits(ROWS, WIDTH * ranks.size, seed=1, dtype=dtype)
    teacher = student + 1e-3 * logits(*student.shape, seed=2, dtype=dtype)
    function = functools.partial(
        fastkd.softmax_divergence, divergence=name, reduction="none", beta=0.3
    )
    exact = function(student.double(), teacher.double())
    columns = ranks.even(WIDTH)
    found = function(student[:, columns], teacher[:, columns], group=ranks.group)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def bfloat16_case(name: str, ranks: Ranks) -> None:
    """The gradient in bfloat16 is that in float32, rounded."""
    vocab, columns = WIDTH * ranks.size, ranks.even(WIDTH)
    student, teacher = (logits(ROWS, vocab, seed=i, dtype=torch.bfloat16) for i in range(2))
    a = student.float().requires_grad_()
    fastkd.softmax_divergence(a, teacher.float(), divergence=name).backward()
    b = student[:, columns].clone().requires_grad_()
    fastkd.softmax_divergence(b, teacher[:, columns], divergence=name, group=ranks.group).backward()
    assert a.grad is not None
    assert b.grad is not None
    assert b.grad.dtype == torch.bfloat16
    torch.testing.assert_close(b.grad.float(), a.grad[:, columns], rtol=2**-7, atol=1e-6)


def topk_case(divergence: str, tail: str, dtype: torch.dtype, ranks: Ranks) -> None:
    vocab = WIDTH * ranks.size
    best = fastkd.teacher_topk(logits(ROWS, vocab, seed=1), 5)
    indices, log_probs = best.indices.clone(), best.log_probs.clone()
    indices[1, 4] = -1
    indices[2, 4], log_probs[2, 4] = indices[2, 0], -1e9  # padding, as servers write it
    student = logits(ROWS, vocab, dtype=dtype)
    for options in ("plain", "labels", "softcap"):
        given = row_options(options, ranks.size)
        if options == "labels":
            given.update(stored_temperature=1.0, max_token_loss=4.0)
        function = functools.partial(
            fastkd.topk_divergence, divergence=divergence, tail=tail, **given
        )
        ranks.compare(
            lambda z, f=function, **place: f(z, log_probs, indices, **place),
            [student],
            tolerance=TOLERANCE[dtype],
            collectives=2,
        )


def topk_gradient_case(ranks: Ranks) -> None:
    """The stored log-probabilities' gradient is the whole one on every process."""
    vocab = WIDTH * ranks.size
    best = fastkd.teacher_topk(logits(ROWS, vocab, seed=1), 5)
    student, found = logits(ROWS, vocab), []
    for place in ({}, {"group": ranks.group}):
        log_probs = best.log_probs.double().requires_grad_()
        z = student[:, ranks.even(WIDTH)] if place else student
        fastkd.topk_divergence(z, log_probs, best.indices, **place).backward()
        found.append(log_probs.grad)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def clipped_case(renormalize: str, dtype: torch.dtype, ranks: Ranks) -> None:
    vocab = WIDTH * ranks.size
    sides = [logits(ROWS, vocab, seed=i, dtype=dtype) for i in range(2)]
    lower, upper = torch.linspace(0, 0.02, ROWS), torch.linspace(0.2, 1, ROWS)
    for options in ("plain", "labels", "rows", "softcap"):
        for edges in ({}, {"softness": 0.05, "tail": "lump"}):
            given = {**row_options(options, ranks.size), **edges}
            function = functools.partial(
                fastkd.clipped_divergence,
                renormalize=renormalize,
                lower=lower,
                upper=upper,
                **given,
            )
            # The teacher's gradient takes one collective more.
            ranks.compare(function, sides, tolerance=TOLERANCE[dtype])
            if dtype == torch.float64:
                teacher = sides[1]
                ranks.compare(
                    lambda z, f=function, t=teacher, **place: f(
                        z, t[:, ranks.even(WIDTH)] if place else t, **place
                    ),
                    sides[:1],
                    tolerance=TOLERANCE[dtype],
                    collectives=2,
                )


def clipped_bounds_case(ranks: Ranks) -> None:
    """The bounds' gradients are the whole ones on every process."""
    vocab, found = WIDTH * ranks.size, []
    for place in ({}, {"group": ranks.group}):
        sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
        if place:
            sides = [x[:, ranks.even(WIDTH)] for x in sides]
        bounds = [torch.full((ROWS,), x, dtype=torch.float64) for x in (0.01, 0.4)]
        for bound in bounds:
            bound.requires_grad_()
        fastkd.clipped_divergence(*sides, *bounds, softness=0.05, **place).backward()
        found.append(torch.stack([x.grad for x in bounds if x.grad is not None]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def cross_entropy_case(dtype: torch.dtype, ranks: Ranks) -> None:
    labels = row_options("labels", ranks.size)["labels"]
    z = logits(ROWS, WIDTH * ranks.size, dtype=dtype)
    for given in (
        {},
        {"temperature": 1.5, "label_smoothing": 0.2, "z_loss_weight": 0.01},
        {"entropy_weight": 0.3, "entropy_temperature": 0.7, "entropy_mask": "correct"},
        {
            "entropy_weight": 0.3,
            "logit_softcap": 4.0,
            "weight": torch.linspace(0, 2, ROWS),
            "reduction": "none",
            "entropy_mask": torch.arange(ROWS) % 2 == 0,
        },
        {"label_smoothing": 1.0, "reduction": "batchmean"},
    ):
        function = functools.partial(fastkd.cross_entropy, labels=labels, **given)
        ranks.compare(function, [z], tolerance=TOLERANCE[dtype], collectives=1)


def token_log_probs_case(dtype: torch.dtype, ranks: Ranks) -> None:
    z, ids = logits(2, 3, WIDTH * ranks.size, dtype=dtype), LABELS[ranks.size].view(2, 3)

    def both(z: Tensor, **place: Any) -> Tensor:
        found = fastkd.token_log_probs(z, ids, entropy=True, temperature=1.3, shift=1, **place)
        return found.log_probs + 0.5 * found.entropy

    ranks.compare(both, [z], tolerance=TOLERANCE[dtype], collectives=1)


def token_stats_case(dtype: torch.dtype, ranks: Ranks) -> None:
    vocab, labels = WIDTH * ranks.size, row_options("labels", ranks.size)["labels"]
    student, teacher = (logits(ROWS, vocab, seed=i, dtype=dtype) for i in range(2))
    columns = ranks.even(WIDTH)
    expected = fastkd.token_stats(student, teacher, labels=labels, temperature=1.4)
    with counted() as count:
        found = fastkd.token_stats(
            student[:, columns],
            teacher[:, columns],
            labels=labels,
            temperature=1.4,
            group=ranks.group,
        )
    assert count() == 2
    for name, x, y in zip(found._fields, found, expected, strict=True):
        assert x.dtype == y.dtype, name
        torch.testing.assert_close(
            x, y, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], equal_nan=True, msg=name
        )
    alone = fastkd.token_stats(student[:, columns], group=ranks.group)
    assert alone.teacher_lse is None
    assert alone.student_label_log_prob is None


def teacher_topk_case(dtype: torch.dtype, ranks: Ranks) -> None:
    teacher = logits(2, 3, WIDTH * ranks.size, dtype=dtype)
    teacher[0, 0] = teacher[0, 0].round()  # ties, across processes too
    teacher[0, 1] = -torch.inf
    teacher[0, 1, :2] = 0.0
    teacher[1, 0, 3] = torch.nan
    for k in (1, 5, WIDTH + 3):
        expected = fastkd.teacher_topk(teacher, k, temperature=1.3)
        found = fastkd.teacher_topk(
            teacher[..., ranks.even(WIDTH)], k, temperature=1.3, group=ranks.group
        )
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(
            found.log_probs, expected.log_probs, rtol=2e-6, atol=2e-6, equal_nan=True
        )


def chunk_case(dtype: torch.dtype, ranks: Ranks) -> None:
    vocab = WIDTH * ranks.size
    z = logits(2, ROWS, vocab, dtype=dtype)
    ids = LABELS[ranks.size].expand(2, -1)
    chunks = torch.tensor([[0, 0, 1, -1, 3, 3], [0, 1, 2, 3, 4, -1]])
    boundary = torch.arange(vocab) % 3 == 0

    def both(z: Tensor, **place: Any) -> Tensor:
        found = fastkd.chunk_log_likelihood(
            z, ids, chunks, 5, boundary=boundary, temperature=1.3, **place
        )
        return found.log_likelihood + 0.5 * found.boundary_log_prob

    ranks.compare(both, [z], tolerance=TOLERANCE[dtype], collectives=1)


# --- Widths, infinities, NaN ----------------------------------------------------------------------


def uneven(vocab: int, ranks: Ranks) -> slice:
    """As DTensor splits: equal parts, the last ones short or empty."""
    each = -(-vocab // ranks.size)
    return slice(min(ranks.rank * each, vocab), min((ranks.rank + 1) * each, vocab))


def width_case(vocab: int, ranks: Ranks) -> None:
    """A short last process, or one without columns."""
    columns, labels = uneven(vocab, ranks), torch.arange(ROWS) % vocab
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    place = {"vocab_start": columns.start, "vocab_size": vocab}
    for name in ("forward_kl", "jsd", "tvd"):
        function = functools.partial(
            fastkd.softmax_divergence, divergence=name, labels=labels, reduction="elementmean"
        )
        ranks.compare(function, sides, tolerance=1e-12, columns=columns, **place)
    best = fastkd.teacher_topk(sides[1], min(3, vocab))
    ranks.compare(
        lambda z, **p: fastkd.topk_divergence(z, best.log_probs, best.indices, **p),
        sides[:1],
        tolerance=1e-12,
        columns=columns,
        **place,
    )
    ranks.compare(
        lambda z, **p: fastkd.cross_entropy(z, labels, label_smoothing=0.1, **p),
        sides[:1],
        tolerance=1e-12,
        columns=columns,
        **place,
    )
    ranks.compare(
        lambda s, t, **p: fastkd.clipped_divergence(s, t, 0.01, 0.9, softness=0.1, **p),
        sides,
        tolerance=1e-12,
        columns=columns,
        **place,
    )
    stats = fastkd.token_stats(
        sides[0][:, columns], sides[1][:, columns], group=ranks.group, **place
    )
    expected = fastkd.token_stats(*sides)
    torch.testing.assert_close(stats.student_entropy, expected.student_entropy)
    torch.testing.assert_close(stats.reverse_kl, expected.reverse_kl)
    found = fastkd.teacher_topk(sides[0][:, columns], 2, group=ranks.group, **place)
    assert torch.equal(found.indices, fastkd.teacher_topk(sides[0], 2).indices)


def padding_case(vocab: int, ranks: Ranks) -> None:
    """vocab_size cuts inside a process, or leaves the last ones nothing: padding gets zeros."""
    sides = [logits(ROWS, WIDTH * ranks.size, seed=i) for i in range(2)]
    for x in sides:
        x[:, vocab:] = torch.nan
    function = functools.partial(fastkd.softmax_divergence, vocab_size=vocab)
    ranks.compare(lambda s, t, **place: function(s, t, **place), sides, tolerance=1e-12)
    labels = torch.full((ROWS,), vocab - 1)
    ranks.compare(
        lambda z, **place: fastkd.cross_entropy(z, labels, vocab_size=vocab, **place),
        sides[:1],
        tolerance=1e-12,
    )


def infinite_case(ranks: Ranks) -> None:
    """-inf on a whole process's columns, on either side; infinite values."""
    vocab = WIDTH * ranks.size
    for name in choices("softmax_divergence", "divergence"):
        sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
        sides[0][0, :WIDTH] = sides[1][0, :WIDTH] = -torch.inf
        sides[0][1, -WIDTH:] = -torch.inf
        sides[1][2, -WIDTH:] = -torch.inf
        sides[1][3, 1:] = -torch.inf
        sides[0][4] = -torch.inf
        function = functools.partial(fastkd.softmax_divergence, divergence=name, reduction="none")
        ranks.compare(function, sides, tolerance=1e-12)


def nan_case(ranks: Ranks) -> None:
    """A NaN on one process makes its row NaN on all, and no other row."""
    vocab = WIDTH * ranks.size
    for name in choices("softmax_divergence", "divergence"):
        sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
        sides[0][1, 0], sides[1][2, -1], sides[0][3, 4] = torch.nan, torch.nan, torch.inf
        function = functools.partial(fastkd.softmax_divergence, divergence=name, reduction="none")
        found = ranks.compare(function, sides, tolerance=1e-12)
        assert found.isnan().tolist() == [False, True, True, True, False, False]
        local = sides[0][:, ranks.even(WIDTH)].clone().requires_grad_()
        loss = function(local, sides[1][:, ranks.even(WIDTH)], group=ranks.group)
        loss.sum().backward()
        assert local.grad is not None
        assert local.grad.isnan().all(1).tolist() == [False, True, True, True, False, False]


def masked_case(ranks: Ranks) -> None:
    """Masked rows are not read: NaN in them changes nothing, and their gradient is 0."""
    vocab, mask = WIDTH * ranks.size, torch.arange(ROWS) % 2 == 0
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    for x in sides:
        x[1] = torch.nan
    for name in ("forward_kl", "jsd"):
        ranks.compare(
            functools.partial(fastkd.softmax_divergence, divergence=name, mask=mask),
            sides,
            tolerance=1e-12,
        )


def edge_label_case(ranks: Ranks) -> None:
    """Labels on the first and last column of every process."""
    edges = [x for rank in range(ranks.size) for x in (rank * WIDTH, (rank + 1) * WIDTH - 1)]
    z, labels = logits(len(edges), WIDTH * ranks.size), torch.tensor(edges)
    for temperature in (1.0, 0.5):
        ranks.compare(
            functools.partial(
                fastkd.softmax_divergence, labels=labels, temperature=temperature, reduction="none"
            ),
            [z, logits(*z.shape, seed=1)],
            tolerance=1e-12,
        )


def label_error_case(ranks: Ranks) -> None:
    z = logits(ROWS, WIDTH)
    for call in (
        lambda: fastkd.softmax_divergence(
            z, z, labels=torch.full((ROWS,), WIDTH * ranks.size), group=ranks.group
        ),
        lambda: fastkd.cross_entropy(z, torch.full((ROWS,), -1), group=ranks.group),
        lambda: fastkd.token_log_probs(z, torch.full((ROWS,), 10**6), group=ranks.group),
        lambda: fastkd.topk_divergence(
            z,
            torch.full((ROWS, 1), -1.0),
            torch.full((ROWS, 1), WIDTH * ranks.size),
            group=ranks.group,
        ),
    ):
        with pytest.raises(IndexError, match=r"must lie in \[0, "):
            call()


# --- Modes ----------------------------------------------------------------------------------------


def payload_case(ranks: Ranks) -> None:
    """What is sent: 16 bytes a row, 4 for the label; then 4 for the value and each gradient."""
    from fastkd._ops.shards import Shards

    sent: list[int] = []
    gather = Shards.gather

    def recorded(self: Shards, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        sent.append(numbers.size(0) * dtype.itemsize)
        return gather(self, numbers, dtype)

    z, labels = logits(ROWS, WIDTH, seed=ranks.rank, dtype=torch.float32), LABELS[2]
    Shards.gather = recorded  # type: ignore[method-assign]
    try:
        for name in choices("softmax_divergence", "divergence"):
            call = functools.partial(fastkd.softmax_divergence, divergence=name, group=ranks.group)
            with torch.no_grad():
                call(z, z)
            call(z.clone().requires_grad_(), z, labels=labels)
            call(*(z.clone().requires_grad_() for _ in range(2)), labels=labels, temperature=2.0)
            assert sent == [16, 4, 20, 8, 24, 12], (name, sent)
            sent.clear()
    finally:
        Shards.gather = gather  # type: ignore[method-assign]


def repeat_case(ranks: Ranks) -> None:
    """The same bits in every run."""
    z = logits(ROWS, 4096, seed=ranks.rank, dtype=torch.float32)
    losses, gradients = [], []
    for _ in range(3):
        a = z.clone().requires_grad_()
        loss = fastkd.softmax_divergence(a, z.flip(0), divergence="jsd", group=ranks.group)
        loss.backward()
        losses.append(loss.detach()), gradients.append(a.grad)
    assert all(torch.equal(x, losses[0]) for x in losses)
    assert all(torch.equal(x, gradients[0]) for x in gradients)


def alone_case(ranks: Ranks) -> None:
    """A group of one: the bits of a call without a group."""
    groups = [dist.new_group([rank]) for rank in range(ranks.size)]
    own = groups[ranks.rank]
    sides = [logits(ROWS, WIDTH, seed=i, dtype=torch.float32) for i in range(2)]
    found = []
    for place in ({}, {"group": own}, {"group": own, "vocab_start": 0, "vocab_size": WIDTH}):
        a = sides[0].clone().requires_grad_()
        loss = fastkd.softmax_divergence(a, sides[1], divergence="jsd", **place)
        loss.backward()
        found.append((loss, a.grad))
    for other in found[1:]:
        assert torch.equal(found[0][0], other[0])
        assert torch.equal(found[0][1], other[1])


def inplace_case(ranks: Ranks) -> None:
    """The gradient overwrites the logits, whose version counter is incremented."""
    columns, labels = ranks.even(WIDTH), LABELS[ranks.size]
    sides = [logits(ROWS, WIDTH * ranks.size, seed=i) for i in range(2)]
    calls = [
        lambda z, **o: fastkd.softmax_divergence(z, sides[1][:, columns], group=ranks.group, **o),
        lambda z, **o: fastkd.cross_entropy(z, labels, group=ranks.group, **o),
    ]
    for call in calls:
        expected = sides[0][:, columns].clone().requires_grad_()
        call(expected).backward()
        leaf = sides[0][:, columns].clone().requires_grad_()
        hidden = leaf * 1
        version = hidden._version
        call(hidden, inplace=True).backward()
        assert hidden._version > version
        assert torch.equal(hidden.detach(), expected.grad)
        assert torch.equal(leaf.grad, expected.grad)


def second_derivative_case(ranks: Ranks) -> None:
    z = logits(ROWS, WIDTH).requires_grad_()
    for loss in (
        fastkd.softmax_divergence(z, logits(ROWS, WIDTH, seed=1), group=ranks.group),
        fastkd.cross_entropy(z, LABELS[2] // 2, group=ranks.group),
        fastkd.clipped_divergence(z, z.detach() + 1, 0.01, 0.5, group=ranks.group),
    ):
        with pytest.raises(NotImplementedError, match="group has no second derivatives"):
            torch.autograd.grad(loss, z, create_graph=True)


def compile_case(ranks: Ranks) -> None:
    """One graph, without a break."""
    labels, columns = LABELS[ranks.size], ranks.even(WIDTH)
    sides = [logits(ROWS, WIDTH * ranks.size, seed=i)[:, columns] for i in range(2)]
    for function in (
        lambda s, t: fastkd.softmax_divergence(s, t, labels=labels, group=ranks.group),
        lambda s, t: fastkd.cross_entropy(s, labels, label_smoothing=0.1, group=ranks.group),
    ):
        found = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            a = sides[0].clone().requires_grad_()
            loss = call(a, sides[1])
            loss.backward()
            found.append((loss.detach(), a.grad))
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


# --- DTensor --------------------------------------------------------------------------------------


def dtensor_case(kind: str, ranks: Ranks) -> None:
    """Values, gradients and placements, inside and outside loss_parallel."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    shape = (2, ranks.size // 2) if kind == "both" else (ranks.size,)
    mesh = init_device_mesh("cpu", shape)
    placements: list[Any] = {
        "vocab": [Shard(2)],
        "rows": [Shard(0)],
        "neither": [Replicate()],
        "both": [Shard(0), Shard(-1)],
    }[kind]
    vocab = 11
    z, t = (logits(3, 5, vocab, seed=i) for i in range(2))
    labels = torch.arange(15).view(3, 5) % vocab
    labels[0, :4] = -100  # the processes keep unequal numbers of rows
    best = fastkd.teacher_topk(t, 4)
    boundary, chunks = torch.arange(vocab) % 2 == 0, torch.tensor([0, 0, 1, 2, 2]).expand(3, 5)
    weight = torch.linspace(0, 1, 15, dtype=torch.float64).view(3, 5)
    rows = [Partial("sum") if type(x) is Shard and x.dim == 0 else Replicate() for x in placements]
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "mean": lambda z, t: fastkd.softmax_divergence(z, t, labels=labels),
        "batchmean": lambda z, t: fastkd.softmax_divergence(
            z, t, divergence="jsd", reduction="batchmean"
        ),
        "none": lambda z, t: fastkd.softmax_divergence(z, t, reduction="none", weight=weight),
        "elementmean": lambda z, t: fastkd.softmax_divergence(
            z, t, reduction="elementmean", vocab_size=9
        ),
        "topk": lambda z, t: fastkd.topk_divergence(z, best.log_probs, best.indices),
        "clipped": lambda z, t: fastkd.clipped_divergence(z, t, 0.01, 0.5, softness=0.1),
        "cross_entropy": lambda z, t: fastkd.cross_entropy(z, labels, label_smoothing=0.1),
        "token_log_probs": lambda z, t: fastkd.token_log_probs(z, labels),
        "chunks": lambda z, t: (
            fastkd.chunk_log_likelihood(
                z, labels.clamp(min=0), chunks, 3, boundary=boundary
            ).boundary_log_prob
        ),
        "stats": lambda z, t: fastkd.token_stats(z, t).tvd,
        "teacher_topk": lambda z, t: fastkd.teacher_topk(z, 3).log_probs,
    }
    for name, function in functions.items():
        plain = [x.clone().requires_grad_() for x in (z, t)]
        expected = function(*plain)
        for inside in (False, True):
            spread = [distribute_tensor(x.clone(), mesh, placements) for x in (z, t)]
            for x in spread:
                x.requires_grad_()
            with loss_parallel() if inside else contextlib.nullcontext():
                found = function(*spread)
                if found.dim() == 0:
                    assert list(found.placements) == rows, (name, found.placements)
                torch.testing.assert_close(
                    found.full_tensor(),
                    expected,
                    rtol=1e-6 if name == "teacher_topk" else 0,
                    atol=1e-12,
                    msg=name,
                )
                if not expected.requires_grad:
                    continue
                found.backward() if found.dim() == 0 else found.sum().backward()
            for x in plain:
                x.grad = None
            expected.sum().backward(retain_graph=True)
            for x, y in zip(spread, plain, strict=True):
                if y.grad is not None:
                    assert tuple(x.grad.placements) == tuple(x.placements), name
                    torch.testing.assert_close(
                        x.grad.full_tensor(), y.grad, rtol=0, atol=1e-12, msg=name
                    )
    # A teacher of full width on every process, and labels placed like the rows.
    spread = distribute_tensor(z.clone(), mesh, placements)
    of_rows = [x if x == Shard(0) else Replicate() for x in placements]
    found = fastkd.softmax_divergence(spread, t, labels=distribute_tensor(labels, mesh, of_rows))
    torch.testing.assert_close(found.full_tensor(), functions["mean"](z, t), rtol=0, atol=1e-12)


def dtensor_error_case(ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh = init_device_mesh("cpu", (ranks.size,))
    z, t = logits(ROWS, WIDTH), logits(ROWS, WIDTH, seed=1)
    partial = DTensor.from_local(z, mesh, [Partial("sum")], run_check=False)
    rows = DTensor.from_local(z.view(2, 3, WIDTH), mesh, [Shard(1)], run_check=False)
    vocab = DTensor.from_local(z, mesh, [Shard(1)], run_check=False)
    for call, expected in (
        (lambda: fastkd.softmax_divergence(partial, partial), "Shard or Replicate"),
        (lambda: fastkd.cross_entropy(rows, rows.argmax(-1), shift=1), "whole sequences"),
        (lambda: fastkd.softmax_divergence(vocab, t), "must have the shape of student_logits"),
        (lambda: fastkd.softmax_divergence(vocab, vocab, group=ranks.group), "must be None"),
        (lambda: fastkd.softmax_divergence(vocab, vocab, weight=torch.ones(2)), "one entry a row"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


def torch_is_wrong_case(ranks: Ranks) -> None:
    """F.kl_div inside loss_parallel: the right value, a wrong gradient, no error."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import loss_parallel

    mesh = init_device_mesh("cpu", (ranks.size,))
    z, target = (
        logits(ROWS, WIDTH * ranks.size),
        logits(ROWS, WIDTH * ranks.size, seed=1).softmax(1),
    )
    whole = z.clone().requires_grad_()
    expected = F.kl_div(whole.log_softmax(-1), target, reduction="batchmean")
    expected.backward()
    spread = distribute_tensor(z, mesh, [Shard(1)]).requires_grad_()
    with loss_parallel():
        loss = F.kl_div(
            F.log_softmax(spread, -1),
            distribute_tensor(target, mesh, [Shard(1)]),
            reduction="batchmean",
        )
        loss.backward()
    torch.testing.assert_close(loss.full_tensor(), expected)
    apart = (spread.grad.full_tensor() - whole.grad).norm() / whole.grad.norm()
    assert apart > 0.1, "PyTorch's gradient is right now: remove what the documentation says of it"


# --- All of them ----------------------------------------------------------------------------------


def cases(size: int) -> dict[str, Case]:
    """The cases of a group of this size, by name."""
    found: dict[str, Case] = {}

    def add(function: Callable[..., None], *arguments: Any) -> None:
        words = [str(x).removeprefix("torch.") for x in arguments]
        name = "-".join([function.__name__.removesuffix("_case"), *words])
        found[name] = functools.partial(function, *arguments)

    divergences = choices("softmax_divergence", "divergence")
    for i, name in enumerate(divergences):
        for j, options in enumerate(OPTIONS):
            for dtype in TOLERANCE:
                # Each divergence with two option sets in float64; the plain one in both.
                if options == "plain" or (dtype == torch.float64 and (i + j) % 2 == size // 4):
                    add(divergence_case, name, options, dtype)
        if name not in ("cross_entropy",):
            add(near_case, name, torch.float32)
        if size == 2:
            add(bfloat16_case, name)
    for divergence in choices("topk_divergence", "divergence"):
        for tail in choices("topk_divergence", "tail"):
            if (divergence, tail) != ("jsd", "uniform"):
                add(topk_case, divergence, tail, (torch.float32, torch.float64)[size // 4])
    for renormalize in choices("clipped_divergence", "renormalize"):
        add(clipped_case, renormalize, (torch.float64, torch.float32)[size // 4])
    for case in (
        cross_entropy_case,
        token_log_probs_case,
        token_stats_case,
        teacher_topk_case,
        chunk_case,
    ):
        for dtype in TOLERANCE:
            add(case, dtype)
    for vocab in (5, 7, 203):
        add(width_case, vocab)
    for vocab in (WIDTH - 3, WIDTH * size - 2):
        add(padding_case, vocab)
    for kind in ("vocab", "rows", "neither") if size == 2 else ("vocab", "both"):
        add(dtensor_case, kind)
    for case in (
        *(topk_gradient_case, clipped_bounds_case, infinite_case, nan_case, masked_case),
        *(edge_label_case, label_error_case, repeat_case, alone_case, inplace_case),
    ):
        add(case)
    if size == 2:
        for case in (
            *(payload_case, second_derivative_case, compile_case, dtensor_error_case),
            torch_is_wrong_case,
        ):
            add(case)
    return found


def run(rank: int, size: int, folder: str) -> None:
    """All cases, in a spawned process. Saves what failed, by the case's name."""
    from datetime import timedelta

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for name, case in cases(size).items():
        try:
            case(Ranks(rank, size))
            results[name] = ""
        except Exception:  # the others go on
            results[name] = f"process {rank}: {traceback.format_exc()}"
        torch.save(results, f"{folder}/{rank}")
    dist.destroy_process_group()
