"""What is sent, repeats, groups of one, compiled calls and DTensors."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import ALL_DIVERGENCES, NEED_LABELS
from shard_ranks import LABELS, ROWS, WIDTH, Ranks, logits, needed
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastkd


def payload_case(ranks: Ranks) -> None:
    """What is sent: 16 bytes a row, 4 for the label; then 4 for the value and each gradient.

    decoupled_kl has the label's logits of both sides, always.
    """
    from fastkd._ops.shards import Shards

    sent: list[int] = []
    gather = Shards.gather

    def recorded(self: Shards, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        sent.append(numbers.size(0) * dtype.itemsize)
        return gather(self, numbers, dtype)

    z, labels = logits(ROWS, WIDTH, seed=ranks.rank, dtype=torch.float32), LABELS[2]
    Shards.gather = recorded  # type: ignore[method-assign]
    try:
        for name in ALL_DIVERGENCES:
            call = functools.partial(fastkd.softmax_divergence, divergence=name, group=ranks.group)
            with torch.no_grad():
                call(z, z, **needed(name, ranks.size))
            call(z.clone().requires_grad_(), z, labels=labels)
            call(*(z.clone().requires_grad_() for _ in range(2)), labels=labels, temperature=2.0)
            first = (24, 24, 28) if name in NEED_LABELS else (16, 20, 24)
            assert sent == [first[0], 4, first[1], 8, first[2], 12], (name, sent)
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


def compile_case(ranks: Ranks) -> None:
    """One graph without a break, and a second one for all other numbers of rows."""
    columns = ranks.even(WIDTH)
    every = [logits(9, WIDTH * ranks.size, seed=i)[:, columns] for i in range(2)]
    for function, sizes in (
        (
            lambda s, t, ids: fastkd.softmax_divergence(s, t, labels=ids, group=ranks.group),
            (6, 9, 7),
        ),
        (
            lambda s, t, ids: fastkd.cross_entropy(
                s, ids, label_smoothing=0.1, z_loss_weight=0.1, group=ranks.group
            ),
            (6,),
        ),
        (
            lambda s, t, ids: fastkd.softmax_divergence(
                s, [t, s.detach() + 1], teacher_mix="contrast", group=ranks.group
            ),
            (6,),
        ),
        (
            lambda s, t, ids: fastkd.softmax_divergence(
                s, t, labels=ids, divergence="decoupled_kl", temperature=2.0, group=ranks.group
            ),
            (6,),
        ),
        (
            lambda s, t, ids: fastkd.clipped_divergence(
                s, t, 0.01, 0.9, softness=0.1, labels=ids, group=ranks.group
            ),
            (6, 9, 7),
        ),
    ):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(function, fullgraph=True, backend=counter)
        for size in sizes:
            labels, found = torch.arange(size) * 5 % (WIDTH * ranks.size), []
            for call in (function, compiled):
                a = every[0][:size].clone().requires_grad_()
                loss = call(a, every[1][:size], labels)
                loss.backward()
                found.append((loss.detach(), a.grad))
            torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)
        assert counter.frame_count == min(len(sizes), 2)


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
    taught = torch.where(labels < 0, -1, torch.arange(15).view(3, 5).flip(0, 1))
    best = fastkd.teacher_topk(t, 4)
    boundary, chunks = torch.arange(vocab) % 2 == 0, torch.tensor([0, 0, 1, 2, 2]).expand(3, 5)
    weight = torch.linspace(0, 1, 15, dtype=torch.float64).view(3, 5)
    rows = [Partial("sum") if type(x) is Shard and x.dim == 0 else Replicate() for x in placements]
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "mean": lambda z, t: fastkd.softmax_divergence(z, t, labels=labels),
        "decoupled": lambda z, t: fastkd.softmax_divergence(
            z, t, labels=labels, divergence="decoupled_kl", temperature=2.0
        ),
        "batchmean": lambda z, t: fastkd.softmax_divergence(
            z, t, divergence="jsd", reduction="batchmean"
        ),
        "none": lambda z, t: fastkd.softmax_divergence(z, t, reduction="none", weight=weight),
        "elementmean": lambda z, t: fastkd.softmax_divergence(
            z, t, reduction="elementmean", vocab_size=9
        ),
        "teacher_rows": lambda z, t: fastkd.softmax_divergence(
            z, t.detach(), teacher_rows=taught, shift=1
        ),
        "teacher_rows of others": lambda z, t: fastkd.softmax_divergence(
            z, t.detach()[0], teacher_rows=taught.clamp(max=4), reduction="none"
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
    with pytest.raises(TypeError, match="topk_stats: student_logits must be a plain tensor"):
        fastkd.topk_stats(vocab, torch.zeros(ROWS, 1), torch.zeros(ROWS, 1, dtype=torch.int64))


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


def inference_case(ranks: Ranks) -> None:
    """Teachers, options and bounds made under torch.inference_mode."""
    vocab, columns = WIDTH * ranks.size, ranks.even(WIDTH)
    sides = [logits(ROWS, vocab, seed=i) for i in range(2)]
    with torch.inference_mode():
        teacher = sides[1][:, columns].clone()
        temperature, lower = torch.full((ROWS,), 1.5), torch.full((ROWS,), 0.01)
        best = fastkd.teacher_topk(teacher, 2, group=ranks.group)
        ids = best.indices[:, 0].clone()
    for call in (
        lambda z: fastkd.softmax_divergence(
            z, teacher, temperature=temperature, labels=ids, group=ranks.group
        ),
        lambda z: fastkd.clipped_divergence(z, teacher, lower, 0.9, group=ranks.group),
        lambda z: fastkd.topk_divergence(z, *best, group=ranks.group),
        lambda z: fastkd.cross_entropy(z, ids, temperature=temperature, group=ranks.group),
    ):
        z = sides[0][:, columns].clone().requires_grad_()
        call(z).backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()
