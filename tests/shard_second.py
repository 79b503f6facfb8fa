"""Second derivatives of vocabularies split across processes, beside one process's."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import ALL_DIVERGENCES
from shard_heads import head
from shard_ranks import LABELS, ROWS, WIDTH, Ranks, logits, needed, row_options
from shard_rows import uneven
from torch import Tensor

import fastkd


def penalty(
    function: Callable[..., Tensor], leaves: list[Tensor], shared: list[Tensor], **place: Any
) -> list[Tensor]:
    """The loss, its gradients, and those of a penalty on them.

    ``shared``: tensors that every process has whole, as their gradients are.
    """
    inputs = [*leaves, *shared]
    loss = function(*inputs, **place).sum() ** 2
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    # Each process has the terms of its columns, and those of what all have alike.
    terms = [(x.abs() ** 1.5).sum() for x in first]
    found = torch.autograd.grad(sum(terms), inputs, allow_unused=True)
    return [
        loss.detach(),
        *(x.detach() for x in first),
        *(torch.zeros_like(x) if y is None else y for x, y in zip(inputs, found, strict=True)),
    ]


def compare(
    ranks: Ranks,
    function: Callable[..., Tensor],
    split: list[Tensor],
    shared: list[Tensor] = [],  # noqa: B006
    *,
    dimension: int = -1,
    columns: slice | None = None,
    tolerance: float = 1e-10,
    **place: Any,
) -> None:
    """``split``: tensors of which this process has some columns, or rows of heads."""
    vocab = split[0].size(dimension)
    columns = ranks.even(vocab // ranks.size) if columns is None else columns

    def cut(x: Tensor) -> Tensor:
        return x[..., columns] if dimension == -1 else x[columns]

    runs = []
    for local in (False, True):
        mine = [(cut(x) if local else x).clone().requires_grad_() for x in split]
        alike = [x.clone().requires_grad_() for x in shared]
        runs.append(
            penalty(function, mine, alike, **(dict(place, group=ranks.group) if local else {}))
        )
    count = len(split) + len(shared)
    for i, (expected, found) in enumerate(zip(*runs, strict=True)):
        if i and (i - 1) % count < len(split):
            expected = cut(expected)
        scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
        torch.testing.assert_close(
            found / scale, expected / scale, rtol=0, atol=tolerance, msg=lambda m, i=i: f"{i}: {m}"
        )


def second_divergence_case(name: str, ranks: Ranks) -> None:
    vocab = WIDTH * ranks.size
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    for options in ("plain", "labels", "rows", "softcap"):
        given = {**needed(name, ranks.size), **row_options(options, ranks.size)}
        if options == "rows":
            given["beta"] = torch.linspace(0, 1, ROWS)
        function = functools.partial(fastkd.softmax_divergence, divergence=name, **given)
        compare(ranks, function, sides)
    teacher = sides[1]
    columns = ranks.even(WIDTH)
    compare(
        ranks,
        lambda z, **place: fastkd.softmax_divergence(
            z, teacher[:, columns] if place else teacher, divergence=name,
            **needed(name, ranks.size), **place,
        ),
        sides[:1],
    )  # fmt: skip


def second_width_case(vocab: int, ranks: Ranks) -> None:
    """A process without columns; impossible columns; equal logits."""
    columns, labels = uneven(vocab, ranks), torch.arange(ROWS) % (vocab - 1) + 1
    place = {"columns": columns, "vocab_start": columns.start, "vocab_size": vocab}
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    sides[1][1] = sides[0][1]
    sides[0][2, 0] = sides[1][2, 0] = -torch.inf
    for name in ("forward_kl", "jsd", "decoupled_kl"):
        function = functools.partial(fastkd.softmax_divergence, divergence=name, labels=labels)
        compare(ranks, function, sides, **place)
    sides[0][2, 0] = 0.5
    compare(
        ranks,
        lambda z, **p: fastkd.cross_entropy(z, labels, label_smoothing=0.1, **p),
        sides[:1],
        **place,
    )
    compare(
        ranks,
        lambda s, t, **p: fastkd.clipped_divergence(s, t, 0.01, 0.9, softness=0.1, **p),
        sides,
        **place,
    )


def second_topk_case(divergence: str, tail: str, ranks: Ranks) -> None:
    vocab = WIDTH * ranks.size
    best = fastkd.teacher_topk(logits(ROWS, vocab, seed=1), 5)
    indices = best.indices.clone()
    indices[1, 4] = -1
    for options in ("plain", "labels"):
        function = functools.partial(
            fastkd.topk_divergence,
            divergence=divergence,
            tail=tail,
            **row_options(options, ranks.size),
        )
        compare(
            ranks,
            lambda z, p, f=function, **place: f(z, p, indices, **place),
            [logits(ROWS, vocab)],
            [best.log_probs.double()],
        )


def second_clipped_case(renormalize: str, ranks: Ranks) -> None:
    vocab = WIDTH * ranks.size
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    bounds = [torch.linspace(0, 0.02, ROWS).double(), torch.linspace(0.2, 1, ROWS).double()]
    for options in ("plain", "labels", "rows"):
        function = functools.partial(
            fastkd.clipped_divergence, renormalize=renormalize, **row_options(options, ranks.size)
        )
        compare(ranks, lambda s, t, f=function, **place: f(s, t, *bounds, **place), sides)
        soft = functools.partial(function, softness=0.05, tail="lump")
        compare(ranks, soft, sides, bounds)


def second_softmax_case(ranks: Ranks) -> None:
    vocab, labels = WIDTH * ranks.size, row_options("labels", ranks.size)["labels"]
    z = logits(ROWS, vocab)
    for given in (
        {},
        {"temperature": 1.5, "label_smoothing": 0.2, "z_loss_weight": 0.01},
        {"entropy_weight": 0.3, "entropy_temperature": 0.7, "logit_softcap": 4.0},
    ):
        compare(ranks, functools.partial(fastkd.cross_entropy, labels=labels, **given), [z])
    texts, ids = z.view(2, 3, vocab), LABELS[ranks.size].view(2, 3)

    def log_probs(z: Tensor, **place: Any) -> Tensor:
        found = fastkd.token_log_probs(z, ids, entropy=True, temperature=1.3, shift=1, **place)
        return found.log_probs + 0.5 * found.entropy

    compare(ranks, log_probs, [texts])
    chunks = torch.tensor([[0, 0, 1], [0, 1, -1]])
    boundary = torch.arange(vocab) % 3 == 0

    def likelihoods(z: Tensor, **place: Any) -> Tensor:
        found = fastkd.chunk_log_likelihood(
            z, ids, chunks, 2, boundary=boundary, temperature=1.3, **place
        )
        assert found.boundary_log_prob is not None
        return found.log_likelihood + 0.5 * found.boundary_log_prob

    compare(ranks, likelihoods, [texts])


def second_head_case(ranks: Ranks) -> None:
    """Linear heads: the hidden states are the same on all processes."""
    vocab, labels = WIDTH * ranks.size, LABELS[ranks.size]
    (h, w, b), (t, v, _) = (head(vocab, i) for i in range(2))
    for reduction in ("mean", "none"):

        def loss(w: Tensor, b: Tensor, v: Tensor, h: Tensor, t: Tensor, **place: Any) -> Tensor:
            return fastkd.softmax_divergence(
                fastkd.LinearLogits(h, w, b, chunk_size=4),
                fastkd.LinearLogits(t, v, softcap=5.0),
                labels=labels,
                divergence="jsd",
                reduction=reduction,  # noqa: B023
                **place,
            )

        compare(ranks, loss, [w, b, v], [h, t], dimension=0)

    def entropy(w: Tensor, h: Tensor, **place: Any) -> Tensor:
        return fastkd.cross_entropy(fastkd.LinearLogits(h, w), labels, **place)

    compare(ranks, entropy, [w], [h], dimension=0)


def second_errors_case(ranks: Ranks) -> None:
    """With inplace=True the logits are gone."""
    z, labels = logits(ROWS, WIDTH), LABELS[2] // 2
    for call in (
        lambda x: fastkd.softmax_divergence(x, z, inplace=True, group=ranks.group),
        lambda x: fastkd.cross_entropy(x, labels, inplace=True, group=ranks.group),
    ):
        x = z.clone().requires_grad_() * 1
        with pytest.raises(RuntimeError, match="need the logits that inplace=True overwrote"):
            torch.autograd.grad(call(x), x, create_graph=True)
    dist.barrier()


def third_derivative_case(ranks: Ranks) -> None:
    """The collectives' gradients can be differentiated any number of times."""
    vocab = WIDTH * ranks.size
    sides, found = [logits(ROWS, vocab, seed=i) for i in range(2)], []
    for place in ({}, {"group": ranks.group}):
        cut = ranks.even(WIDTH) if place else slice(None)
        z = sides[0][:, cut].clone().requires_grad_()
        x = fastkd.softmax_divergence(z, sides[1][:, cut], divergence="reverse_kl", **place)
        for power in (2, 3):
            (x,) = torch.autograd.grad((x**power).sum(), z, create_graph=True)
        found.append(torch.autograd.grad((x**2).sum(), z)[0])
    expected = found[0][:, ranks.even(WIDTH)]
    torch.testing.assert_close(found[1], expected, rtol=1e-9, atol=1e-14)


