"""acm, acm_soft, acm_prefix_loss, acm_oracle: what wrong arguments are told."""

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
        "acm",
        {"choices": torch.tensor([0, 5])},
        IndexError,
        r"choices must lie in \[0, N = 4\], got 5",
    ),
    ("acm", {"choices": torch.tensor([-1, 2])}, IndexError, "got -1"),
    (
        "acm",
        {"choices": torch.ones(2)},
        TypeError,
        "choices must have an integer dtype, got float32",
    ),
    ("acm", {"choices": torch.ones(2).bool()}, TypeError, "integer dtype, got bool"),
    ("acm", {"choices": [1, 2]}, TypeError, "choices must be a tensor, got list"),
    (
        "acm",
        {"choices": torch.ones(3).long()},
        ValueError,
        r"choices must have shape \[2\], got \[3\]",
    ),
    ("acm", {"bias": torch.ones(4)}, ValueError, r"bias must have shape \[10\] or \[5, 10\]"),
    ("acm", {"activation": "tanh"}, ValueError, "activation must be one of gelu, .*got 'tanh'"),
    *(
        ("acm", {name: value.to("meta")}, ValueError, f"{name} must be on cpu as x is, got meta")
        for name, value in zip(("w1", "b1", "w2"), learners(), strict=True)
    ),
    ("acm", {"choices": torch.tensor([0, 4], device="meta")}, ValueError, "choices must be on cpu"),
    ("acm", {"bias": torch.ones(10, device="meta")}, ValueError, "bias must be on cpu as x is"),
    (
        "acm",
        {"x": torch.ones(2, 11)},
        ValueError,
        r"x must have shape \[..., D = 12\], got \[2, 11\]",
    ),
    ("acm", {"x": torch.ones(2, 12).long()}, TypeError, "x must be float32, .*got int64"),
    ("acm", {"w1": torch.ones(12, 7)}, ValueError, r"w1 must have shape \[N, D, b\]"),
    ("acm", {"w1": torch.ones(0, 12, 7)}, ValueError, "w1 must hold at least one learner"),
    ("acm", {"b1": torch.ones(4)}, ValueError, r"b1 must have shape \[4, 7\], got \[4\]"),
    ("acm", {"w2": torch.ones(3, 7, 10)}, ValueError, r"w2 must have shape \[4, 7, 10\]"),
    ("acm", {"w2": None}, TypeError, "w2 must be a tensor, got NoneType"),
    ("acm_soft", {"gates": torch.ones(2, 4)}, ValueError, r"gates must have shape \[2, 5\]"),
    ("acm_soft", {"gates": torch.ones(2, 5).long()}, TypeError, "gates must be float32"),
    (
        "acm_prefix_loss",
        {"target": torch.ones(2, 9)},
        ValueError,
        r"target must have shape \[2, 10\]",
    ),
    ("acm_prefix_loss", {"target": 0.0}, TypeError, "target must be a tensor, got float"),
    ("acm", {"activation": ["gelu"]}, TypeError, "activation must be a string, got list"),
    ("acm", {"x": [[1.0] * 12] * 2}, TypeError, "x must be a tensor, got list"),
    ("acm", {"b1": np.ones((4, 7))}, TypeError, "b1 must be a tensor, got ndarray"),
    ("acm", {"bias": [1.0] * 10}, TypeError, "bias must be a tensor, got list"),
    ("acm", {"x": torch.ones(2, 12).to_sparse()}, TypeError, "x must be a dense .*sparse_coo"),
    ("acm_soft", {"gates": [[1.0] * 5] * 2}, TypeError, "gates must be a tensor, got list"),
    ("acm_prefix_loss", {"target": [0.0]}, TypeError, "target must be a tensor, got list"),
    *(
        (function, {name: torch.ones(shape, device="meta")}, ValueError, f"{name} must be on cpu")
        for function, name, shape in (
            *(("acm_soft", "gates", (2, 5)), ("acm_prefix_loss", "target", (2, 10))),
            *(("acm_oracle", "target", (2, 10)), ("acm_oracle", "w1", (4, 12, 7))),
            *(("acm_soft", "w2", (4, 7, 10)), ("acm_prefix_loss", "b1", (4, 7))),
        )
    ),
    ("acm_oracle", {"threshold": 0.0}, ValueError, "threshold must be positive"),
    ("acm_oracle", {"threshold": "a"}, TypeError, "threshold must be a number, got str"),
    ("acm_oracle", {"rule": "best"}, ValueError, "rule must be one of paper, code; got 'best'"),
    ("acm_oracle", {"target": torch.ones(3, 10)}, ValueError, "target must have shape"),
]


@pytest.mark.parametrize(("function", "change", "error", "message"), ERRORS)
def test_errors(function, change, error, message):
    w1, b1, w2 = learners()
    arguments = {"x": torch.ones(2, 12), "w1": w1, "b1": b1, "w2": w2}
    arguments |= {
        "acm": {"choices": torch.tensor([0, 4])},
        "acm_soft": {"gates": torch.ones(2, 5)},
    }.get(function, {"target": torch.ones(2, 10)})
    with pytest.raises(error, match=f"{function}: .*{message}"):
        getattr(fastkd, function)(**{**arguments, **change})
    with torch.no_grad(), pytest.raises(error, match=f"{function}: .*{message}"):
        getattr(fastkd, function)(**{**arguments, **change})


@pytest.mark.parametrize("grad", [False, True])
def test_fakes_are_told_the_same(grad):
    """Without gradients acm is one op, whose checks are its own."""
    with FakeTensorMode(), torch.set_grad_enabled(grad):
        w1, b1, w2 = learners()
        x, choices = torch.ones(2, 12), torch.ones(2).long()
        assert fastkd.acm(x, w1, b1, w2, choices).shape == (2, 10)
        assert fastkd.acm(x, w1.double(), b1, w2, choices).dtype == torch.float64
        for wrong in (choices[:1], choices.float(), [1, 2]):
            with pytest.raises((TypeError, ValueError), match="acm: choices must"):
                fastkd.acm(x, w1, b1, w2, wrong)
        with pytest.raises(ValueError, match="acm: activation must be"):
            fastkd.acm(x, w1, b1, w2, choices, activation="tanh")


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
    with pytest.raises(RuntimeError, match=f"acm: {message}"):
        torch.ops.fastkd._acm_rows(*operands, None, *routes, 0, False)
    kept = torch.zeros(4, 2, 7)
    with pytest.raises(RuntimeError, match=f"acm: {message}"):
        torch.ops.fastkd._acm_rows_backward(
            torch.ones(2, 10), *operands, *routes, kept, 0, *[True] * 4
        )
