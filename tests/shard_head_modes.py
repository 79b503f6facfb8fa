"""Split linear heads: what is sent, dtypes, compiled calls, errors and DTensors."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from shard_heads import FEATURES, compare, head, sent
from shard_ranks import LABELS, ROWS, WIDTH, Ranks, logits
from torch import Tensor

import fastkd
from fastkd import LinearLogits


def head_payload_case(ranks: Ranks) -> None:
    """What is sent: in each chunk as of logits; then the hidden states' gradients in float32."""
    vocab, labels = WIDTH * ranks.size, LABELS[ranks.size]
    columns = ranks.even(WIDTH)
    best = fastkd.teacher_topk(logits(ROWS, vocab, seed=9), 5)
    for dtype in (torch.float32, torch.bfloat16):
        (h, w, _), (t, v, _) = (head(vocab, i, dtype, bias=False) for i in range(2))
        w, v = w[columns], v[columns]
        h.requires_grad_(), w.requires_grad_()
        student, teacher = LinearLogits(h, w, chunk_size=4), LinearLogits(t, v)
        up = ("add_up", ROWS * FEATURES[0] * 4)
        chunks = (3, 3)  # equal chunks of at most 4 of 6 rows

        def gathers(*sizes: int, rows: tuple[int, ...] = chunks) -> list[tuple[str, int]]:
            """Each chunk's all-gathers; the first of a call has two rows more."""
            first = {16, 20, 48, 12} - ({12} if 48 in sizes else set())
            return [("gather", (n + 2 * (x in first)) * x) for n in rows for x in sizes]

        with sent() as found:
            fastkd.softmax_divergence(student, teacher, group=ranks.group).backward()
            assert found == [*gathers(16, 8), up]
            found.clear()
            loss = fastkd.softmax_divergence(
                student, teacher, labels=labels, reduction="none", group=ranks.group
            )
            assert found == gathers(20, 4)
            found.clear()
            loss.sum().backward()  # the logits again, and their gradient
            assert found == [*gathers(20, 8), up]
            found.clear()
            fastkd.topk_divergence(student, *best, group=ranks.group).backward()
            each = [[("gather", (n + 2) * 8), ("sum", n * 20)] for n in chunks]
            assert found == [*each[0], *each[1], up]
            found.clear()
            with torch.no_grad():
                fastkd.linear_softmax_divergence(
                    h, w, t, v, return_stats=True, chunk_size=4, group=ranks.group
                )
            # The statistics' 48 and 12 bytes, then the loss's.
            assert found == gathers(48, 12, 16, 4)
            found.clear()
            fastkd.cross_entropy(LinearLogits(h.detach(), w), labels, group=ranks.group).backward()
            assert found == gathers(12, rows=(ROWS,))


def head_dtype_case(dtype: torch.dtype, ranks: Ranks) -> None:
    """16-bit heads: gradients as of one process, which rounds once."""
    vocab, columns = WIDTH * ranks.size, ranks.even(WIDTH)
    grads = []
    for split in (False, True):
        (h, w, b), teacher = (head(vocab, i, dtype) for i in range(2))
        cut = columns if split else slice(None)
        parts = [h.requires_grad_(), w[cut].clone().requires_grad_(), b[cut].clone()]
        other = LinearLogits(teacher[0], *(x[cut] for x in teacher[1:]))
        place = {"group": ranks.group} if split else {}
        loss = fastkd.softmax_divergence(LinearLogits(*parts), other, divergence="jsd", **place)
        loss.backward()
        grads.append((loss, parts[0].grad, parts[1].grad if split else parts[1].grad[columns]))
        if split:
            ranks.same_bits(parts[0].grad.float())
    for x, y in zip(*grads, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x.float(), y.float(), rtol=2**-6, atol=2e-3)


