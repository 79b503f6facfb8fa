"""Widths, infinities, NaN, masks and labels of vocabularies split across processes."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import ALL_DIVERGENCES
from shard_ranks import ROWS, WIDTH, Ranks, logits, needed
from torch import Tensor

import fastkd


def uneven(vocab: int, ranks: Ranks) -> slice:
    """As DTensor splits: equal parts, the last ones short or empty."""
    each = -(-vocab // ranks.size)
    return slice(min(ranks.rank * each, vocab), min((ranks.rank + 1) * each, vocab))


def width_case(vocab: int, ranks: Ranks) -> None:
    """A short last process, or one without columns."""
    columns, labels = uneven(vocab, ranks), torch.arange(ROWS) % vocab
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    place = {"vocab_start": columns.start, "vocab_size": vocab}
    for name in ("forward_kl", "jsd", "tvd", "decoupled_kl"):
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
    for name in ALL_DIVERGENCES:
        sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
        sides[0][0, :WIDTH] = sides[1][0, :WIDTH] = -torch.inf
        sides[0][1, -WIDTH:] = -torch.inf
        sides[1][2, -WIDTH:] = -torch.inf
        sides[1][3, 1:] = -torch.inf
        sides[0][4] = -torch.inf
        function = functools.partial(
            fastkd.softmax_divergence,
            divergence=name,
            reduction="none",
            **needed(name, ranks.size),
        )
        ranks.compare(function, sides, tolerance=1e-12)


def infinite_support_case(ranks: Ranks) -> None:
    """The same of the losses over a support, and of those of hard labels."""
    vocab = WIDTH * ranks.size
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    sides[0][0, :WIDTH] = -torch.inf
    sides[0][1, -WIDTH:] = -torch.inf
    sides[1][2, -WIDTH:] = -torch.inf
    sides[0][3, 1:] = -torch.inf
    best, labels = fastkd.teacher_topk(sides[1], 4), torch.tensor([0, vocab - 1, 3, 0, 1, 2])
    for divergence in ("forward_kl", "reverse_kl", "cross_entropy"):
        for tail in ("lump", "uniform", "drop"):
            function = functools.partial(
                fastkd.topk_divergence, divergence=divergence, tail=tail, reduction="none"
            )
            ranks.compare(
                lambda z, f=function, **place: f(z, best.log_probs, best.indices, **place),
                sides[:1],
                tolerance=1e-12,
                gradients_of_infinite=False,
            )
    for edges in ({}, {"tail": "lump"}, {"renormalize": "both"}):
        function = functools.partial(
            fastkd.clipped_divergence, lower=0.001, upper=0.9, reduction="none", **edges
        )
        ranks.compare(function, sides, tolerance=1e-12, gradients_of_infinite=False)
    ranks.compare(
        lambda z, **place: fastkd.cross_entropy(z, labels, reduction="none", **place),
        sides[:1],
        tolerance=1e-12,
    )


def nan_case(ranks: Ranks) -> None:
    """A NaN on one process makes its row NaN on all, and no other row."""
    vocab = WIDTH * ranks.size
    for name in ALL_DIVERGENCES:
        sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
        sides[0][1, 0], sides[1][2, -1], sides[0][3, 4] = torch.nan, torch.nan, torch.inf
        function = functools.partial(
            fastkd.softmax_divergence,
            divergence=name,
            reduction="none",
            **needed(name, ranks.size),
        )
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
    for name in ("forward_kl", "jsd", "decoupled_kl"):
        given = {"divergence": name, **needed(name, ranks.size)}
        ranks.compare(
            functools.partial(fastkd.softmax_divergence, mask=mask, **given),
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


def width_error_case(ranks: Ranks) -> None:
    """A teacher of the whole vocabulary, whose first columns would be taken on every process."""
    z, whole = logits(ROWS, WIDTH), logits(ROWS, WIDTH * ranks.size, seed=1)
    h, w = logits(ROWS, 3), logits(WIDTH * ranks.size, 3)
    for call in (
        lambda: fastkd.softmax_divergence(z, whole, group=ranks.group),
        lambda: fastkd.softmax_divergence(z, [z, whole], group=ranks.group),
        lambda: fastkd.softmax_divergence(
            z, whole, vocab_start=ranks.rank * WIDTH, vocab_size=WIDTH * ranks.size,
            group=ranks.group,
        ),
        lambda: fastkd.clipped_divergence(z, whole, 0.0, 1.0, group=ranks.group),
        lambda: fastkd.token_stats(z, whole, group=ranks.group),
        lambda: fastkd.softmax_divergence(z, fastkd.LinearLogits(h, w), group=ranks.group),
        lambda: fastkd.linear_softmax_divergence(h, w[:WIDTH], h, w, group=ranks.group),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="teacher_logits must be the same columns"):
            call()


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


def far_case(ranks: Ranks) -> None:
    """Rows far below 0, and numbers far below a row's largest one."""
    vocab = WIDTH * ranks.size
    student, teacher = (logits(ROWS, vocab, seed=i) for i in range(2))
    best = fastkd.teacher_topk(teacher, 4)
    indices = best.indices.clone()
    indices[:, 3] = -1
    below = student - 3000
    above = student.clone()
    above[:, 0] += 3000  # an entry of the first row or of none
    indices[0, 0], indices[1:, 0] = 0, torch.arange(1, ROWS) * 2
    for divergence in ("forward_kl", "reverse_kl", "cross_entropy"):
        for tail in ("lump", "uniform"):
            function = functools.partial(
                fastkd.topk_divergence, divergence=divergence, tail=tail, reduction="none"
            )
            for z in (below, above):
                ranks.compare(
                    lambda z, f=function, **p: f(z, best.log_probs - 1, indices, **p),
                    [z],
                    tolerance=1e-9,
                    relative=True,
                )
    lowest = student.clone()
    lowest[:, ranks.size :] = torch.finfo(torch.float64).min
    found = fastkd.token_stats(
        lowest[:, ranks.even(WIDTH)], temperature=0.5, group=ranks.group
    ).student_entropy
    torch.testing.assert_close(found, fastkd.token_stats(lowest, temperature=0.5).student_entropy)


