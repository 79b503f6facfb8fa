"""acm.gate and acm.regularizers: exact gates, their distribution and gradient, terms by formula."""

import math

import numpy as np
import pytest
import torch

import fastkd


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (0, 5), (7, 5), (2, 3, 1), (2, 0, 3)])
def test_hard_gates_are_exactly_one_hot(dtype, shape):
    gates = fastkd.acm.gate((10 * torch.randn(shape)).to(dtype))
    assert gates.dtype == dtype
    assert gates.shape == shape
    assert torch.equal(gates.sum(-1), torch.ones(shape[:-1], dtype=dtype))
    assert ((gates == 0) | (gates == 1)).all()


def test_a_seed_gives_the_same_gates():
    logits = torch.randn(40, 6, 5)
    for hard in (True, False):
        first = fastkd.acm.gate(logits, hard=hard, generator=seeded())
        assert torch.equal(first, fastkd.acm.gate(logits, hard=hard, generator=seeded()))
        assert not torch.equal(first, fastkd.acm.gate(logits, hard=hard, generator=seeded(1)))
        strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(first, fastkd.acm.gate(strided, hard=hard, generator=seeded()))
    torch.manual_seed(3)
    first = fastkd.acm.gate(logits)
    torch.manual_seed(3)
    assert torch.equal(first, fastkd.acm.gate(logits))


@pytest.mark.parametrize("temperature", [0.3, 0.8, 5.0])
@pytest.mark.parametrize("min_choice", [0, 2])
def test_distribution(temperature, min_choice):
    """A draw from the softmax at temperature 1, whatever the gate's temperature."""
    logits, draws = torch.tensor([0.5, -1.0, 0.0, 2.0, 1.0]), 100_000
    gates = fastkd.acm.gate(
        logits.expand(draws, 5),
        temperature=temperature,
        min_choice=min_choice,
        generator=seeded(),
    )
    expected = torch.zeros(5)
    expected[min_choice:] = logits[min_choice:].softmax(-1)
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((gates.mean(0) - expected).abs() <= 4.5 * deviation).all()


@pytest.mark.parametrize("min_choice", [0, 1, 3])
def test_soft_gates_and_gradients_by_formula(min_choice):
    logits = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)
    noise = torch.empty(30, 4 - min_choice, dtype=torch.float64).exponential_(generator=seeded())
    expected = torch.zeros(30, 4, dtype=torch.float64)
    scores = (logits[:, min_choice:] - noise.log()) / 0.8
    expected[:, min_choice:] = scores.softmax(-1)
    direction = torch.randn(30, 4, dtype=torch.float64)
    (right,) = torch.autograd.grad(expected, logits, direction)
    for hard in (False, True):
        gates = fastkd.acm.gate(logits, hard=hard, min_choice=min_choice, generator=seeded())
        (gradient,) = torch.autograd.grad(gates, logits, direction)
        torch.testing.assert_close(gradient, right)
        assert not gradient[:, :min_choice].any()
        assert not gates[:, :min_choice].any()
        if hard:
            assert torch.equal(gates.argmax(-1), expected.argmax(-1))
        else:
            torch.testing.assert_close(gates, expected)
    if min_choice < 3:
        options = {"min_choice": min_choice, "hard": False}
        assert torch.autograd.gradcheck(
            lambda x: fastkd.acm.gate(x, generator=seeded(), **options), logits[:3]
        )
        assert torch.autograd.gradgradcheck(
            lambda x: fastkd.acm.gate(x, generator=seeded(), **options), logits[:3]
        )


@pytest.mark.parametrize("hard", [True, False])
def test_hostile_logits(hard):
    logits = torch.zeros(6, 4)
    logits[1, 2] = math.nan
    logits[2] = -math.inf
    logits[3, 1:] = -math.inf
    logits[4] = torch.tensor([1e30, -1e30, 0.0, 3e38])
    logits[5, 0] = math.nan  # not looked at
    leaf = logits.clone().requires_grad_()
    gates = fastkd.acm.gate(leaf, hard=hard, temperature=0.01)
    bad = gates.isnan()
    assert bad[[1, 2, 5]].all()
    assert not bad[[0, 3, 4]].any()
    assert gates[3].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert gates[4].tolist() == [0.0, 0.0, 0.0, 1.0]
    gates.pow(2)[[0, 3, 4]].sum().backward()
    assert leaf.grad[[0, 3, 4]].isfinite().all()
    gates = fastkd.acm.gate(logits[[0, 3, 5]], hard=hard, min_choice=1)
    assert not gates[:, 0].any()
    assert gates.isnan().any(-1).tolist() == [False, True, False]


