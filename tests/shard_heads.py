"""Linear heads whose rows are split across processes, beside one process with the whole heads."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from shard_ranks import LABELS, ROWS, TOLERANCE, WIDTH, Ranks, logits, needed, row_options
from shard_rows import uneven
from torch import Tensor

import fastkd
from fastkd import LinearLogits
from fastkd._ops.shards import Shards

FEATURES = (5, 3)  # of the student's and of the teacher's hidden states
Parts = list[Any]  # hidden states, weight, and bias or None


def head(vocab: int, side: int, dtype: torch.dtype = torch.float64, bias: bool = True) -> Parts:
    """Hidden states, weight and bias."""
    hidden = logits(ROWS, FEATURES[side], seed=side, dtype=torch.float64)
    weight = logits(vocab, FEATURES[side], seed=side + 2) / 5
    offset = logits(vocab, seed=side + 4) / 2 if bias else None
    return [None if x is None else x.to(dtype) for x in (hidden, weight, offset)]


@contextlib.contextmanager
def sent() -> Iterator[list[tuple[str, int]]]:
    """The collectives, each with the bytes that a process sends."""
    found: list[tuple[str, int]] = []
    plain = {name: getattr(Shards, name) for name in ("gather", "sum", "add_up")}

    def recorded(name: str) -> Callable[..., Any]:
        def call(self: Shards, x: Tensor, *dtype: torch.dtype) -> Any:
            found.append((name, x.numel() * (dtype[0] if dtype else x.dtype).itemsize))
            return plain[name](self, x, *dtype)

        return call

    for name in plain:
        setattr(Shards, name, recorded(name))
    try:
        yield found
    finally:
        for name, function in plain.items():
            setattr(Shards, name, function)


def compare(
    ranks: Ranks,
    function: Callable[..., Any],
    sides: list[Parts],
    *,
    tolerance: float,
    columns: slice | None = None,
    frozen: tuple[str, ...] = (),
    collectives: list[str] | None = None,
    head_options: dict[str, Any] | None = None,
    **place: Any,
) -> None:
    """function(*heads, **place): a tensor, of the whole heads and of this process's rows of them.

    frozen: parts that require no gradient, such as "weight 0".
    """
    vocab = sides[0][1].size(0)
    columns = ranks.even(vocab // ranks.size) if columns is None else columns
    runs = []
    for split in (False, True):
        parts: list[Parts] = []
        for i, side in enumerate(sides):
            mine: Parts = []
            for name, x in zip(("hidden", "weight", "bias"), side, strict=True):
                if x is not None:
                    x = x[columns] if split and name != "hidden" else x
                    x = x.clone().requires_grad_(f"{name} {i}" not in frozen)
                mine.append(x)
            parts.append(mine)
        heads = [LinearLogits(*x, **(head_options or {})) for x in parts]
        with sent() as calls:
            found = function(*heads, **(dict(place, group=ranks.group) if split else {}))
            weights = torch.linspace(0.5, 1.5, max(found.numel(), 1)).to(found.dtype)
            if found.requires_grad:
                found.reshape(-1).backward(weights)
        runs.append((found.detach(), parts, [name for name, _ in calls]))
    (expected, whole, _), (found, local, calls) = runs
    scale = expected.abs().clamp(min=1)
    scale = torch.where(scale.isfinite(), scale, 1)
    close = functools.partial(torch.testing.assert_close, rtol=0, equal_nan=True)
    close(found / scale, expected / scale, atol=tolerance)
    ranks.same_bits(found)
    for mine, true in zip(local, whole, strict=True):
        for name, x, y in zip(("hidden", "weight", "bias"), mine, true, strict=True):
            if y is None or y.grad is None:
                assert x is None or x.grad is None or y is None or not y.requires_grad, name
                continue
            assert x is not None
            assert x.grad is not None
            assert x.grad.dtype == x.dtype, name
            grad = y.grad if name == "hidden" else y.grad[columns]
            size = max(1.0, float(y.grad.abs().nan_to_num().amax()) if y.numel() else 1.0)
            close(x.grad / size, grad / size, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
            if name == "hidden":
                ranks.same_bits(x.grad)
    if collectives is not None:
        assert calls == collectives, calls


def head_divergence_case(name: str, options: str, dtype: torch.dtype, ranks: Ranks) -> None:
    """Two all-gathers in each chunk of rows, and one all-reduce of each side's hidden states."""
    given = row_options(options, ranks.size)
    if options == "rows":
        given["beta"] = torch.linspace(0, 1, ROWS)
    given = {**needed(name, ranks.size), **given}
    function = functools.partial(fastkd.softmax_divergence, divergence=name, **given)
    sides = [head(WIDTH * ranks.size, i, dtype) for i in range(2)]
    compare(ranks, function, sides, tolerance=TOLERANCE[dtype])


