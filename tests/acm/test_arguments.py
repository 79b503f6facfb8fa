"""acm.hard, acm.soft, acm.prefix_loss, acm.oracle, acm.convert: errors of wrong arguments."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd


def learners():
    """w1, b1, w2 of four learners."""
    return torch.ones(4, 12, 7), torch.ones(4, 7), torch.ones(4, 7, 10)


ERRORS = [
    (
        "hard",
        {"choices": torch.tensor([0, 5])},
        IndexError,
        r"choices must lie in \[0, N = 4\], got 5",
    ),
    ("hard", {"choices": torch.tensor([-1, 2])}, IndexError, "got -1"),
    (
        "hard",
        {"choices": torch.ones(2)},
        TypeError,
        "choices must have an integer dtype, got float32",
    ),
    ("hard", {"choices": torch.ones(2).bool()}, TypeError, "integer dtype, got bool"),
    ("hard", {"choices": [1, 2]}, TypeError, "choices must be a tensor, got list"),
    (
        "hard",
        {"choices": torch.ones(3).long()},
        ValueError,
        r"choices must have shape \[2\], got \[3\]",
    ),
    ("hard", {"bias": torch.ones(4)}, ValueError, r"bias must have shape \[10\] or \[5, 10\]"),
    (
        "hard",
        {"activation": "tanh"},
        ValueError,
        "activation must be one of gelu, .*got 'tanh'",
    ),
    *(
        (
            "hard",
            {name: value.to("meta")},
            ValueError,
            f"{name} must be on cpu as x is, got meta",
        )
        for name, value in zip(("w1", "b1", "w2"), learners(), strict=True)
    ),
    (
        "hard",
        {"choices": torch.tensor([0, 4], device="meta")},
        ValueError,
        "choices must be on cpu",
    ),
    (
        "hard",
        {"bias": torch.ones(10, device="meta")},
        ValueError,
        "bias must be on cpu as x is",
    ),
    (
        "hard",
        {"x": torch.ones(2, 11)},
        ValueError,
        r"x must have shape \[..., D = 12\], got \[2, 11\]",
    ),
    ("hard", {"x": torch.ones(2, 12).long()}, TypeError, "x must be float32, .*got int64"),
    ("hard", {"w1": torch.ones(12, 7)}, ValueError, r"w1 must have shape \[N, D, b\]"),
    ("hard", {"w1": torch.ones(0, 12, 7)}, ValueError, "w1 must hold at least one learner"),
    ("hard", {"b1": torch.ones(4)}, ValueError, r"b1 must have shape \[4, 7\], got \[4\]"),
    ("hard", {"w2": torch.ones(3, 7, 10)}, ValueError, r"w2 must have shape \[4, 7, 10\]"),
    ("hard", {"w2": None}, TypeError, "w2 must be a tensor, got NoneType"),
    ("soft", {"gates": torch.ones(2, 4)}, ValueError, r"gates must have shape \[2, 5\]"),
    ("soft", {"gates": torch.ones(2, 5).long()}, TypeError, "gates must be float32"),
    (
        "prefix_loss",
        {"target": torch.ones(2, 9)},
        ValueError,
        r"target must have shape \[2, 10\]",
    ),
    ("prefix_loss", {"target": 0.0}, TypeError, "target must be a tensor, got float"),
    ("hard", {"activation": ["gelu"]}, TypeError, "activation must be a string, got list"),
    ("hard", {"x": [[1.0] * 12] * 2}, TypeError, "x must be a tensor, got list"),
    ("hard", {"b1": np.ones((4, 7))}, TypeError, "b1 must be a tensor, got ndarray"),
    ("hard", {"bias": [1.0] * 10}, TypeError, "bias must be a tensor, got list"),
    ("hard", {"x": torch.ones(2, 12).to_sparse()}, TypeError, "x must be a dense .*sparse_coo"),
    ("soft", {"gates": [[1.0] * 5] * 2}, TypeError, "gates must be a tensor, got list"),
    ("prefix_loss", {"target": [0.0]}, TypeError, "target must be a tensor, got list"),
    *(
        (function, {name: torch.ones(shape, device="meta")}, ValueError, f"{name} must be on cpu")
        for function, name, shape in (
            *(("soft", "gates", (2, 5)), ("prefix_loss", "target", (2, 10))),
            *(("oracle", "target", (2, 10)), ("oracle", "w1", (4, 12, 7))),
            *(("soft", "w2", (4, 7, 10)), ("prefix_loss", "b1", (4, 7))),
        )
    ),
    ("oracle", {"threshold": 0.0}, ValueError, "threshold must be positive"),
    ("oracle", {"threshold": "a"}, TypeError, "threshold must be a number, got str"),
    ("oracle", {"rule": "best"}, ValueError, "rule must be one of paper, code; got 'best'"),
    ("oracle", {"target": torch.ones(3, 10)}, ValueError, "target must have shape"),
]


@pytest.mark.parametrize(("function", "change", "error", "message"), ERRORS)
def test_errors(function, change, error, message):
    w1, b1, w2 = learners()
    arguments = {"x": torch.ones(2, 12), "w1": w1, "b1": b1, "w2": w2}
    arguments |= {
        "hard": {"choices": torch.tensor([0, 4])},
        "soft": {"gates": torch.ones(2, 5)},
    }.get(function, {"target": torch.ones(2, 10)})
    with pytest.raises(error, match=f"{function}: .*{message}"):
        getattr(fastkd.acm, function)(**{**arguments, **change})
    with torch.no_grad(), pytest.raises(error, match=f"{function}: .*{message}"):
        getattr(fastkd.acm, function)(**{**arguments, **change})


@pytest.mark.parametrize("grad", [False, True])
def test_fakes_are_told_the_same(grad):
    """Without gradients acm is one op, whose checks are its own."""
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        w1, b1, w2 = learners()
        x, choices = torch.ones(2, 12), torch.ones(2).long()
        assert fastkd.acm.hard(x, w1, b1, w2, choices).shape == (2, 10)
        assert fastkd.acm.hard(x, w1.double(), b1, w2, choices).dtype == torch.float64
        for wrong in (choices[:1], choices.float(), [1, 2]):
            with pytest.raises((TypeError, ValueError), match=r"acm\.hard: choices must"):
                fastkd.acm.hard(x, w1, b1, w2, wrong)
        with pytest.raises(ValueError, match=r"acm\.hard: activation must be"):
            fastkd.acm.hard(x, w1, b1, w2, choices, activation="tanh")


@pytest.mark.parametrize(
    ("order", "counts", "message"),
    [
        ([0, 2], [2, 1, 1, 1, 2], r"order must lie in \[0, rows = 2\), got 2"),
        ([-1, 1], [2, 1, 1, 1, 2], "order must lie in .*got -1"),
        ([0, 1], [3, 1, 1, 1, 2], "counts must fall from at most rows = 2, got 3 after 2"),
        ([0, 1], [1, 2, 0, 0, 2], "counts must fall from at most rows = 2, got 2 after 1"),
        ([0, 1], [1, -1, 0, 0, 2], "counts must fall .*got -1"),
    ],
)
def test_routes_of_somebody_else_are_checked(order, counts, message):
    operands = (torch.ones(2, 12), *learners())
    routes = (torch.tensor(order, dtype=torch.int32), torch.tensor(counts, dtype=torch.int32))
    with pytest.raises(RuntimeError, match=f"acm.hard: {message}"):
        torch.ops.fastkd._acm_rows(*operands, None, *routes, 0, False)
    kept = torch.zeros(4, 2, 7)
    with pytest.raises(RuntimeError, match=f"acm.hard: {message}"):
        torch.ops.fastkd._acm_rows_backward(
            torch.ones(2, 10), *operands, *routes, kept, 0, *[True] * 4
        )


MODEL = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.Linear(16, 8))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("a", {}, TypeError, "model must be an nn.Module, got str"),
        (MODEL, {"num_learners": 0}, ValueError, "num_learners must be at"),
        (MODEL, {"num_learners": 1.5}, TypeError, "num_learners must be an int"),
        (MODEL, {"kinds": "mlp"}, TypeError, "kinds must be a sequence"),
        (MODEL, {"kinds": None}, TypeError, "kinds must be a sequence"),
        (MODEL, {"select": 3}, TypeError, "select must be a function or names, got int"),
    ],
)
def test_wrong_arguments_of_convert(model, options, error, message):
    with pytest.raises(error, match=rf"acm\.convert: {message}"):
        fastkd.acm.convert(model, **options)