def test_compile_and_autocast():
    logits = torch.randn(20, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        first = fastkd.acm.gate(logits, hard=False, generator=seeded())
    assert torch.equal(first, fastkd.acm.gate(logits, hard=False, generator=seeded()))
    run = torch.compile(
        lambda x: fastkd.acm.gate(x, min_choice=1), fullgraph=True, backend="aot_eager"
    )
    gates = run(logits)
    assert torch.equal(gates.sum(-1), torch.ones(20))
    gates[:, 2].sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


def layers_of_gates(batch=3, layers=((6, 4), (6, 4), (10, 2)), hard=False):
    draw = [torch.randn(batch, tokens, n + 1, dtype=torch.float64) for tokens, n in layers]
    return [
        torch.nn.functional.one_hot(x.argmax(-1), x.size(-1)).double() if hard else x.softmax(-1)
        for x in draw
    ]


@pytest.mark.parametrize("hard", [False, True])
def test_regularizers_by_formula(hard):
    gates, costs, target = layers_of_gates(hard=hard), [3.0, 1.0, 2.0], 0.4
    found = fastkd.acm.regularizers(gates, costs, target)
    spent = whole = entropy = 0.0
    shares = [[] for _ in range(3)]
    for gate, cost in zip(gates, costs, strict=True):
        choices = gate.size(-1)
        learners = [[sum(k * g for k, g in enumerate(t)) for t in s] for s in gate.tolist()]
        spent += cost * sum(map(sum, learners)) / (3 * gate.size(1))
        whole += cost * (choices - 1)
        for i, sequence in enumerate(gate.tolist()):
            counts = [sum(token[k] for token in sequence) for k in range(choices)]
            parts = [count / sum(counts) for count in counts]
            entropy -= -sum(p * math.log(p) for p in parts if p) / math.log(choices) / (3 * 3)
            shares[i].append(sum(learners[i]) / gate.size(1) / choices)
    used = [sum(own) / 3 for own in shares]
    diversity = -2 * sum(abs(a - b) for a in used for b in used) / 9
    assert found.budget.item() == pytest.approx(abs(spent / whole - target), rel=1e-12)
    assert found.entropy.item() == pytest.approx(entropy, rel=1e-12)
    assert found.diversity.item() == pytest.approx(diversity, rel=1e-12)
    assert torch.equal(
        torch.stack(found),
        torch.stack(fastkd.acm.regularizers(gates, torch.tensor(costs), target)),
    )


def test_regularizers_of_one_tensor_and_compiled():
    gates, costs = torch.stack(layers_of_gates(layers=((6, 4),) * 3)), torch.tensor([3.0, 1.0, 2.0])
    right = torch.stack(fastkd.acm.regularizers(list(gates), costs.tolist(), 0.4))
    for same in (costs, costs.numpy(), tuple(costs.tolist())):
        assert torch.equal(torch.stack(fastkd.acm.regularizers(gates, same, 0.4)), right)
    compiled = torch.compile(fastkd.acm.regularizers, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.stack(compiled(gates, costs, 0.4)), right)


def test_regularizers_of_the_same_and_of_everything():
    same = torch.eye(5)[torch.full((4, 7), 2)].requires_grad_()
    found = fastkd.acm.regularizers([same], [1.0], 0.5)
    assert [x.item() for x in found] == [0.0, 0.0, 0.0]
    assert all(x.dtype == torch.float32 for x in found)
    sum(found).backward()
    assert same.grad.isfinite().all()
    every = torch.eye(5).repeat(4, 3, 1)
    assert fastkd.acm.regularizers([every], [1.0], 0.5).entropy.item() == pytest.approx(-1)


def test_regularizers_gradcheck():
    gates = [g.requires_grad_() for g in layers_of_gates(2, ((2, 2), (2, 2), (3, 1)))]
    run = lambda *g: fastkd.acm.regularizers(g, [1.0, 2.0, 3.0], 0.1)  # noqa: E731
    assert torch.autograd.gradcheck(run, gates)
    assert torch.autograd.gradgradcheck(run, gates)


def test_regularizers_of_other_shapes():
    plain = torch.rand(6, 5)
    for shaped in (plain.view(6, 1, 5), plain.view(6, 1, 1, 5)):
        assert torch.equal(
            torch.stack(fastkd.acm.regularizers([plain], [1.0], 0.3)),
            torch.stack(fastkd.acm.regularizers([shaped], [1.0], 0.3)),
        )
    images = torch.rand(2, 3, 4, 5)
    assert torch.equal(
        torch.stack(fastkd.acm.regularizers([images], [1.0], 0.3)),
        torch.stack(fastkd.acm.regularizers([images.flatten(1, 2)], [1.0], 0.3)),
    )
    for empty in ((0, 3, 5), (2, 0, 5)):
        found = fastkd.acm.regularizers([torch.rand(empty)], [1.0], 0.25)
        assert [x.item() for x in found] == [0.25, 0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits must be a tensor, got list"),
        ({"logits": torch.ones(2).long()}, TypeError, "logits must have a floating-point dtype"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits must have shape \[..., N \+ 1\]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive"),
        ({"min_choice": 5}, ValueError, r"min_choice must lie in \[0, 5\).*got 5"),
        ({"min_choice": -1}, ValueError, "min_choice must lie in"),
        ({"min_choice": 1.5}, TypeError, "min_choice must be an integer, got float"),
        ({"temperature": None}, TypeError, "temperature must be a number, got NoneType"),
        ({"temperature": torch.ones(3)}, TypeError, "temperature must be a number, got Tensor"),
        ({"logits": torch.ones(2, 0)}, ValueError, "min_choice must lie in"),
        ({"min_choice": True}, TypeError, "min_choice must be an integer, got bool"),
        ({"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        (
            {"temperature": torch.ones((), device="meta")},
            ValueError,
            "temperature must be on cpu as logits is, or on the CPU, got meta",
        ),
        ({"generator": 1}, TypeError, "generator must be a torch.Generator, got int"),
        ({"logits": np.ones((2, 5))}, TypeError, "logits must be a tensor, got ndarray"),
    ],
)
def test_gate_errors(change, error, message):
    with pytest.raises(error, match=f"acm.gate: .*{message}"):
        fastkd.acm.gate(**{"logits": torch.ones(2, 5), **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gates": []}, TypeError, "gates must be a sequence of tensors, .*got none"),
        ({"gates": torch.ones(2, 3, 5)}, TypeError, "got Tensor"),
        ({"gates": [None]}, TypeError, r"gates\[0\] must be a tensor, got NoneType"),
        ({"gates": [torch.ones(5)]}, ValueError, r"gates\[0\] must have shape"),
        ({"gates": [torch.ones(2, 3, 1)]}, ValueError, "N at least 1"),
        ({"costs": [1.0, 2.0]}, ValueError, "costs must be 1 positive numbers"),
        ({"costs": torch.ones(1, 1)}, ValueError, r"costs must be 1 .*got \[\[1.0\]\]"),
        ({"costs": torch.tensor([-1.0])}, ValueError, r"costs must be 1 .*got \[-1.0\]"),
        ({"costs": torch.tensor(1.0)}, TypeError, "costs must be a sequence, got float"),
        ({"costs": ["a"]}, ValueError, r"costs must be 1 positive numbers, .*got \['a'\]"),
        ({"costs": 1.0}, TypeError, "costs must be a sequence, got float"),
        ({"target": None}, TypeError, "target must be a number, got NoneType"),
        ({"target": math.nan}, ValueError, "target must be finite, got nan"),
        (
            {"gates": [torch.ones(2, 5), torch.ones(2, 5, device="meta")], "costs": [1.0, 1.0]},
            ValueError,
            r"gates\[1\] must be on cpu as gates\[0\] is, got meta",
        ),
        ({"costs": [0.0]}, ValueError, r"costs must be 1 positive numbers, .*got \[0.0\]"),
        ({"costs": torch.ones(1, device="meta")}, ValueError, "costs must be on cpu .*got meta"),
        ({"target": torch.ones((), device="meta")}, ValueError, "target must be on cpu .*got meta"),
        ({"gates": [[[1.0]]]}, TypeError, r"gates\[0\] must be a tensor, got list"),
    ],
)
def test_regularizer_errors(change, error, message):
    arguments = {"gates": [torch.ones(2, 3, 5)], "costs": [1.0], "target": 0.5}
    with pytest.raises(error, match=f"acm.regularizers: .*{message}"):
        fastkd.acm.regularizers(**{**arguments, **change})


def test_integers_of_numpy_and_of_torch():
    logits = torch.zeros(3, 5)
    for number in (np.int64(4), np.int32(4), torch.tensor(4)):
        assert fastkd.acm.gate(logits, min_choice=number)[:, 4].eq(1).all()
        gate = fastkd.nn.ACMGate(number, number, depth=number, hidden=number, min_choice=number)
        assert gate(torch.ones(2, 4))[:, 4].eq(1).all()
        assert fastkd.nn.ACM(number, width=number, num_learners=number).w1.shape == (4, 4, 4)
        linear = torch.nn.Linear(4, 4)
        assert fastkd.nn.ACM.from_linear(linear, number).num_learners == 4


def test_layers_of_unequal_batches():
    with pytest.raises(ValueError, match=r"gates\[1\] must have shape \[2, ..., N \+ 1\]"):
        fastkd.acm.regularizers([torch.ones(2, 3, 5), torch.ones(3, 3, 5)], [1.0, 1.0], 0.5)
