"""mend and swing against their definitions."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import (
    Entry,
    by_rows,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    problem,
    promises,
    with_leaves,
)

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


def plain_mft(student_logits, teacher_logits, labels, threshold=0.2, temperature=1.0):
    q, p = ((z / temperature).softmax(-1) for z in (student_logits, teacher_logits))
    best, label = max(p.tolist()), p[labels].item()
    if p.argmax() != labels:
        m = (best - label + threshold) / (1 + best - label)
    else:
        m = (min(1, label + threshold) - label) / (1 - label)
    corrected = [(1 - m) * p[v] + (m if v == labels else 0) for v in range(len(p))]
    return temperature**2 * sum(x * (x / q[v]).log() for v, x in enumerate(corrected) if x > 0)


def half_right(dtype):
    """Labels that half of the teacher's rows find likeliest, some nearly certain."""
    tensors = problem(dtype, "labels")
    best, labels = tensors["teacher_logits"].argmax(-1), tensors["labels"]
    tensors["labels"] = torch.where((torch.arange(5) % 2 == 0) & (labels != -100), best, labels)
    tensors["teacher_logits"][1] *= 5
    return tensors


MFT = {"problem": half_right, "reductions": ("none", "sum", "mean", "batchmean", "sequence_mean")}
MEND = {
    "problem": places,
    "reductions": ("none", "sum", "mean", "batchmean", "sequence_mean"),
    "counted": lambda tensors: tensors["student_mask"],
    "read": None,
}
ENTRIES = [
    Entry("mend", plain_mend, published={"temperature": 1.0}, **MEND),
    Entry("mend", plain_mend, {"temperature": 2.0}, **MEND),
    Entry("swing", by_rows(plain_swing), problem=private, published={"square_temperature": True}),
    Entry("swing", by_rows(plain_swing), {"square_temperature": False}, problem=private),
]
ENTRIES += [
    Entry("mft", by_rows(plain_mft), published={"threshold": 0.2, "temperature": 1.0}, **MFT),
    Entry("mft", by_rows(plain_mft), {"threshold": 0.5, "temperature": 2.0}, **MFT),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = half_right(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {"all": lambda x: recipes.mft(**GIVEN, threshold=x, temperature=x)}
)


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


def test_compiled_mend_refuses_texts_of_different_numbers_of_rows():
    tensors = places(torch.float32)
    run = torch.compile(recipes.mend, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(**tensors), recipes.mend(**tensors))
    tensors["teacher_mask"][1] = False
    with pytest.raises(RuntimeError, match="teacher_rows must lie in"):
        run(**tensors)


def test_masks_of_mend_as_integers():
    tensors = places(torch.float32)
    right = recipes.mend(**tensors)
    for side in ("student_mask", "teacher_mask"):
        tensors[side] = tensors[side].long()
    assert recipes.mend(**tensors) == right
    tensors["student_mask"] *= 2
    with pytest.raises(ValueError, match="mend: student_mask must be bool, or 0 and 1, got 2 as"):
        recipes.mend(**tensors)


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


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1.0])
def test_the_corrected_label_is_ahead(threshold):
    """Found from the gradient, q - p' at temperature 1."""
    tensors = half_right(torch.float64)
    z = tensors["student_logits"].requires_grad_()
    (gradient,) = torch.autograd.grad(
        recipes.mft(**tensors, threshold=threshold, reduction="sum"), z
    )
    labels = tensors["labels"]
    kept = tensors["mask"] & (labels != -100)
    corrected = (z.detach().softmax(-1) - gradient)[kept]
    p, labels = tensors["teacher_logits"].softmax(-1)[kept], labels[kept].unsqueeze(-1)
    label, before = corrected.gather(-1, labels), p.gather(-1, labels)
    others = corrected.scatter(-1, labels, 0).amax(-1, keepdim=True)
    right = p.argmax(-1, keepdim=True) == labels
    ahead = torch.where(
        right, label - (before + threshold).clamp(max=1), label - others - threshold
    )
    assert right.any()
    assert not right.all()
    torch.testing.assert_close(ahead, torch.zeros_like(ahead), rtol=0, atol=1e-9)


def test_errors():
    tensors = places(torch.float32)
    tensors["teacher_mask"][1, 1] = True
    with pytest.raises(ValueError, match=r"mend: teacher_mask must .* \[4, 3, 1\]"):
        recipes.mend(**tensors)
    with pytest.raises(ValueError, match="mend: teacher_logits must have the 11 columns of stud"):
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
