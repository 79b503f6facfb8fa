"""Masks in the losses of the phases: padded tokens do not count and are not read."""

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastkd
from fastkd import acm

nn = torch.nn


def model():
    torch.manual_seed(0)
    mlp = lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))  # noqa: E731
    return acm.convert(nn.Sequential(mlp(), mlp()), num_learners=3).double()


MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]])


def seen(made, x, originals=True):
    with acm.calls(made, originals=originals) as calls:
        made(x)
    return calls


@pytest.mark.parametrize("loss", [acm.phase1_loss, acm.phase2_loss])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_imitation_of_the_kept_rows_alone(loss, kind):
    made, x = model(), torch.randn(4, 5, 8, dtype=torch.float64)
    mask = MASK.bool()
    expected = loss(seen(made, x[mask]))
    torch.testing.assert_close(loss(seen(made, x), mask=MASK.to(kind)), expected)
    x[~mask] = torch.nan  # not read
    found = loss(seen(made, x), mask=MASK.to(kind))
    torch.testing.assert_close(found, expected)
    found.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())
    # A module that gets its rows in another shape.
    flat = seen(made, x.flatten(0, 1))
    torch.testing.assert_close(loss(flat, mask=MASK), expected)
    nothing = loss(seen(made, x), mask=torch.zeros_like(MASK))
    assert nothing == 0


def test_all_rows_kept_is_no_mask():
    made, x = model(), torch.randn(4, 5, 8, dtype=torch.float64)
    every = torch.ones(4, 5, dtype=torch.bool)
    for loss in (acm.phase1_loss, acm.phase2_loss):
        torch.testing.assert_close(loss(seen(made, x), mask=every), loss(seen(made, x)))
    gates = [torch.rand(4, 5, 4).softmax(-1), torch.rand(4, 5, 3).softmax(-1)]
    found = acm.regularizers(gates, [1.0, 2.0], 0.4, mask=every)
    torch.testing.assert_close(
        torch.stack(found), torch.stack(acm.regularizers(gates, [1.0, 2.0], 0.4))
    )


def test_regularizers_of_padded_sequences():
    """Means over each sequence's own tokens, then over the sequences that have any."""
    torch.manual_seed(1)
    gates = [torch.rand(4, 5, n + 1, dtype=torch.float64).softmax(-1) for n in (3, 2)]
    costs, mask = [1.0, 2.0], MASK.bool()
    kept = [i for i in range(4) if mask[i].any()]
    used, entropies, shares = 0.0, [], torch.zeros(len(kept), dtype=torch.float64)
    for gate, cost in zip(gates, costs, strict=True):
        n = gate.size(-1) - 1
        steps = torch.arange(n + 1, dtype=torch.float64)
        means = [gate[i][mask[i]].mean(0) for i in kept]
        used += cost * sum((m * steps).sum() for m in means) / len(kept)
        for m in means:
            a = m / m.sum()
            entropies.append(-(a * a.log()).sum() / torch.tensor(n + 1.0).log())
        shares += torch.stack([(m * steps).sum() / (n + 1) for m in means]) / len(gates)
    whole = sum(c * (g.size(-1) - 1) for g, c in zip(gates, costs, strict=True))
    pairs = (shares.unsqueeze(0) - shares.unsqueeze(1)).abs()
    expected = [(used / whole - 0.4).abs(), -torch.stack(entropies).mean(), -2 * pairs.mean()]
    for gate in gates:
        gate[~mask] = torch.nan
    found = acm.regularizers(gates, costs, 0.4, mask=mask)
    for name, mine, right in zip(found._fields, found, expected, strict=True):
        torch.testing.assert_close(mine, right.to(mine.dtype), msg=name)
    compiled = torch.compile(acm.regularizers, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(gates, costs, 0.4, mask=mask), found)
    none = acm.regularizers(gates, costs, 0.25, mask=torch.zeros_like(mask))
    assert torch.stack(none).tolist() == [0.25, 0, 0]


def test_phase_three_takes_a_mask():
    made, x = model(), torch.randn(4, 5, 8, dtype=torch.float64)
    made.train()
    calls = seen(made, x, originals=False)
    zero = torch.zeros((), dtype=torch.float64)
    found = acm.phase3_loss(zero, calls, target=0.4, mask=MASK)
    terms = acm.regularizers(
        [c.gates for c in calls], [c.module.cost for c in calls], 0.4, mask=MASK
    )
    expected = 0.1 * terms.budget + 0.05 * terms.entropy + 0.05 * terms.diversity
    torch.testing.assert_close(found, expected)
    found.backward()
    assert made[0].gate.layers[0].weight.grad.isfinite().all()


