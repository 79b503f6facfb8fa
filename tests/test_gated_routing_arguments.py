"""acm, acm_soft, acm_prefix_loss, acm_oracle: what wrong arguments are told."""

import pytest
import torch

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
    ("acm_oracle", {"threshold": 0.0}, ValueError, "threshold must be positive"),
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