def head_modes_case(ranks: Ranks) -> None:
    """One graph without a break; teachers of inference mode; checkpointing; tied heads."""
    vocab, labels, columns = WIDTH * ranks.size, LABELS[ranks.size], ranks.even(WIDTH)
    sides = [head(vocab, i) for i in range(2)]
    parts = [[x if i == 0 else x[columns] for i, x in enumerate(side)] for side in sides]

    def losses(h: Any, w: Any, b: Any, t: Any, v: Any, c: Any) -> Any:
        student, teacher = LinearLogits(h, w, b, chunk_size=4), LinearLogits(t, v, c)
        options: dict[str, Any] = {"labels": labels, "group": ranks.group}
        log_probs = fastkd.token_log_probs(student, labels, group=ranks.group)
        loss, stats = fastkd.linear_softmax_divergence(
            h, w, t, v, return_stats=True, logit_softcap=3.0, **options
        )
        none = fastkd.softmax_divergence(student, teacher, reduction="none", **options)
        best = fastkd.teacher_topk(teacher, 3, group=ranks.group)
        topk = fastkd.topk_divergence(student, *best, group=ranks.group)
        return (
            loss + none.sum() + topk + log_probs.sum() + fastkd.softmax_divergence(
                student, teacher, divergence="jsd", **options
            ),
            stats.tvd, stats.student_label_log_prob, stats.teacher_argmax,
        )  # fmt: skip

    found = []
    for call in (losses, torch.compile(losses, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in [*parts[0], *parts[1]]]
        results = call(*inputs)
        found.append([*results, *torch.autograd.grad(results[0], inputs)])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-11)
    plain = fastkd.linear_softmax_divergence(
        *sides[0][:2],
        *sides[1][:2],
        return_stats=True,
        logit_softcap=3.0,
        labels=labels,
    )[1]
    for i, field in ((1, "tvd"), (2, "student_label_log_prob"), (3, "teacher_argmax")):
        torch.testing.assert_close(found[0][i], getattr(plain, field), rtol=0, atol=1e-12)
    with torch.inference_mode():
        teacher = LinearLogits(*(x.clone() for x in parts[1]))
        dense = teacher.logits()
    whole = [LinearLogits(*x) for x in sides]
    expected = fastkd.softmax_divergence(*whole)
    for other in (teacher, dense):
        h = parts[0][0].clone().requires_grad_()
        loss = fastkd.softmax_divergence(LinearLogits(h, *parts[0][1:]), other, group=ranks.group)
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-12)
    checkpointed = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    up = ["add_up"] * 2
    for function, calls in (
        (
            lambda s, t, **place: checkpointed(
                lambda: fastkd.softmax_divergence(s, t, divergence="jsd", **place)
            ),
            [*["gather"] * 2, *up] * 2,  # all again in the backward pass
        ),
        (
            lambda s, t, **place: checkpointed(lambda: fastkd.token_log_probs(s, labels, **place)),
            [*["gather"] * 3, "add_up"],
        ),
    ):
        compare(ranks, function, sides, tolerance=1e-12, collectives=calls)
    compare(
        ranks,
        lambda z, **place: fastkd.softmax_divergence(
            z, LinearLogits(z.hidden.detach() + 1, z.weight, z.bias), **place
        ),
        sides[:1],
        tolerance=1e-12,
    )


