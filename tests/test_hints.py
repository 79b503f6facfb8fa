"""Warnings point at the user's line, however many calls of fastkd and torch are in between."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import fastkd
from fastkd._ops import hints

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(autouse=True)
def _none_seen():
    hints.forget()
    yield
    hints.forget()


def head(features=4):
    return fastkd.LinearLogits(torch.randn(3, features), torch.randn(5, features))


def topk():
    return fastkd.teacher_topk(torch.randn(3, 5), 2)


CALLS = {
    "logits": lambda: fastkd.softmax_divergence(torch.randn(3, 5), torch.randn(3, 5), normalizer=0),
    "heads": lambda: fastkd.softmax_divergence(head(), head(), normalizer=0),
    "one call": lambda: fastkd.linear_softmax_divergence(
        *(torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 4)), normalizer=0
    ),
    "head and a store": lambda: fastkd.topk_divergence(head(), *topk(), normalizer=0),
    "cross-entropy of a head": lambda: fastkd.cross_entropy(head(), LABELS, normalizer=0),
    "module": lambda: fastkd.nn.SoftmaxDivergence(label_weight=0.5)(
        torch.randn(3, 5), torch.randn(3, 5)
    ),
    "module of heads": lambda: fastkd.nn.LinearSoftmaxDivergence(label_weight=0.5)(
        torch.randn(3, 4), torch.randn(5, 4), torch.randn(3, 4), torch.randn(5, 4)
    ),
    "modules within torch's": lambda: torch.nn.Sequential(Whole())(torch.randn(3, 5)),
    "recipe": lambda: fastkd.recipes.dkd(
        torch.randn(3, 5), torch.randn(3, 5), LABELS, normalizer=0
    ),
}


class Whole(torch.nn.Module):
    """Divides by 0 in the middle of other modules."""

    def forward(self, x):
        return fastkd.softmax_divergence(x, x, normalizer=0)


@pytest.mark.parametrize("name", CALLS)
def test_the_line_is_the_users(name):
    with pytest.warns(UserWarning, match=r"normalizer is 0|label_weight is") as caught:
        CALLS[name]()
    assert [x.filename for x in caught] == [__file__]


def test_a_package_beside_fastkd_is_not_fastkd(tmp_path):
    """Nor is a program without a file: the line that called is the last there is."""
    code = (
        "import torch, fastkd\nx = torch.randn(2, 5)\nfastkd.softmax_divergence(x, x, normalizer=0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "<string>:3: UserWarning: softmax_divergence: normalizer is 0" in found.stderr


def chunks(boundaries, **options):
    ids, number = torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 2]])
    logits = torch.randn(1, 3, 4, requires_grad=True)
    student, teacher = boundaries
    loss = fastkd.alm_loss(
        *(logits, ids, number, torch.randn(1, 3, 4), ids, number, 3),
        student_boundary=student,
        teacher_boundary=teacher,
        divergence="k2",
        **options,
    )
    return torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_chunks_that_no_token_ends(side, kind):
    """An empty boundary set: all chunks but the last have probability 0."""
    some, none = kind([False, True, False, True]), kind([False] * 4)
    sets = (none, some) if side == "student" else (some, none)
    with pytest.warns(UserWarning, match=f"alm_loss: no token of {side}_boundary begins") as caught:
        gradient = chunks(sets)
    assert [x.filename for x in caught] == [__file__]
    assert not gradient[0, :2].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chunks(sets)  # once
        hints.forget()
        chunks((some, some))
        chunks(sets, debias=False)
        fastkd.nn.AlmLoss(student_boundary=some, teacher_boundary=none)
