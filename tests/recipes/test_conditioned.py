"""mend and swing against their definitions."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import Entry, by_rows, mixed_dtypes, one_graph, problem, promises, with_leaves

import fastkd
from fastkd import recipes
from fastkd.recipes import _rowwise


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of rows, the last one short."""
    monkeypatch.setattr(_rowwise, "_ENTRIES", 40)


def kl(p, q):
    return sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)))


def places(dtype):
    """Four, two and one rows of each text at other places of the two models' inputs."""
    tensors = {
        "student_logits": logits((3, 5, 11), dtype, 1.5),
        "teacher_logits": logits((3, 8, 11), dtype, 1.5),
        "student_mask": torch.zeros(3, 5, dtype=torch.bool),
        "teacher_mask": torch.zeros(3, 8, dtype=torch.bool),
    }
    for b, (mine, other) in enumerate(
        (((0, 1, 3, 4), (2, 3, 5, 7)), ((1, 2), (0, 6)), ((4,), (4,)))
    ):
        tensors["student_mask"][b, list(mine)] = True
        tensors["teacher_mask"][b, list(other)] = True
    return tensors


def plain_mend(tensors, temperature=1.0):
    losses = torch.zeros(3, 5).double()
    for b in range(3):
        mine, other = (
            tensors[f"{x}_mask"][b].nonzero()[:, 0].tolist() for x in ("student", "teacher")
        )
        for t, u in zip(mine, other, strict=True):
            q = (tensors["student_logits"][b, t] / temperature).softmax(-1)
            p = (tensors["teacher_logits"][b, u] / temperature).softmax(-1)
            losses = losses.index_put((torch.tensor(b), torch.tensor(t)), kl(p, q))
    return losses


def private(dtype):
    tensors = problem(dtype)
    tensors["privacy"] = torch.rand(tensors["mask"].shape).to(dtype)
    return tensors


def plain_swing(student_logits, teacher_logits, privacy, square_temperature=True):
    tau = 1 + privacy
    q, p = ((z / tau).softmax(-1) for z in (student_logits, teacher_logits))
    return kl(p, q) * (tau**2 if square_temperature else 1)


MEND = {
    "problem": places,
    "reductions": ("none", "sum", "mean", "batchmean", "sequence_mean"),
    "counted": lambda tensors: tensors["student_mask"],
    "read": None,
    "compiled": False,
}
ENTRIES = [
    Entry("mend", plain_mend, published={"temperature": 1.0}, **MEND),
    Entry("mend", plain_mend, {"temperature": 2.0}, **MEND),
    Entry("swing", by_rows(plain_swing), problem=private, published={"square_temperature": True}),
    Entry("swing", by_rows(plain_swing), {"square_temperature": False}, problem=private),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)


def test_mend_does_not_read_other_rows():
    tensors = with_leaves(ENTRIES[0], places(torch.float32))
    right = recipes.mend(**tensors)
    with torch.no_grad():
        for side in ("student", "teacher"):
            tensors[f"{side}_logits"][~tensors[f"{side}_mask"]] = math.nan
    found = recipes.mend(**tensors)
    assert found == right
    (gradient,) = torch.autograd.grad(found, tensors["student_logits"])
    assert gradient[tensors["student_mask"]].all()
    assert not gradient[~tensors["student_mask"]].any()
    for side in ("student", "teacher"):
        tensors[f"{side}_mask"][:] = False
    loss = recipes.mend(**tensors)
    assert loss == 0
    assert not torch.autograd.grad(loss, tensors["student_logits"])[0].any()


def test_mend_of_equal_places_is_kd():
    tensors = problem(torch.float64)
    mask = tensors.pop("mask")
    for reduction in ("mean", "none"):
        found = recipes.mend(**tensors, student_mask=mask, teacher_mask=mask, reduction=reduction)
        right = fastkd.softmax_divergence(**tensors, mask=mask, reduction=reduction)
        torch.testing.assert_close(found, right)


def test_swing_without_privacy_is_kd():
    tensors = problem(torch.float64)
    nothing = torch.zeros(tensors["mask"].shape)
    right = fastkd.softmax_divergence(**tensors)
    assert recipes.swing(**tensors, privacy=nothing) == right
    assert recipes.swing(**tensors, privacy=nothing, noise="laplace") == right  # of scale 0
    cold = recipes.swing(**tensors, privacy=nothing, temperature=lambda s: s + 0.5)
    expected = fastkd.softmax_divergence(**tensors, temperature=0.5, square_temperature=True)
    torch.testing.assert_close(cold, expected)


MOMENTS = {"gumbel": (0.5772, math.pi**2 / 6), "gaussian": (0.0, 1.0), "laplace": (0.0, 2.0)}


@pytest.mark.parametrize("noise", MOMENTS)
def test_noise_of_swing(noise, monkeypatch):
    from fastkd.recipes import conditioned

    tensors = private(torch.float64)
    tensors["student_logits"].requires_grad_()
    losses = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        losses.append(recipes.swing(**tensors, noise=noise, generator=generator))
    assert losses[0] == losses[1] != losses[2]
    drawn = conditioned._noise(noise, torch.zeros(200, 1000), torch.Generator().manual_seed(0))
    mean, variance = MOMENTS[noise]
    assert abs(drawn.mean() - mean) < 0.02
    assert abs(drawn.var() / variance - 1) < 0.02
    # Two numbers a row: of the scale that was given, and added to the teacher's logits.
    monkeypatch.setattr(conditioned, "_noise", lambda kind, like, generator: like.square())
    scale = torch.rand(tensors["mask"].shape)
    found = recipes.swing(**tensors, noise=noise, noise_scale=scale)
    y = tensors["teacher_logits"]
    right = recipes.swing(**{**tensors, "teacher_logits": y + scale.unsqueeze(-1) * y.square()})
    torch.testing.assert_close(found, right)


def test_errors():
    tensors = places(torch.float32)
    tensors["teacher_mask"][1, 1] = True
    with pytest.raises(ValueError, match=r"mend: teacher_mask must .* \[4, 3, 1\]"):
        recipes.mend(**tensors)
    with pytest.raises(ValueError, match="mend: teacher_logits must have student_logits' vocab"):
        recipes.mend(**{**tensors, "teacher_logits": torch.zeros(3, 8, 12)})
    with pytest.raises(ValueError, match=r"mend: student_mask must be bool \[3, 5\]"):
        recipes.mend(**{**tensors, "student_mask": tensors["teacher_mask"]})
    tensors = private(torch.float32)
    with pytest.raises(ValueError, match=r"swing: privacy must be float \[3, 5\]"):
        recipes.swing(**{**tensors, "privacy": torch.ones(3)})
    with pytest.raises(ValueError, match="swing: noise_scale needs noise"):
        recipes.swing(**tensors, noise_scale=1.0)
    with pytest.raises(ValueError, match="swing: noise must be one of gumbel, gaussian, laplace"):
        recipes.swing(**tensors, noise="uniform")