def head_unreduced_case(ranks: Ranks) -> None:
    """Each process's part of the hidden states' gradient, which something before the head sums."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    vocab, labels, columns = WIDTH * ranks.size, LABELS[ranks.size], ranks.even(WIDTH)
    (h, w, b), (t, v, c) = (head(vocab, i) for i in range(2))
    place: dict[str, Any] = {"reduce_hidden_grad": False}

    def linear(h: Any, w: Any, b: Any, t: Any, v: Any, c: Any, **given: Any) -> Any:
        return fastkd.linear_softmax_divergence(
            h, w, t, v, student_bias=b, teacher_bias=c, chunk_size=4, labels=labels, **given
        )

    def log_probs(h: Any, w: Any, b: Any, *_: Any, group: Any = None, **given: Any) -> Any:
        return fastkd.token_log_probs(LinearLogits(h, w, b, **given), labels, group=group).sum()

    def none(
        h: Any, w: Any, b: Any, t: Any, v: Any, c: Any, group: Any = None, **given: Any
    ) -> Any:
        heads = LinearLogits(h, w, b, **given), LinearLogits(t, v, c, **given)
        return fastkd.softmax_divergence(*heads, reduction="none", group=group).sum()

    local = [h, w[columns], b[columns], t, v[columns], c[columns]]
    for function in (linear, log_probs, none):
        runs = []
        for parts, given in (([h, w, b, t, v, c], place), (local, {**place, "group": ranks.group})):
            run = function
            for _ in range(2 if len(given) > 1 else 1):
                leaves = [x.detach().clone().requires_grad_() for x in parts]
                with sent() as found:
                    run(*leaves, **given).backward()
                assert all(name != "add_up" for name, _ in found)
                runs.append([x.grad for x in leaves])
                run = torch.compile(function, fullgraph=True, backend="aot_eager")
        true, eager, graph = runs
        for place_of_hidden in (0, 3) if function is not log_probs else (0,):
            for mine in (eager, graph):
                assert mine[place_of_hidden].dtype == h.dtype
                torch.distributed.all_reduce(mine[place_of_hidden])
                torch.testing.assert_close(
                    mine[place_of_hidden], true[place_of_hidden], rtol=0, atol=1e-12
                )
        torch.testing.assert_close(eager[1], true[1][columns], rtol=0, atol=1e-12)
    # A sequence that is gathered: the gradient of the gather sums and splits what it gets.
    mesh = init_device_mesh("cpu", (ranks.size,))
    own = distribute_tensor(h.clone(), mesh, [Shard(0)]).requires_grad_()
    weight, other = (distribute_tensor(x.clone(), mesh, [Shard(0)]) for x in (w, v))
    teacher = LinearLogits(distribute_tensor(t, mesh, [Replicate()]), other)
    whole = distribute_tensor(h.clone(), mesh, [Replicate()]).requires_grad_()
    leaf = h.clone().requires_grad_()
    fastkd.linear_softmax_divergence(leaf, w, t, v).backward()
    for hidden, mine in ((own.redistribute(mesh, [Replicate()]), own), (whole, whole)):
        with sent() as found:
            student = LinearLogits(hidden, weight, **place)
            fastkd.softmax_divergence(student, teacher).full_tensor().backward()
        assert [name for name, _ in found] == ["gather"] * 2
        torch.testing.assert_close(mine.grad.full_tensor(), leaf.grad, rtol=0, atol=1e-12)
    assert whole.grad.placements == (Partial("sum"),)
    with pytest.raises(TypeError, match="reduce_hidden_grad must be True or False"):
        LinearLogits(h, w, reduce_hidden_grad=2)


def head_error_case(ranks: Ranks) -> None:
    """Errors name the row of the call; what is not available says so on all processes."""
    h, w, _ = head(WIDTH, 0)
    student = LinearLogits(h.requires_grad_(), w.requires_grad_(), chunk_size=2)
    labels = torch.zeros(ROWS, dtype=torch.int64)
    labels[4] = WIDTH * ranks.size
    place = {"group": ranks.group}
    with pytest.raises(IndexError, match=r"labels must lie in \[0, .* in row 4"):
        fastkd.cross_entropy(student, labels, **place)
    with pytest.raises(IndexError, match=r"token_ids must lie in \[0, .* in row 4"):
        fastkd.token_log_probs(student, labels, **place)
    with pytest.raises(IndexError, match=r"^linear_softmax_divergence: labels .* in row 4"):
        fastkd.linear_softmax_divergence(h, w, h, w, labels=labels, **place)
    with pytest.raises(ValueError, match="vocab_start needs vocab_size"):
        fastkd.linear_softmax_divergence(h, w, h, w, vocab_start=0, **place)
    with pytest.raises(ValueError, match="mask must have one entry a row"):
        fastkd.softmax_divergence(student, student, mask=torch.ones(2, dtype=torch.bool), **place)
    with pytest.raises(NotImplementedError, match=r"torch\.func transforms"):
        torch.func.grad(lambda x: fastkd.cross_entropy(LinearLogits(x, w), labels * 0, **place))(
            h.detach()
        )


def head_dtensor_case(kind: str, ranks: Ranks) -> None:
    """Heads that are DTensors: values, gradients and placements."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, ranks.size // 2) if kind == "both" else (ranks.size,))
    whole, rows, vocab = Replicate(), Shard(0), Shard(0)
    of_hidden, of_weight = {
        "vocab": ([whole], [vocab]),
        "rows": ([rows], [whole]),
        "neither": ([whole], [whole]),
        "both": ([rows, whole], [whole, vocab]),
    }[kind]
    columns = 11  # uneven parts
    labels = torch.arange(ROWS) % columns
    labels[:2] = -100
    sides = [head(columns, i) for i in range(2)]
    best = fastkd.teacher_topk(logits(ROWS, columns, seed=9), 3)
    functions: dict[str, Callable[[Any, Any], Any]] = {
        "mean": lambda s, t: fastkd.softmax_divergence(s, t, labels=labels),
        "none": lambda s, t: fastkd.softmax_divergence(s, t, reduction="none"),
        "elementmean": lambda s, t: fastkd.softmax_divergence(
            s, t, divergence="jsd", reduction="elementmean", vocab_size=9
        ),
        "logits": lambda s, t: fastkd.softmax_divergence(s.logits(), t),
        "topk": lambda s, t: fastkd.topk_divergence(s, *best),
        "clipped": lambda s, t: fastkd.clipped_divergence(s, t, 0.01, 0.5, softness=0.1),
        "cross_entropy": lambda s, t: fastkd.cross_entropy(s, labels, label_smoothing=0.1),
        "token_log_probs": lambda s, t: fastkd.token_log_probs(s, labels),
        "stats": lambda s, t: fastkd.token_stats(s, t).tvd,
        "teacher_topk": lambda s, t: fastkd.teacher_topk(t, 3).log_probs,
        "linear": lambda s, t: fastkd.linear_softmax_divergence(
            s.hidden, s.weight, t.hidden, t.weight, labels=labels
        ),
        "with_stats": lambda s, t: (
            fastkd.linear_softmax_divergence(
                s.hidden, s.weight, t.hidden, t.weight, return_stats=True
            )[1].student_entropy
        ),
    }
    for name, function in functions.items():
        plain = [[x.clone().requires_grad_() for x in side] for side in sides]
        spread = [
            [
                distribute_tensor(x.clone(), mesh, of_weight if i else of_hidden).requires_grad_()
                for i, x in enumerate(side)
            ]
            for side in sides
        ]
        expected, found = (
            function(*(LinearLogits(*x, chunk_size=4) for x in parts)) for parts in (plain, spread)
        )
        close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=1e-12, msg=name)
        close(found.full_tensor(), expected)
        if not expected.requires_grad:
            continue
        found.full_tensor().sum().backward()
        expected.sum().backward()
        for mine, true in zip(spread, plain, strict=True):
            for x, y in zip(mine, true, strict=True):
                assert (x.grad is None) == (y.grad is None), name
                if y.grad is not None:
                    # A product of DTensors leaves the sum over processes to be done.
                    assert x.grad.placements == x.placements or name == "logits", name
                    torch.testing.assert_close(
                        x.grad.full_tensor(), y.grad, rtol=0, atol=1e-12, msg=name
                    )


