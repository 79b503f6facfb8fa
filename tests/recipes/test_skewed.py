"""Skewed and mixed divergences against their definitions."""

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
    reduced,
    with_,
)

import fastkd
from fastkd import recipes

ALL_BUT_COLUMNS = ("none", "sum", "mean", "batchmean", "sequence_mean")


def kl(p, q):
    return sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)))


def softmaxes(student, teacher, temperature=1.0):
    return [(z / temperature).softmax(-1) for z in (student, teacher)]


def plain_distillm(student_logits, teacher_logits, kind="skew_kl", beta=0.1, temperature=1.0):
    q, p = softmaxes(student_logits, teacher_logits, temperature)
    first, second = (p, q) if kind == "skew_kl" else (q, p)
    return kl(first, beta * first + (1 - beta) * second)


def plain_taid(student_logits, teacher_logits, t, temperature=1.0):
    target = (1 - t) * student_logits.detach() + t * teacher_logits
    q, p = softmaxes(student_logits, target, temperature)
    return -sum(p[v] * q[v].log() for v in range(len(p)))


def plain_akl(student_logits, teacher_logits, mu=0.5, k=256, temperature=1.0):
    q, p = softmaxes(student_logits, teacher_logits, temperature)
    mass, head, tail = 0.0, 0.0, 0.0
    for place, v in enumerate(p.argsort(descending=True).tolist()):
        mass = mass + p[v].item()
        difference = (p[v] - q[v]).abs().item()
        if place == 0 or (mass <= mu and place < k):
            head += difference
        else:
            tail += difference
    share = head / (head + tail)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def plain_abkd(student_logits, teacher_logits, alpha=0.2, beta=0.7, temperature=1.0):
    q, p = softmaxes(student_logits, teacher_logits, temperature)
    both, total = alpha + beta, 0
    for v in range(len(p)):
        mixed = alpha / both * p[v] ** both + beta / both * q[v] ** both
        total = total + p[v] ** alpha * q[v] ** beta - mixed
    return -total / (alpha * beta)


def plain_bild(student_logits, teacher_logits, k=8, temperature=3.0):
    loss = 0
    for leader in (teacher_logits, student_logits):
        best = sorted(range(len(leader)), key=lambda v: -leader[v].item())[:k]
        pairs = [(best[i], best[j]) for i in range(k) for j in range(i + 1, k)]
        mine, other = (
            torch.stack([z[u] - z[v] for u, v in pairs]) for z in (student_logits, teacher_logits)
        )
        q, p = softmaxes(mine, other, temperature)
        loss = loss + kl(p, q)
    return loss


def pairs(dtype):
    found = []
    for _ in range(2):
        tensors = problem(dtype)
        tensors["student_logits"].requires_grad_()
        found.append(recipes.Pair(**tensors))
    return found


def with_t(t):
    return lambda dtype: {**problem(dtype), "t": t}


ENTRIES = [
    Entry("distillm", by_rows(plain_distillm), published={"kind": "skew_kl", "beta": 0.1}),
    Entry(
        "distillm",
        by_rows(plain_distillm),
        {"kind": "skew_reverse_kl", "beta": 0.3, "temperature": 2.0},
        with_("weight"),
    ),
    Entry("taid", by_rows(plain_taid), problem=with_t(0.4)),
    Entry("taid", by_rows(plain_taid), {"temperature": 2.0}, problem=with_t(torch.tensor(0.75))),
    Entry("akl", by_rows(plain_akl), published={"mu": 0.5}),
    Entry("akl", by_rows(plain_akl), {"mu": 0.95, "k": 2}),
    Entry("akl", by_rows(plain_akl), {"mu": 0.8, "temperature": 2.0}, with_("weight")),
    Entry("abkd", by_rows(plain_abkd), published={"alpha": 0.2, "beta": 0.7}),
    Entry("abkd", by_rows(plain_abkd), {"alpha": 0.5, "beta": 0.5, "temperature": 2.0}),
    Entry(
        "bild",
        by_rows(plain_bild),
        reductions=ALL_BUT_COLUMNS,
        published={"k": 8, "temperature": 3.0},
    ),
    Entry("bild", by_rows(plain_bild), {"k": 3}, reductions=ALL_BUT_COLUMNS),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN, PAIRS = problem(torch.float32), pairs(torch.float32)
LOG_PROBS = -torch.rand(3, 5)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.distillm(**GIVEN, beta=x, temperature=x)
            + recipes.distillm2(*PAIRS, alphas=(x, x), beta=x, temperature=x)
            + recipes.distillm2_alphas(LOG_PROBS, LOG_PROBS, GIVEN["mask"], x, base=x).sum()
            + recipes.taid(**GIVEN, t=x, temperature=x)
            + recipes.akl(**GIVEN, mu=x, temperature=x)
            + recipes.bild(**GIVEN, k=3, temperature=x)
        )
    }
)


