"""Methods that select tokens against their definitions."""

import math

import pytest
import torch
from recipe_checks import (
    Entry,
    by_rows,
    kept_of,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    problem,
    promises,
)

import fastkd
from fastkd import recipes


def kl(p, q):
    return sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)))


def softmaxes(student, teacher, temperature=1.0):
    return [(z / temperature).softmax(-1) for z in (student, teacher)]


def forward_kl(student_logits, teacher_logits, **others):
    q, p = softmaxes(student_logits, teacher_logits)
    return kl(p, q)


def reverse_kl(student_logits, teacher_logits, **others):
    q, p = softmaxes(student_logits, teacher_logits)
    return kl(q, p)


def best_rows(scores, kept, keep):
    """Rows at or above the interpolated quantile of those that count."""
    values = sorted(scores[kept].tolist())
    place = (1 - keep) * (len(values) - 1)
    low = math.floor(place)
    bound = values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])
    return kept & (scores >= bound - 1e-12)


def of_reference(tensors):
    if tensors["reference"].dim() == 2:
        return tensors["reference"]
    other = {**tensors, "student_logits": tensors["reference"]}
    return by_rows(forward_kl)(other)


def adaspec_rows(keep):
    def rows(tensors):
        behind = by_rows(forward_kl)(tensors) - of_reference(tensors)
        return best_rows(behind.detach(), kept_of(tensors), keep)

    return rows


def plain_adaspec(tensors, keep=0.4):
    return torch.where(adaspec_rows(keep)(tensors), by_rows(forward_kl)(tensors), 0)


def tip_rows(keep):
    def rows(tensors):
        kept = kept_of(tensors)
        uncertain = by_rows(lambda student_logits, **_: -kl_to_one(student_logits))(tensors)
        scores = []
        for values in (uncertain, by_rows(reverse_kl)(tensors)):
            low, high = min(values[kept].tolist()), max(values[kept].tolist())
            scores.append((values.detach() - low) / (high - low))
        h, d = scores
        return best_rows(h + d - h * d, kept, keep)

    return rows


def kl_to_one(logits):
    q = logits.softmax(-1)
    return sum(q[v] * q[v].log() for v in range(len(q)))


def plain_tip(tensors, keep=0.5):
    return torch.where(tip_rows(keep)(tensors), by_rows(reverse_kl)(tensors), 0)


def plain_select_tkd(
    student_logits, teacher_logits, k=5, rejected_weight=0.01, divergence="forward_kl"
):
    best = sorted(range(len(teacher_logits)), key=lambda v: -teacher_logits[v].item())[:k]
    row = forward_kl if divergence == "forward_kl" else reverse_kl
    loss = row(student_logits, teacher_logits)
    return loss if student_logits.argmax().item() in best else rejected_weight * loss


def plain_eopd(student_logits, teacher_logits, k, entropy=0.8, tail="lump", temperature=1.0):
    q, p = softmaxes(student_logits, teacher_logits, temperature)
    loss = kl(q, p)
    if -sum(p[v] * p[v].log() for v in range(len(p))) >= entropy:
        best = sorted(range(len(p)), key=lambda v: -p[v].item())[:k]
        q, p = (torch.stack([x[v] for v in best]) for x in (q, p))
        if tail == "lump":
            q, p = (torch.cat([x, 1 - x.sum().unsqueeze(0)]) for x in (q, p))
        else:
            q, p = (x / x.sum() for x in (q, p))
        loss = loss + kl(p, q)
    return loss


def with_reference(stored):
    def make(dtype):
        tensors = problem(dtype, "reference_logits")
        tensors["reference"] = tensors.pop("reference_logits")
        if stored:
            tensors["reference"] = torch.rand(tensors["mask"].shape, dtype=torch.float64).to(dtype)
        return tensors

    return make


ENTRIES = [
    Entry(
        "adaspec",
        plain_adaspec,
        problem=with_reference(False),
        counted=adaspec_rows(0.4),
        published={"keep": 0.4, "divergence": "forward_kl"},
    ),
    Entry(
        "adaspec",
        plain_adaspec,
        {"keep": 0.7},
        problem=with_reference(True),
        counted=adaspec_rows(0.7),
    ),
    Entry("tip", plain_tip, counted=tip_rows(0.5), published={"keep": 0.5}),
    Entry(
        "select_tkd",
        by_rows(plain_select_tkd),
        published={"k": 5, "rejected_weight": 0.01},
    ),
    Entry(
        "select_tkd",
        by_rows(plain_select_tkd),
        {"k": 2, "rejected_weight": 0.0, "divergence": "reverse_kl"},
    ),
    Entry("eopd", by_rows(plain_eopd), {"k": 3, "entropy": 1.7}),
    Entry(
        "eopd",
        by_rows(plain_eopd),
        {"k": 4, "entropy": 1.9, "tail": "renormalize", "temperature": 1.3},
        published={"entropy": 0.8},
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN, REFERENCE = problem(torch.float32), with_reference(False)(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.adaspec(**REFERENCE, keep=x, temperature=x)
            + recipes.tip(**GIVEN, keep=x, temperature=x)
            + recipes.select_tkd(**GIVEN, k=3, rejected_weight=x, temperature=x)
            + recipes.eopd(**GIVEN, k=3, entropy=x, temperature=x)
        )
    }
)