def shape_case(ranks: Ranks) -> None:
    """No rows, other strides, and rows of one number."""
    vocab = WIDTH * ranks.size
    for leading in ((0,), (2, 0)):
        z = logits(*leading, vocab)
        found = fastkd.token_stats(z[..., ranks.even(WIDTH)], group=ranks.group)
        assert found.student_lse.shape == leading
    sides = [logits(vocab, 2, 3, seed=i).transpose(0, 2) for i in range(2)]
    runs = []
    for place in ({}, {"group": ranks.group}):
        columns = ranks.even(WIDTH) if place else slice(None)
        # Of dense memory, whose strides gradients have, too.
        mine = [x[..., columns].transpose(0, 2).contiguous().transpose(0, 2) for x in sides]
        mine = [x.requires_grad_() for x in mine]
        fastkd.clipped_divergence(*mine, 0.01, 0.5, **place).backward()
        runs.append([x.grad for x in mine])
    for whole, part in zip(*runs, strict=True):
        expected = whole[..., ranks.even(WIDTH)]
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-12)


def bounds_of_unread_rows_case(ranks: Ranks) -> None:
    """The bounds of rows that are not read get a gradient of 0."""
    columns, found = ranks.even(WIDTH), []
    sides = [logits(ROWS, WIDTH * ranks.size, seed=i) for i in range(2)]
    mask = torch.arange(ROWS) % 2 == 0
    for place in ({}, {"group": ranks.group}):
        bounds = [torch.full((ROWS,), x, requires_grad=True) for x in (0.01, 0.5)]
        mine = [x[:, columns] if place else x for x in sides]
        loss = fastkd.clipped_divergence(*mine, *bounds, softness=0.1, mask=mask, **place)
        loss.backward()
        found.append(torch.stack([x.grad for x in bounds]))
    torch.testing.assert_close(found[1], found[0])


def nan_boundary_case(ranks: Ranks) -> None:
    """A row without a distribution gives NaN also to a boundary of no token."""
    z = logits(1, 3, WIDTH * ranks.size)
    z[0, 1, 0] = torch.nan
    ids, chunks = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, -1, -1]])
    none = torch.zeros(z.size(-1), dtype=torch.bool)
    found = fastkd.chunk_log_likelihood(
        z[..., ranks.even(WIDTH)], ids, chunks, 1, boundary=none, group=ranks.group
    )
    assert found.boundary_log_prob is not None
    assert found.boundary_log_prob.isnan().all()


