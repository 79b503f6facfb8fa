"""Values and gradients of vocabularies split across processes."""

import functools
from typing import Any

import pytest
import torch
from shard_ranks import (
    LABELS,
    ROWS,
    TOLERANCE,
    WIDTH,
    Ranks,
    counted,
    logits,
    needed,
    row_options,
)
from torch import Tensor

import fastkd


def divergence_case(name: str, options: str, dtype: torch.dtype, ranks: Ranks) -> None:
    vocab = WIDTH * ranks.size
    student, teacher = (logits(ROWS, vocab, seed=i, dtype=dtype) for i in range(2))
    given = {**needed(name, ranks.size), **row_options(options, ranks.size)}
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
        fastkd.softmax_divergence,
        divergence=name,
        reduction="none",
        beta=0.3,
        **needed(name, ranks.size),
    )
    exact = function(student.double(), teacher.double())
    columns = ranks.even(WIDTH)
    found = function(student[:, columns], teacher[:, columns], group=ranks.group)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=0)


def bfloat16_case(name: str, ranks: Ranks) -> None:
    """The gradient in bfloat16 is that in float32, rounded."""
    vocab, columns = WIDTH * ranks.size, ranks.even(WIDTH)
    student, teacher = (logits(ROWS, vocab, seed=i, dtype=torch.bfloat16) for i in range(2))
    given = {"divergence": name, **needed(name, ranks.size)}
    a = student.float().requires_grad_()
    fastkd.softmax_divergence(a, teacher.float(), **given).backward()
    b = student[:, columns].clone().requires_grad_()
    fastkd.softmax_divergence(b, teacher[:, columns], group=ranks.group, **given).backward()
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
    for name, x, y in zip(found._fields[:-1], found[:-1], expected[:-1], strict=True):
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


def teachers_case(mix: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Several teachers: columns that are impossible, rows that are not finite, weights of 0."""
    vocab = WIDTH * ranks.size
    sides = [logits(ROWS, vocab, seed=i, dtype=dtype) for i in range(3)]
    sides[1][0, 3], sides[1][1] = -torch.inf, torch.finfo(dtype).min
    sides[1][1, vocab - 2 :] = 1.0
    sides[2][0, 1], sides[2][2, 4] = -torch.inf, torch.nan
    each = torch.linspace(0.3, 1.2, 2 * ROWS, dtype=torch.float64).view(ROWS, 2)
    if mix in ("logits", "probs"):
        each[2, 1] = each[3, 0] = 0  # the NaN is not read
    adapts = mix in ("contrast", "share")
    for weights, options in (
        (None, {}),
        ([0.3, 0.9], {"temperature": 1.4, "square_temperature": True, "labels": True}),
        (each, {"mask": torch.arange(ROWS) != 4, "logit_softcap": 5.0, "reduction": "none"}),
    ):
        given = {**options, "labels": LABELS[ranks.size]} if "labels" in options else options
        for name in ("forward_kl", "jsd"):
            function = functools.partial(
                fastkd.softmax_divergence,
                divergence=name,
                teacher_mix=mix,
                teacher_weights=weights,
                **given,
            )
            if not isinstance(weights, Tensor):
                function = functools.partial(function, mask=torch.arange(ROWS) != 2)
                if "mask" in options:
                    continue
            ranks.compare(
                lambda s, t, u, f=function, **place: f(s, [t.detach(), u.detach()], **place),
                sides,
                tolerance=TOLERANCE[dtype] * 2,
                collectives=4 if adapts else 3,
            )


def teacher_rows_case(ranks: Ranks) -> None:
    """Rows of a teacher with other leading dimensions; rows without one."""
    vocab = WIDTH * ranks.size
    student, teacher = logits(ROWS, vocab), logits(2, 4, vocab, seed=1)
    places = torch.tensor([7, -1, 0, 0, 3, 2])
    for reduction in ("mean", "none", "elementmean"):
        for mix in ([teacher], [teacher, teacher.flip(0)]):
            options = {"teacher_rows": places, "reduction": reduction, "labels": LABELS[ranks.size]}
            expected, found = None, None
            grads = []
            for place in ({}, {"group": ranks.group}):
                cut = ranks.even(WIDTH) if place else slice(None)
                z = student[:, cut].clone().requires_grad_()
                loss = fastkd.softmax_divergence(z, [t[..., cut] for t in mix], **options, **place)
                loss.sum().backward()
                expected, found = found, loss.detach()
                grads.append(z.grad)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(grads[1], grads[0][:, ranks.even(WIDTH)], rtol=0, atol=1e-12)
    with pytest.raises(IndexError, match="teacher_rows must lie in"):
        fastkd.softmax_divergence(
            student[:, :WIDTH], teacher[..., :WIDTH], teacher_rows=places + 1, group=ranks.group
        )