def plain_distillm2(chosen, rejected, alphas, beta):
    total = 0
    for pair, alpha, factor in zip((chosen, rejected), alphas, (2 - beta, beta), strict=True):
        tensors = {name: x.double() for name, x in pair._asdict().items()}
        tensors["mask"] = pair.mask
        losses = torch.zeros(pair.mask.shape).double()
        for b, t in pair.mask.nonzero().tolist():
            q, p = softmaxes(tensors["student_logits"][b, t], tensors["teacher_logits"][b, t])
            share = alpha[b] if isinstance(alpha, torch.Tensor) else alpha
            if pair is chosen:
                loss = kl(p, share * p + (1 - share) * q)
            else:
                loss = kl(q, (share * q + (1 - share) * p).detach())
            losses = losses.index_put((torch.tensor(b), torch.tensor(t)), loss)
        total = total + factor * reduced(losses, kept_of(tensors), "sequence_mean")
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beta", [1.0, 1.5])
def test_distillm2(dtype, beta):
    chosen, rejected = pairs(dtype)
    error = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    for alphas in ((0.1, 0.1), (torch.tensor([0.1, 0.05, 0.01]), torch.tensor([0.02, 0.1, 0.08]))):
        alphas = tuple(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in alphas)
        found = recipes.distillm2(chosen, rejected, alphas=alphas, beta=beta)
        right = plain_distillm2(chosen, rejected, alphas, beta)
        torch.testing.assert_close(found.double(), right, rtol=error, atol=error)
        leaves = (chosen.student_logits, rejected.student_logits)
        gradients = (torch.autograd.grad(x, leaves) for x in (found, right))
        for one, other in zip(*gradients, strict=True):
            assert (one - other).norm() <= error * other.norm()


def test_distillm2_of_masked_rows():
    chosen, rejected = pairs(torch.float32)
    right = recipes.distillm2(chosen, rejected)
    for pair in (chosen, rejected):
        with torch.no_grad():
            pair.student_logits[~pair.mask] = math.nan
            pair.teacher_logits[~pair.mask] = math.nan
    found = recipes.distillm2(chosen, rejected)
    assert found == right
    for pair, gradient in zip(
        (chosen, rejected),
        torch.autograd.grad(found, (chosen.student_logits, rejected.student_logits)),
        strict=True,
    ):
        assert gradient[pair.mask].any()
        assert not gradient[~pair.mask].any()
    nothing = [pair._replace(mask=torch.zeros_like(pair.mask)) for pair in (chosen, rejected)]
    assert recipes.distillm2(*nothing) == 0


def test_distillm2_without_a_mixture():
    chosen, rejected = pairs(torch.float64)
    for reduction in ("mean", "sum"):
        found = recipes.distillm2(chosen, rejected, alphas=(0.0, 0.0), reduction=reduction)
        right = fastkd.softmax_divergence(
            *chosen[:2], mask=chosen.mask, reduction=reduction
        ) + fastkd.softmax_divergence(
            *rejected[:2], mask=rejected.mask, divergence="reverse_kl", reduction=reduction
        )
        torch.testing.assert_close(found, right)


def test_distillm2_alphas():
    mask = problem(torch.float64)["mask"]
    log_q, log_p = (-torch.rand(mask.shape, dtype=torch.float64) - i for i in (1, 0))
    right = []
    for b in range(3):
        rows = mask[b].nonzero()[:, 0].tolist()
        q, p = (math.exp(sum(x[b, t].item() for t in rows) / len(rows)) for x in (log_q, log_p))
        right.append(min(max(1 - 0.9 * 0.3 / (p - q + 1e-5), 0.01), 0.1))
    log_p = torch.where(mask, log_p, math.nan)
    found = recipes.distillm2_alphas(log_q, log_p, mask, 0.3)
    torch.testing.assert_close(found, torch.tensor(right).double(), rtol=1e-6, atol=1e-8)
    assert recipes.distillm2_alphas(log_q[:1], log_p[:1], mask[:1], 1e-3) == 0.1


def test_taid_between_student_and_teacher():
    tensors = problem(torch.float64)
    z = tensors["student_logits"].requires_grad_()
    right = fastkd.softmax_divergence(**tensors, divergence="cross_entropy")
    torch.testing.assert_close(recipes.taid(**tensors, t=1.0), right)
    (gradient,) = torch.autograd.grad(recipes.taid(**tensors, t=0.0), z)
    assert gradient.norm() < 1e-12