def second_dtensor_case(ranks: Ranks) -> None:
    """Logits sharded over the vocabulary, and over rows besides."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2) if ranks.size == 4 else (ranks.size,))
    placements = [Shard(0), Shard(1)] if ranks.size == 4 else [Shard(1)]
    vocab, labels = 11, torch.arange(ROWS)
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    for name in ("forward_kl", "decoupled_kl"):
        found = []
        for spread in (False, True):
            z, t = (distribute_tensor(x, mesh, placements) if spread else x for x in sides)
            z = z.clone().detach().requires_grad_()
            loss: Any = fastkd.softmax_divergence(z, t, divergence=name, labels=labels)
            loss = loss.full_tensor() if spread else loss
            # PyTorch does not differentiate the sum over processes that have other rows twice.
            power = 1 if ranks.size == 4 else 2
            (first,) = torch.autograd.grad(loss**power, z, create_graph=True)
            (second,) = torch.autograd.grad((first**2).sum(), z)
            found.append([x.full_tensor() if spread else x for x in (first, second)])
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(y, x, rtol=0, atol=1e-11)


def second_cases(size: int) -> list[tuple[Any, ...]]:
    """The cases of a group of this size, with their arguments."""
    if size != 2:
        return [
            (second_divergence_case, "jsd"),
            (second_width_case, 5),
            (third_derivative_case,),
            (second_dtensor_case,),
        ]
    return [
        *((second_divergence_case, name) for name in ALL_DIVERGENCES),
        *((second_width_case, vocab) for vocab in (2, 7)),
        *((second_topk_case, "forward_kl", tail) for tail in ("lump", "uniform", "drop")),
        (second_topk_case, "reverse_kl", "renormalize"),
        (second_topk_case, "reverse_kl", "uniform"),
        (second_topk_case, "jsd", "lump"),
        *((second_clipped_case, renormalize) for renormalize in ("none", "teacher", "both")),
        (second_softmax_case,),
        (second_head_case,),
        (second_errors_case,),
        (second_dtensor_case,),
        (third_derivative_case,),
    ]