def test_a_mask_keeps_the_order_of_the_rows():
    gates = [torch.rand(4, 5, 3), torch.rand(4, 5, 4)]
    right = acm.regularizers(gates, [1.0, 2.0], 0.4, mask=MASK)
    flat = acm.regularizers(gates, [1.0, 2.0], 0.4, mask=MASK.flatten())
    torch.testing.assert_close(flat, right)
    maps = [torch.rand(2, 2, 3, 4)]  # of images: a mask of their patches in one dimension
    found = acm.regularizers(maps, [1.0], 0.4, mask=torch.ones(2, 6, dtype=torch.bool))
    torch.testing.assert_close(found, acm.regularizers(maps, [1.0], 0.4))
    for wrong, size in ((MASK.T, r"\[5, 4\]"), (MASK.view(2, 10), r"\[2, 10\]")):
        message = rf"mask must have one entry a row of gates\[0\], \[4, 5\], in their .* {size}"
        with pytest.raises(ValueError, match=message):
            acm.regularizers(gates, [1.0, 2.0], 0.4, mask=wrong)
    made, x = model(), torch.randn(4, 5, 8, dtype=torch.float64)
    calls = seen(made, x)
    for loss in (acm.phase1_loss, acm.phase2_loss):
        with pytest.raises(ValueError, match=rf"acm.{loss.__name__}: mask must have one entry"):
            loss(calls, mask=MASK.T)


def test_one_graph_for_all_numbers():
    calls = seen(model().train(), torch.randn(4, 5, 8, dtype=torch.float64), originals=False)

    def loss(x):
        weights = {"budget_weight": x, "entropy_weight": 2 * x, "diversity_weight": 3 * x}
        return acm.phase3_loss(torch.zeros(()), calls, target=x, **weights)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    for number in (0.15, 0.25, 0.35, 0.45):
        torch.testing.assert_close(compiled(number), loss(number))
    assert counter.frame_count <= 2


BAD = {"target": ("0.5", None, math.nan), "mask": ([1],), "task_loss": (None, 0.0, torch.ones(2))}
BAD |= dict.fromkeys(
    ("budget_weight", "entropy_weight", "diversity_weight"), (None, "0.1", math.inf)
)
BAD |= {"calls": (None, {}, ["call"], iter([]), [])}


@pytest.mark.parametrize(
    ("name", "wrong"), [(name, x) for name, wrong in BAD.items() for x in wrong]
)
def test_arguments_of_phase_three(name, wrong):
    made, x = model(), torch.randn(4, 5, 8, dtype=torch.float64)
    calls = seen(made.train(), x, originals=False)
    given = {"task_loss": torch.zeros(()), "calls": calls, "target": 0.5, name: wrong}
    with pytest.raises((TypeError, ValueError), match=rf"^acm.phase3_loss: {name} "):
        acm.phase3_loss(**given)


@pytest.mark.parametrize(
    ("loss", "name", "wrong"),
    [
        (acm.phase1_loss, "calls", None),
        (acm.phase1_loss, "calls", "call"),
        (acm.phase1_loss, "calls", ["call"]),
        (acm.phase1_loss, "detach", "no"),
        (acm.phase2_loss, "calls", None),
        (acm.phase2_loss, "rule", "papers"),
        (acm.phase2_loss, "rule", ["paper"]),
        (acm.phase2_loss, "threshold", None),
        (acm.phase2_loss, "threshold", -1.0),
    ],
)
def test_arguments_of_phases_one_and_two(loss, name, wrong):
    calls = seen(model(), torch.randn(4, 5, 8, dtype=torch.float64))
    with pytest.raises((TypeError, ValueError), match=rf"^acm.{loss.__name__}: {name} "):
        loss(**{"calls": calls, name: wrong})


def test_errors():
    made, x = model(), torch.randn(4, 5, 8, dtype=torch.float64)
    calls = seen(made, x)
    for loss in (acm.phase1_loss, acm.phase2_loss):
        name = loss.__name__
        with pytest.raises(ValueError, match=rf"acm.{name}: mask must have one entry a row of the"):
            loss(calls, mask=MASK[:, :4])
        with pytest.raises(TypeError, match=rf"acm.{name}: mask must be a tensor of bool or integ"):
            loss(calls, mask=MASK.float())
    gates = [torch.rand(4, 5, 4)]
    with pytest.raises(ValueError, match=r"acm.regularizers: mask must have .* gates\[0\], \[4, 5"):
        acm.regularizers(gates, [1.0], 0.4, mask=MASK[:2])
    with pytest.raises(TypeError, match=r"acm.regularizers: mask must be .* got list"):
        acm.regularizers(gates, [1.0], 0.4, mask=[1])
    assert fastkd.acm is acm


@pytest.mark.parametrize("loss", [fastkd.acm.phase1_loss, fastkd.acm.phase2_loss])
def test_learners_do_not_imitate_themselves(loss):
    nn = torch.nn
    model = fastkd.acm.convert(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    with fastkd.acm.calls(model) as calls:
        model(torch.ones(3, 8))
    with pytest.raises(ValueError, match=r"calls must be of acm.calls\(model, originals=True\)"):
        loss(calls)
