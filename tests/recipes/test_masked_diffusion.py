"""dparallel against its definition."""

import math

import pytest
import torch
from recipe_checks import (
    Entry,
    kept_of,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    problem,
    promises,
)

from fastkd import recipes


def trajectory(dtype):
    """Labels that half of the rows find likeliest."""
    tensors = problem(dtype, "labels")
    del tensors["teacher_logits"]
    best, labels = tensors["student_logits"].argmax(-1), tensors["labels"]
    found = torch.rand(labels.shape) < 0.5
    found[0, 0] = True
    tensors["labels"] = torch.where(found & (labels != -100), best, labels)
    return tensors


def plain_dparallel(tensors, beta=2.0, temperature=0.5, reduction="mean"):
    surprise, uncertainty, right = [], [], 0
    for b, t in kept_of(tensors).nonzero().tolist():
        z, label = tensors["student_logits"][b, t], tensors["labels"][b, t]
        surprise.append(-z.log_softmax(-1)[label])
        if z.argmax() == label:
            q = (z / temperature).softmax(-1)
            uncertainty.append(-sum(q[v] * q[v].log() for v in range(len(q))))
            right += 1
    if reduction == "sum":
        return sum(surprise) + beta * sum(uncertainty)
    return sum(surprise) / len(surprise) + beta * sum(uncertainty) / max(1, right)


ENTRIES = [
    Entry(
        "dparallel",
        plain_dparallel,
        problem=trajectory,
        reductions=(),
        published={"beta": 2.0, "temperature": 0.5},
    ),
    Entry(
        "dparallel",
        plain_dparallel,
        {"beta": 1.0, "temperature": 1.0, "reduction": "sum"},
        problem=trajectory,
        reductions=(),
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = trajectory(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {"all": lambda x: recipes.dparallel(**GIVEN, beta=x, temperature=x)}
)


def test_rows_add_up():
    tensors = trajectory(torch.float64)
    rows = recipes.dparallel(**tensors, reduction="none")
    assert torch.equal(rows != 0, kept_of(tensors))
    torch.testing.assert_close(rows.sum(), recipes.dparallel(**tensors, reduction="sum"))


def test_none_correct_is_the_cross_entropy():
    """Also where a masked column is -inf, and where no other column is."""
    tensors = trajectory(torch.float64)
    tensors["labels"] = tensors["student_logits"].argmin(-1)
    z = tensors["student_logits"]
    worst = z.argmin(-1, keepdim=True)
    z = z.scatter(-1, (worst + 1) % 11, -math.inf).requires_grad_()
    tensors["student_logits"] = z
    found = recipes.dparallel(**tensors)
    mask = tensors["mask"]
    right = torch.nn.functional.cross_entropy(z[mask], tensors["labels"][mask])
    torch.testing.assert_close(found, right)
    both = [torch.autograd.grad(x, z)[0] for x in (found, right)]
    assert both[0].isfinite().all()
    torch.testing.assert_close(both[0], both[1])


def test_the_derivative_of_the_entropy():
    """dH/dz = -q (log q + H) / temperature in rows that are right."""
    z = torch.randn(1, 1, 9, dtype=torch.float64).requires_grad_()
    labels, mask = z.argmax(-1), torch.ones(1, 1, dtype=torch.bool)
    losses = [recipes.dparallel(z, labels, mask, beta=beta) for beta in (1.0, 0.0)]
    (found,) = torch.autograd.grad(losses[0] - losses[1], z)
    q = (z / 0.5).softmax(-1).detach()
    entropy = -(q * q.log()).sum(-1, keepdim=True)
    torch.testing.assert_close(found, -q * (q.log() + entropy) / 0.5)


def test_complementary_masks():
    tensors = trajectory(torch.float64)
    mask = tensors.pop("mask")
    parts = [recipes.dparallel(**tensors, mask=x, reduction="sum") for x in (mask, ~mask)]
    whole = recipes.dparallel(**tensors, mask=mask | ~mask, reduction="sum")
    torch.testing.assert_close(sum(parts), whole)


def test_errors():
    tensors = trajectory(torch.float32)
    with pytest.raises(ValueError, match=r"dparallel: mask must be bool \[3, 5\]"):
        recipes.dparallel(**{**tensors, "mask": tensors["mask"].float()})
    with pytest.raises(TypeError, match="dparallel: mask must be a tensor, got NoneType"):
        recipes.dparallel(**{**tensors, "mask": None})
    with pytest.raises(ValueError, match="dparallel: reduction must be one of mean, sum, none"):
        recipes.dparallel(**tensors, reduction="batchmean")
