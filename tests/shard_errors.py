"""What is refused of vocabularies split across processes, with the same error on every process."""

from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward
from shard_ranks import LABELS, ROWS, WIDTH, Ranks, logits

import fastkd


def columns_error_case(ranks: Ranks) -> None:
    """Columns that no process has, or several, which would make a wrong loss."""
    vocab, labels = WIDTH * ranks.size, LABELS[ranks.size]
    z, t = (logits(ROWS, vocab, seed=i) for i in range(2))
    best = fastkd.teacher_topk(t, 3)
    places: list[tuple[int, dict[str, Any]]] = [
        (WIDTH - ranks.rank, {}),  # unequal widths without vocab_start
        (WIDTH, {"vocab_size": vocab - ranks.rank}),
        (WIDTH, {"vocab_start": ranks.rank * (WIDTH + 1), "vocab_size": vocab}),
        (WIDTH, {"vocab_start": 0, "vocab_size": vocab}),
        (WIDTH, {"vocab_start": vocab + 5, "vocab_size": vocab}),
        (WIDTH, {"vocab_start": ranks.rank * WIDTH, "vocab_size": vocab + 1}),
    ]
    for width, place in places:
        s, u, place = z[:, :width], t[:, :width], {"group": ranks.group, **place}
        for call in (
            lambda s=s, u=u, p=place: fastkd.softmax_divergence(s, u, **p),
            lambda s=s, u=u, p=place: fastkd.softmax_divergence(s, [u, u], **p),
            lambda s=s, u=u, p=place: fastkd.softmax_divergence(
                s, u, labels=labels % WIDTH, divergence="decoupled_kl", **p
            ),
            lambda s=s, p=place: fastkd.topk_divergence(
                s, best.log_probs[:, :1], best.indices[:, :1] % WIDTH, **p
            ),
            lambda s=s, u=u, p=place: fastkd.clipped_divergence(s, u, 0.0, 1.0, **p),
            lambda s=s, p=place: fastkd.cross_entropy(s, labels % WIDTH, **p),
            lambda s=s, p=place: fastkd.token_stats(s, **p),
            lambda s=s, p=place: fastkd.teacher_topk(s, 2, **p),
        ):
            with pytest.raises(ValueError, match="each column of one vocabulary once"):
                call()
    # Any order is right.
    start = (ranks.size - 1 - ranks.rank) * WIDTH
    found = fastkd.cross_entropy(
        z[:, start : start + WIDTH], labels, vocab_start=start, vocab_size=vocab, group=ranks.group
    )
    torch.testing.assert_close(found, fastkd.cross_entropy(z, labels))


def numbers_error_case(ranks: Ranks) -> None:
    """Numbers of one row that are no option's value, devices, and logits that are overwritten."""
    z, labels = logits(ROWS, WIDTH, seed=ranks.rank), LABELS[ranks.size]
    place, low = {"group": ranks.group}, torch.tensor([1.0, 1, -1, 1, 1, 1])
    hidden, weight = logits(ROWS, 3), logits(WIDTH, 3, seed=ranks.rank)
    head = fastkd.LinearLogits(hidden, weight)
    for call, expected in (
        (lambda: fastkd.softmax_divergence(z, z, temperature=low, **place), "temperature .* row 2"),
        (lambda: fastkd.softmax_divergence(head, head, temperature=low, **place), "row 2"),
        (
            lambda: fastkd.softmax_divergence(z, z, beta=low, divergence="jsd", **place),
            r"beta must lie in \[0, 1\], got -1 in row 2",
        ),
        (
            lambda: fastkd.softmax_divergence(z, z, labels=labels, label_weight=low / 0, **place),
            "label_weight must be finite",
        ),
        (lambda: fastkd.clipped_divergence(z, z, 0.0, 1.0, temperature=low, **place), "row 2"),
        (lambda: fastkd.cross_entropy(z, labels, temperature=low, **place), "row 2"),
        (lambda: fastkd.token_log_probs(z, labels, temperature=low, **place), "row 2"),
        (lambda: fastkd.token_stats(z, temperature=low, **place), "temperature"),
        (lambda: fastkd.teacher_topk(z, 2, temperature=low, **place), "temperature"),
        (lambda: fastkd.softmax_divergence(z, z.to("meta"), **place), "on the device of"),
        (lambda: fastkd.softmax_divergence(z, z[:3], **place), r"got shape \[3, 13\]"),
        (
            lambda: fastkd.softmax_divergence(z, z, divergence="decoupled_kl", **place),
            "labels must be given",
        ),
        (
            lambda: fastkd.softmax_divergence(torch.nn.Parameter(z), z, inplace=True, **place),
            "inplace needs plain student_logits",
        ),
        (
            lambda: fastkd.cross_entropy(torch.nn.Parameter(z), labels, inplace=True, **place),
            "inplace needs plain logits",
        ),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
    unread = torch.tensor([True, True, False, True, True, True])
    assert fastkd.softmax_divergence(z, z, temperature=low, mask=unread, **place) == 0


def transform_error_case(ranks: Ranks) -> None:
    z, labels, place = logits(ROWS, WIDTH), LABELS[ranks.size], {"group": ranks.group}
    for function in (
        lambda x: fastkd.softmax_divergence(x, z, **place),
        lambda x: fastkd.cross_entropy(x, labels, **place),
        lambda x: fastkd.token_stats(x, **place).student_lse.sum(),
    ):
        with pytest.raises(NotImplementedError, match=r"group has no torch\.func transforms"):
            torch.func.grad(function)(z)
        with (
            forward.dual_level(),
            pytest.raises(NotImplementedError, match="forward-mode derivatives"),
        ):
            function(forward.make_dual(z, z))
    for call in (
        lambda x: fastkd.softmax_divergence(x, z, reduction="none", **place),
        lambda x: fastkd.cross_entropy(x, labels, reduction="none", **place),
        lambda x: fastkd.clipped_divergence(x, z, 0.0, 1.0, reduction="none", **place),
    ):
        x = z.clone().requires_grad_()
        with pytest.raises(NotImplementedError, match="group has no batches of gradients"):
            torch.autograd.grad(call(x), x, torch.eye(ROWS).double(), is_grads_batched=True)


def fake_case(ranks: Ranks) -> None:
    """Tensors without values: of a fake mode, and on the meta device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    def loss(z: Any, labels: Any) -> Any:
        place = {"labels": labels, "group": ranks.group}
        return fastkd.softmax_divergence(z, z.detach(), **place) + fastkd.softmax_divergence(
            z, z.detach(), divergence="decoupled_kl", **place
        )

    with FakeTensorMode():
        z = torch.empty(ROWS, WIDTH, requires_grad=True)
        loss(z, torch.zeros(ROWS, dtype=torch.int64)).backward()
        assert z.grad is not None
        assert z.grad.shape == z.shape
    z = torch.empty(ROWS, WIDTH, device="meta")
    found = loss(z, torch.zeros(ROWS, dtype=torch.int64, device="meta"))
    assert found.is_meta
    assert found.shape == ()
