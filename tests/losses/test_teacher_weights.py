"""Weights of several teachers whose values cannot be read: in graphs, transforms and on meta."""

from contextlib import nullcontext

import pytest
import torch
from cases import logits
from torch._dynamo.testing import CompileCounter

import fastkd

MIXES = ("logits", "probs", "contrast", "share")
pytestmark = pytest.mark.parametrize("mix", MIXES)


def loss_of(mix, student, teachers, weights):
    return fastkd.softmax_divergence(
        student, teachers, teacher_mix=mix, teacher_weights=weights, reduction="none"
    )


def test_one_graph_for_all_numbers_in_a_list(mix):
    student, first, second = (logits((3, 7)) for _ in range(3))

    def loss(number):
        return loss_of(mix, student, [first, second], [number, 1 - number])

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for number in (0.15, 0.25, 0.35, 0.45):
        torch.testing.assert_close(compiled(number), loss(number))
    assert counter.frame_count <= 2


def test_inside_transforms(mix):
    student, teachers = logits((3, 7)), [logits((3, 7)) for _ in range(2)]
    numbers = [0.3, 0.6]
    leaf = student.clone().requires_grad_()
    (right,) = torch.autograd.grad(loss_of(mix, leaf, teachers, numbers).sum(), leaf)

    def total(x, make):
        return loss_of(mix, x, teachers, make(numbers)).sum()

    for make in (list, torch.tensor):  # the tensor belongs to the transform
        torch.testing.assert_close(torch.func.grad(total)(student, make), right)
    several = torch.tensor([[0.3, 0.6], [0.5, 0.2]])
    found = torch.func.vmap(lambda weights: loss_of(mix, student, teachers, weights))(several)
    for mine, weights in zip(found, several, strict=True):
        torch.testing.assert_close(mine, loss_of(mix, student, teachers, weights))


def test_on_the_meta_device(mix):
    student, teacher = torch.empty(3, 7, device="meta"), torch.empty(3, 7, device="meta")
    for weights in ([0.3, 0.6], torch.empty(2, device="meta"), torch.empty(3, 2, device="meta")):
        found = loss_of(mix, student, [teacher, teacher], weights)
        assert found.is_meta
        assert found.shape == (3,)
    with pytest.raises(ValueError, match=r"teacher_weights must be 2 numbers .* got shape \[3\]"):
        loss_of(mix, student, [teacher, teacher], torch.empty(3, device="meta"))


def test_numbers_are_checked_inside_transforms(mix):
    student, teachers = logits((3, 7)), [logits((3, 7)) for _ in range(2)]
    refused = pytest.raises(ValueError, match=r"teacher_weights must .* got -1")
    with nullcontext() if mix == "logits" else refused:  # weights of logits may be negative
        torch.func.grad(lambda x: loss_of(mix, x, teachers, [-1.0, 2.0]).sum())(student)


def test_default_weights(backend, mix):
    """None gives 1/2 for both teachers, and both numbers of an adaptive mixture."""
    student, teachers = logits((3, 50)), [logits((3, 50)) for _ in range(2)]
    found = loss_of(mix, student, teachers, None)
    torch.testing.assert_close(found, loss_of(mix, student, teachers, [0.5, 0.5]))