def test_the_schedule_of_taid():
    losses, steps = [3.0, 2.5, 2.6, 2.0, 1.0, 0.9], 5
    schedule, t, momentum = recipes.TaidSchedule(alpha=0.3, beta=0.5), 0.4, 0.0
    for i, loss in enumerate(losses):
        if i:
            momentum = 0.5 * momentum + 0.5 * (losses[i - 1] - loss) / losses[i - 1]
            t = min(
                1.0, max(0.4 + 0.6 * i / steps / 3, t + 0.3 * (1 - t) / (1 + math.exp(-momentum)))
            )
        assert math.isclose(schedule.step(torch.tensor(loss), i / steps / 3), t, rel_tol=1e-6)
    assert recipes.TaidSchedule() == recipes.TaidSchedule(0.4, 1.0, 5e-4, 0.99)
    late = recipes.TaidSchedule(last_loss=1.0, t=0.9)
    assert late.step(1.0, 1.0) == 1.0


def test_abkd_at_the_ends():
    student, teacher = GIVEN["student_logits"], GIVEN["teacher_logits"]
    q, p = student.double().softmax(-1), teacher.double().softmax(-1)
    for alpha, beta, right in (
        (1.0, 0.0, (p * (p / q).log()).sum(-1)),
        (0.0, 1.0, (q * (q / p).log()).sum(-1)),
        (1.0, 1.0, (p - q).square().sum(-1) / 2),
    ):
        found = recipes.abkd(student, teacher, alpha=alpha, beta=beta, reduction="none")
        torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-7)


def test_akl_between_forward_and_reverse_kl():
    tensors = problem(torch.float64)
    ends = [
        fastkd.softmax_divergence(**tensors, divergence=divergence, reduction="none")
        for divergence in ("forward_kl", "reverse_kl")
    ]
    found = recipes.akl(**tensors, reduction="none")
    assert (found >= torch.minimum(*ends) - 1e-12).all()
    assert (found <= torch.maximum(*ends) + 1e-12).all()
    q, p = softmaxes(tensors["student_logits"], tensors["teacher_logits"])
    differences = (p - q).abs()
    best = differences.gather(-1, p.argmax(-1, keepdim=True)).squeeze(-1)
    share = best / differences.sum(-1)  # a head of one token
    alone = recipes.akl(**tensors, mu=0.0, reduction="none")
    right = torch.where(tensors["mask"], share * ends[0] + (1 - share) * ends[1], 0)
    torch.testing.assert_close(alone, right)
    equal = recipes.akl(tensors["teacher_logits"], tensors["teacher_logits"])
    assert equal == 0


def test_bild_of_other_constants():
    tensors = problem(torch.float64)
    right = recipes.bild(**tensors)
    for name in ("student_logits", "teacher_logits"):
        tensors[name] = tensors[name] + torch.randn(3, 5, 1)
    torch.testing.assert_close(recipes.bild(**tensors), right)
    assert recipes.bild(tensors["teacher_logits"], tensors["teacher_logits"]) == 0


def test_errors():
    tensors = problem(torch.float32)
    with pytest.raises(ValueError, match="distillm: kind must be one of skew_kl, skew_reverse_kl"):
        recipes.distillm(**tensors, kind="kl")
    with pytest.raises(ValueError, match=r"taid: t must lie in \[0, 1\], got 1.5"):
        recipes.taid(**tensors, t=1.5)
    with pytest.raises(ValueError, match=r"bild: k must lie in \[2, 11\], got 12"):
        recipes.bild(**tensors, k=12)
    with pytest.raises(ValueError, match=r"akl: mu must lie in \[0, 1\], got -1"):
        recipes.akl(**tensors, mu=-1.0)
    teacher = tensors["teacher_logits"].clone().requires_grad_()
    for name in ("akl", "bild"):
        with pytest.raises(ValueError, match=f"{name}: teacher_logits takes no gradient"):
            getattr(recipes, name)(tensors["student_logits"], teacher)
    pair = recipes.Pair(**tensors)
    with pytest.raises(ValueError, match=r"distillm2: beta must lie in \[0, 2\], got 3"):
        recipes.distillm2(pair, pair, beta=3.0)
    with pytest.raises(ValueError, match=r"distillm2: rejected\.teacher_logits must have"):
        recipes.distillm2(pair, pair._replace(teacher_logits=teacher[:1]))
    with pytest.raises(ValueError, match="distillm2: alphas must be numbers or one a text"):
        recipes.distillm2(pair, pair, alphas=(torch.ones(2), 0.1))
    with pytest.raises(ValueError, match="distillm2_alphas: teacher_log_probs must be"):
        recipes.distillm2_alphas(torch.zeros(3, 5), torch.zeros(5), tensors["mask"], 1.0)