def head_dtensor_error_case(ranks: Ranks) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (ranks.size,))
    (h, w, b), (t, v, _) = (head(8, i) for i in range(2))

    def spread(x: Tensor, placement: Any) -> Any:
        return distribute_tensor(x, mesh, [placement])

    hidden, weight = spread(h, Replicate()), spread(w, Shard(0))
    student, alone = LinearLogits(hidden, weight), LinearLogits(h, w)
    other = LinearLogits(spread(t, Replicate()), spread(v, Replicate()))
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, "weight must be a plain tensor.*call_through", lambda: LinearLogits(h, weight)),
        (TypeError, "hidden must be a plain tensor", lambda: LinearLogits(hidden, w)),
        (TypeError, "bias must be a DTensor", lambda: LinearLogits(hidden, weight, b)),
        (
            ValueError,
            "shards both weight and the rows of hidden.*call_through",
            lambda: LinearLogits(spread(h, Shard(0)), weight),
        ),
        (ValueError, "each dimension", lambda: LinearLogits(hidden, spread(w, Shard(1)))),
        (ValueError, "each dimension", lambda: LinearLogits(spread(h, Shard(1)), weight)),
        (
            ValueError,
            "bias must have the placements",
            lambda: LinearLogits(hidden, weight, spread(b, Replicate())),
        ),
        (
            ValueError,
            "group and vocab_start must be None",
            lambda: fastkd.softmax_divergence(student, student, group=ranks.group),
        ),
        (
            ValueError,
            "teacher_logits must be placed as student_logits",
            lambda: fastkd.softmax_divergence(student, other),
        ),
        (ValueError, "got plain tensors", lambda: fastkd.softmax_divergence(student, alone)),
        (TypeError, "must be, too", lambda: fastkd.softmax_divergence(alone, student)),
        (TypeError, "must be, too", lambda: fastkd.softmax_divergence(alone.logits(), student)),
        (
            TypeError,
            "teacher_logits",
            lambda: fastkd.softmax_divergence(alone, spread(alone.logits(), Shard(1))),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()


def head_fsdp_case(ranks: Ranks) -> None:
    """Tensor parallelism inside FSDP2: the loss in the forward of the module that owns the head."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, ranks.size // 2), mesh_dim_names=("data", "tensor"))
    split = mesh["tensor"]
    (hidden, weight, _), (t, v, _) = (head(10, i, bias=False) for i in range(2))

    class Head(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(distribute_tensor(weight, split, [Shard(0)]))

        def forward(self, h: Tensor, t: Tensor) -> Any:
            h, t = (DTensor.from_local(x, split, [Replicate()], run_check=False) for x in (h, t))
            teacher = LinearLogits(t, distribute_tensor(v, split, [Shard(0)]))
            loss = fastkd.softmax_divergence(LinearLogits(h, self.weight), teacher)
            return loss.full_tensor().clone()

    module = fully_shard(Head(), mesh=mesh["data"])
    part = slice(3 * mesh.get_local_rank("data"), 3 * mesh.get_local_rank("data") + 3)
    mine = hidden[part].clone().requires_grad_()
    module(mine, t[part]).backward()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    fastkd.linear_softmax_divergence(h, w, t, v).backward()
    torch.testing.assert_close(mine.grad, 2 * h.grad[part], rtol=0, atol=1e-12)
    torch.testing.assert_close(module.weight.grad.full_tensor(), w.grad, rtol=0, atol=1e-12)
    with pytest.raises(TypeError, match="call_through"):
        LinearLogits(hidden, module.weight)