@pytest.mark.parametrize("keep", [0.0, 0.2, 0.5, 1.0])
def test_token_budget(keep):
    scores, mask = torch.randn(4, 9), torch.rand(4, 9) < 0.7
    bound = torch.quantile(scores[mask], 1 - keep)
    right = mask & (scores >= bound)
    scores = torch.where(mask, scores, math.nan)
    assert torch.equal(recipes.token_budget(scores, keep=keep, mask=mask), right)
    assert right.sum() >= keep * mask.sum() - 1
    assert not recipes.token_budget(scores, keep=keep, mask=torch.zeros_like(mask)).any()
    assert recipes.token_budget(torch.ones(5), keep=keep).all()  # ties stay together
    assert recipes.token_budget(torch.ones(0), keep=keep).shape == (0,)


def test_adaspec_of_all_rows_is_the_divergence():
    tensors = with_reference(False)(torch.float64)
    found = recipes.adaspec(**tensors, keep=1.0)
    reference = tensors.pop("reference")
    right = fastkd.softmax_divergence(**tensors)
    torch.testing.assert_close(found, right)
    stored = fastkd.token_stats(reference, tensors["teacher_logits"]).forward_kl
    both = [recipes.adaspec(**tensors, reference=x, keep=0.3) for x in (reference, stored)]
    torch.testing.assert_close(*both)


def test_adaspec_by_log_sum_exps():
    """KL(p || q) - KL(p || q_ref) = (lse - <p, z>) - (lse_ref - <p, z_ref>)."""
    tensors = with_reference(False)(torch.float64)
    z, p = tensors["student_logits"], tensors["teacher_logits"].softmax(-1)
    pair = [x.logsumexp(-1) - (p * x).sum(-1) for x in (z, tensors["reference"])]
    chosen = recipes.token_budget(pair[0] - pair[1], keep=0.4, mask=tensors["mask"])
    losses = recipes.adaspec(**tensors, reduction="none")
    assert torch.equal(losses != 0, chosen)
    tensors["reference"] = z  # no row is more behind than another
    assert torch.equal(recipes.adaspec(**tensors, reduction="none") != 0, tensors["mask"])


def test_limits_are_the_plain_divergence():
    tensors = problem(torch.float64)
    forward = fastkd.softmax_divergence(**tensors)
    torch.testing.assert_close(recipes.select_tkd(**tensors, k=11), forward)
    torch.testing.assert_close(recipes.select_tkd(**tensors, k=1, rejected_weight=1.0), forward)
    reverse = fastkd.softmax_divergence(**tensors, divergence="reverse_kl")
    torch.testing.assert_close(recipes.tip(**tensors, keep=1.0), reverse)
    torch.testing.assert_close(recipes.eopd(**tensors, k=5, entropy=9.0), reverse)
    torch.testing.assert_close(recipes.eopd(**tensors, k=11, entropy=0.0), reverse + forward)


def test_tip_of_equal_rows():
    one = problem(torch.float64)
    tensors = {name: x[:1, :1].expand(2, 3, *x.shape[2:]) for name, x in one.items()}
    assert torch.equal(recipes.tip(**tensors, reduction="none") != 0, tensors["mask"])


def test_errors():
    tensors = problem(torch.float32)
    with pytest.raises(ValueError, match=r"adaspec: reference must be float \[3, 5\]"):
        recipes.adaspec(**tensors, reference=torch.zeros(3, 4))
    with pytest.raises(ValueError, match="adaspec: reference must have the leading dimensions"):
        recipes.adaspec(**tensors, reference=torch.zeros(3, 4, 11))
    with pytest.raises(ValueError, match=r"adaspec: keep must lie in \[0, 1\], got 40"):
        recipes.adaspec(**tensors, reference=torch.zeros(3, 5), keep=40)
    with pytest.raises(ValueError, match="select_tkd: rejected_weight must not be negative"):
        recipes.select_tkd(**tensors, rejected_weight=-1.0)
    with pytest.raises(ValueError, match="token_budget: scores must be float"):
        recipes.token_budget(torch.arange(3), keep=0.5)
    with pytest.raises(ValueError, match=r"token_budget: mask must be bool \[3\]"):
        recipes.token_budget(torch.ones(3), keep=0.5, mask=torch.ones(3))
    teacher = tensors["teacher_logits"].clone().requires_grad_()
    with pytest.raises(ValueError, match="eopd: teacher_logits takes no gradient"):
        recipes.eopd(tensors["student_logits"], teacher, k=3)