def rare_boundary_case(ranks: Ranks) -> None:
    """A boundary set whose probability float32 does not hold has the right logarithm."""
    vocab = WIDTH * ranks.size
    boundary = torch.zeros(vocab, dtype=torch.bool)
    boundary[[1, vocab - 2, vocab - 1]] = True
    ids, chunks = torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 1, -1], [0, -1, -1]])
    for below in (60.0, 120.0, 3000.0, 1e30):
        z = logits(2, 3, vocab, dtype=torch.float32)
        z[..., boundary] -= below
        if below == 1e30:  # impossible on this scale, but in one row no process has another token
            z[0, 1, ~boundary] = -torch.inf

        def both(z: Tensor, **place: Any) -> Tensor:
            found = fastkd.chunk_log_likelihood(
                z, ids, chunks, 2, boundary=boundary, temperature=0.7, **place
            )
            assert found.boundary_log_prob is not None
            return found.boundary_log_prob

        found = ranks.compare(both, [z], tolerance=2e-6, relative=True, collectives=1)
        if below == 120.0:
            assert (found[:, 0] < -100).all()
            assert found.isfinite().all()


def rare_support_case(ranks: Ranks) -> None:
    """Supports of a mass that float32 does not hold; columns with the smallest number; +inf."""
    vocab = WIDTH * ranks.size
    for dtype in (torch.float64, torch.float32):
        teacher = logits(ROWS, vocab, seed=1, dtype=dtype)
        student = logits(ROWS, vocab, dtype=dtype)
        teacher[0, 0] += 300  # all others share e^-300
        teacher[1, 1:] = torch.finfo(dtype).min
        student[2, vocab - 3 :] = teacher[2, vocab - 3 :] = torch.finfo(dtype).min
        student[3, 2], teacher[4, 2] = torch.inf, torch.inf
        student[5, :WIDTH] -= 400
        upper = torch.full((ROWS,), 0.5)
        upper[4:] = 1.0
        for renormalize in ("none", "teacher", "both"):
            for options in ({}, {"softness": 0.05, "upper": torch.full((ROWS,), -1.0)}):
                given = {"lower": torch.full((ROWS,), -2.0), "upper": upper, **options}
                function = functools.partial(
                    fastkd.clipped_divergence,
                    renormalize=renormalize,
                    reduction="none",
                    mask=torch.arange(ROWS) != 1 if options else None,
                    **given,
                )
                ranks.compare(
                    lambda z, f=function, t=teacher, **place: f(
                        z, t[:, ranks.even(WIDTH)] if place else t, **place
                    ),
                    [student],
                    tolerance=1e-10 if dtype == torch.float64 else 4e-6,
                    gradients_of_infinite=False,
                )


def unused_row_case(ranks: Ranks) -> None:
    """A NaN row that nothing depends on has a gradient of 0, as on one process."""
    vocab, labels = WIDTH * ranks.size, torch.arange(ROWS) % 3
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    sides[0][1, 0], sides[0][3] = torch.nan, -torch.inf
    best = fastkd.teacher_topk(sides[1], 4)
    chunks = torch.arange(ROWS)

    def likelihood(z: Tensor, t: Tensor, **place: Any) -> Tensor:
        return fastkd.chunk_log_likelihood(z, labels, chunks, ROWS, **place).log_likelihood

    functions: list[Callable[..., Tensor]] = [
        *(
            functools.partial(
                fastkd.softmax_divergence,
                divergence=name,
                labels=labels,
                temperature=temperature,
                reduction="none",
            )
            for name in ("forward_kl", "jsd", "decoupled_kl")
            for temperature in (1.0, 2.0)
        ),
        *(
            lambda z, t, tail=tail, **place: fastkd.topk_divergence(
                z, best.log_probs, best.indices, tail=tail, reduction="none", **place
            )
            for tail in ("lump", "uniform", "renormalize", "drop")
        ),
        functools.partial(
            fastkd.clipped_divergence, lower=0.01, upper=0.9, renormalize="both", reduction="none"
        ),
        lambda z, t, **place: fastkd.cross_entropy(
            z, labels, z_loss_weight=0.1, label_smoothing=0.1, reduction="none", **place
        ),
        lambda z, t, **place: fastkd.token_log_probs(z, labels, **place),
        likelihood,
    ]
    for function in functions:
        runs = []
        for place in ({}, {"group": ranks.group}):
            cut = ranks.even(WIDTH) if place else slice(None)
            z, t = (x[:, cut].clone().requires_grad_() for x in sides)
            loss = function(z, t, **place)
            assert loss[[1, 3]].isnan().all()
            loss[[0, 2, 4]].sum().backward()
            runs.append(z.grad)
        assert runs[1] is not None
        assert (runs[1][[1, 3, 5]] == 0).all()
        torch.testing.assert_close(runs[1], runs[0][:, ranks.even(WIDTH)], rtol=0, atol=1e-12)