def head_ops_case(dtype: torch.dtype, ranks: Ranks) -> None:
    """The other ops."""
    vocab, labels = WIDTH * ranks.size, row_options("labels", ranks.size)["labels"]
    sides = [head(vocab, i, dtype) for i in range(2)]
    best = fastkd.teacher_topk(logits(ROWS, vocab, seed=9), 5)
    boundary, chunks = torch.arange(vocab) % 3 == 0, torch.tensor([[0, 0, 1], [0, 1, -1]])
    ids = LABELS[ranks.size].view(2, 3)
    texts = [x if x is None else x.view(2, 3, -1) if i == 0 else x for i, x in enumerate(sides[0])]

    def both(z: Any, **place: Any) -> Tensor:
        found = fastkd.token_log_probs(z, ids, entropy=True, temperature=1.3, shift=1, **place)
        return found.log_probs + 0.5 * found.entropy

    def of_chunks(z: Any, **place: Any) -> Tensor:
        found = fastkd.chunk_log_likelihood(z, ids, chunks, 2, boundary=boundary, **place)
        return found.log_likelihood + 0.5 * found.boundary_log_prob

    check = functools.partial(compare, ranks, tolerance=TOLERANCE[dtype])
    for mix in ("logits", "probs"):
        check(
            lambda s, t, m=mix, **place: fastkd.softmax_divergence(
                s, [t.detach(), t.detach()], teacher_mix=m, teacher_weights=[0.3, 0.9], **place
            ),
            sides,
            head_options={"softcap": 4.0},
        )
    for given in ({"label_smoothing": 0.2, "z_loss_weight": 0.01}, {"reduction": "none"}):
        check(functools.partial(fastkd.cross_entropy, labels=labels, **given), sides[:1])
    for options in ({"softcap": 4.0, "scale": 0.5}, {"chunk_size": 1}):
        check(both, [texts], head_options=options)
        check(of_chunks, [texts], head_options=options)
        for tail in ("lump", "renormalize"):
            check(
                lambda z, t=tail, **place: fastkd.topk_divergence(
                    z, *best, tail=t, labels=labels, **place
                ),
                sides[:1],
                head_options=options,
            )
        check(
            functools.partial(
                fastkd.clipped_divergence, lower=0.001, upper=0.9, labels=labels, softness=0.1
            ),
            sides,
            head_options=options,
        )


def head_width_case(vocab: int, ranks: Ranks) -> None:
    """A short last process, or one without rows of the head; biases; one side frozen."""
    columns, labels = uneven(vocab, ranks), torch.arange(ROWS) % vocab
    place = {"vocab_start": columns.start, "vocab_size": vocab}
    sides = [head(vocab, i) for i in range(2)]
    best = fastkd.teacher_topk(logits(ROWS, vocab, seed=9), min(3, vocab))
    check = functools.partial(
        compare, ranks, tolerance=1e-12, columns=columns, head_options={"chunk_size": 4}, **place
    )
    for frozen in ((), ("weight 0", "bias 0"), ("hidden 0", "weight 1", "bias 1")):
        check(
            functools.partial(fastkd.softmax_divergence, labels=labels, reduction="elementmean"),
            sides,
            frozen=frozen,
        )
    check(functools.partial(fastkd.cross_entropy, labels=labels), sides[:1])
    check(lambda z, **p: fastkd.topk_divergence(z, *best, **p), sides[:1])
    check(lambda s, t, **p: fastkd.clipped_divergence(s, t, 0.01, 0.9, softness=0.1, **p), sides)
    check(lambda z, **p: fastkd.token_log_probs(z, labels, **p), sides[:1])
    mine = [LinearLogits(x[0], x[1][columns], x[2][columns]) for x in sides]
    whole = [LinearLogits(*x) for x in sides]
    found = fastkd.token_stats(*mine, labels=labels, group=ranks.group, **place)
    expected = fastkd.token_stats(*whole, labels=labels)
    for x, y in zip(found[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    topk = fastkd.teacher_topk(mine[1], 2, group=ranks.group, **place)
    assert torch.equal(topk.indices, fastkd.teacher_topk(whole[1], 2).indices)
    torch.testing.assert_close(topk.log_probs, fastkd.teacher_topk(whole[1], 2).log_probs)


def head_padding_case(vocab: int, ranks: Ranks) -> None:
    """vocab_size cuts inside a process, or leaves the last ones nothing: padding gets zeros."""
    sides = [head(WIDTH * ranks.size, i) for i in range(2)]
    for side in sides:
        side[1][vocab:] = torch.nan
    function = functools.partial(fastkd.softmax_divergence, vocab_size=vocab)
    compare(ranks, function, sides, tolerance=1e-12)


def head_rows_case(ranks: Ranks) -> None:
    """Rows that are not read, left out or not; hidden states of other strides; no rows."""
    mask = torch.arange(ROWS) % 2 == 0
    sides = [head(WIDTH * ranks.size, i) for i in range(2)]
    for side in sides:
        side[0][1] = torch.nan
    for compact in (True, False):
        for reduction in ("mean", "none"):
            compare(
                ranks,
                functools.partial(fastkd.softmax_divergence, mask=mask, reduction=reduction),
                sides,
                tolerance=1e-12,
                head_options={"compact": compact, "chunk_size": 2},
            )
    for side in sides:
        side[0] = side[0].nan_to_num().T.contiguous().T
    compare(ranks, fastkd.softmax_divergence, sides, tolerance=1e-12)
    for side in sides:
        side[0] = side[0][:0]
    compare(ranks, fastkd.softmax_divergence, sides, tolerance=0, collectives=["add_up"] * 2)
