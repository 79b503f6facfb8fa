"""gkd, opd_topk and minitron against their definitions."""

import pytest
import torch
from cases import logits
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
)

import fastkd
from fastkd import recipes


def kl(p, q):
    return sum(p[v] * (p[v] / q[v]).log() for v in range(len(p)))


def softmaxes(student, teacher, temperature=1.0):
    return ((z / temperature).softmax(-1) for z in (student, teacher))


def plain_gkd(student_logits, teacher_logits, beta=0.5, temperature=1.0):
    q, p = softmaxes(student_logits, teacher_logits, temperature)
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def plain_opd_topk(
    student_logits,
    teacher_logits,
    k=100,
    support="student",
    divergence="reverse_kl",
    tail="lump",
    temperature=1.0,
):
    q, p = softmaxes(student_logits, teacher_logits, temperature)
    chosen = set()
    if support != "teacher":
        chosen |= set(q.topk(k).indices.tolist())
    if support != "student":
        chosen |= set(p.topk(k).indices.tolist())
    q, p = (torch.stack([x[v] for v in sorted(chosen)]) for x in (q, p))
    if tail == "lump":
        q, p = (torch.cat([x, 1 - x.sum().unsqueeze(0)]) for x in (q, p))
    return kl(q, p) if divergence == "reverse_kl" else kl(p, q)


def layers(dtype):
    tensors = problem(dtype)
    leading = tensors["mask"].shape
    tensors["pairs"] = [tuple(logits((*leading, d), dtype) for _ in range(2)) for d in (4, 6)]
    return tensors


def plain_minitron(tensors, hidden="cosine", balance=True, temperature=1.0):
    def row_kl(student_logits, teacher_logits, pairs):
        q, p = softmaxes(student_logits, teacher_logits, temperature)
        return kl(p, q)

    kept = kept_of(tensors)
    loss = reduced(by_rows(row_kl)(tensors), kept, "mean")
    total = 0
    for student, teacher in tensors["pairs"]:
        for s, t in zip(student[kept], teacher[kept], strict=True):
            if hidden == "cosine":
                total = total + 1 - (s @ t) / (s.norm() * t.norm())
            else:
                total = total + sum((s - t) ** 2) / len(s)
    total = total / int(kept.sum()) / len(tensors["pairs"])
    scale = (loss / total).detach() if balance else 1
    return loss + scale * total


OPD_TOPK = {"k": 100, "support": "student", "divergence": "reverse_kl", "tail": "lump"}
ENTRIES = [
    Entry("gkd", by_rows(plain_gkd), published={"beta": 0.5, "temperature": 1.0}),
    Entry("gkd", by_rows(plain_gkd), {"beta": 0.1, "temperature": 0.9}),
    Entry("opd_topk", by_rows(plain_opd_topk), {"k": 3}, published=OPD_TOPK),
    Entry(
        "opd_topk",
        by_rows(plain_opd_topk),
        {"k": 4, "support": "teacher", "divergence": "forward_kl", "temperature": 1.5},
    ),
    Entry("opd_topk", by_rows(plain_opd_topk), {"k": 3, "support": "both", "tail": "drop"}),
    Entry(
        "minitron",
        plain_minitron,
        problem=layers,
        reductions=(),
        published={"temperature": 1.0, "hidden": "cosine", "balance": True},
    ),
    Entry(
        "minitron",
        plain_minitron,
        {"hidden": "mse", "balance": False},
        problem=layers,
        reductions=(),
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN, LAYERS = problem(torch.float32), layers(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.gkd(**GIVEN, beta=x, temperature=x, normalizer=x)
            + recipes.opd_topk(**GIVEN, k=3, temperature=x, max_token_loss=x)
            + recipes.opd_topk(**GIVEN, k=3, divergence="jsd", beta=x)
            + recipes.minitron(**LAYERS, temperature=x)
        )
    }
)


def test_gkd_between_forward_and_reverse_kl():
    tensors = problem(torch.float64)
    for beta, divergence in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        found = recipes.gkd(**tensors, beta=beta)
        assert found == fastkd.softmax_divergence(**tensors, divergence=divergence)


def test_a_lumped_tail_is_never_above_the_divergence():
    tensors = problem(torch.float64)
    whole = fastkd.softmax_divergence(**tensors, divergence="reverse_kl", reduction="none")
    for support in ("student", "teacher", "both"):
        options = {"support": support, "reduction": "none"}
        for k in (1, 4, 7):
            assert (recipes.opd_topk(**tensors, k=k, **options) <= whole + 1e-12).all()
        every = recipes.opd_topk(**tensors, k=11, **options)
        torch.testing.assert_close(every, whole, rtol=1e-6, atol=1e-7)


def test_minitron_trains_the_hidden_states():
    tensors = layers(torch.float64)
    pairs = [(s.requires_grad_(), t.requires_grad_()) for s, t in tensors["pairs"]]
    loss = recipes.minitron(**{**tensors, "pairs": pairs})
    kl = fastkd.softmax_divergence(
        *(tensors[f"{x}_logits"] for x in ("student", "teacher")), mask=tensors["mask"]
    )
    torch.testing.assert_close(loss, 2 * kl)
    loss.backward()
    assert all(s.grad[tensors["mask"]].any() and t.grad is None for s, t in pairs)
    for reduction in ("sum", "batchmean", "sequence_mean"):
        terms = recipes.minitron(**tensors, balance=False, reduction=reduction)
        both = recipes.minitron(**{**tensors, "pairs": ()}, reduction=reduction)
        assert terms > both


def test_errors_name_the_recipe_and_the_argument():
    tensors = problem(torch.float32)
    with pytest.raises(ValueError, match=r"gkd: teacher_logits must have the leading dimensions"):
        recipes.gkd(tensors["student_logits"], tensors["teacher_logits"][:, 1:])
    with pytest.raises(TypeError, match=r"gkd: teacher_logits must be a tensor"):
        recipes.gkd(tensors["student_logits"], 1.0)
    with pytest.raises(ValueError, match=r"gkd: mask must be bool \[3, 5\], got"):
        recipes.gkd(**{**tensors, "mask": tensors["mask"][0]})
    with pytest.raises(ValueError, match="gkd: weight must be float"):
        recipes.gkd(**tensors, weight=tensors["mask"])
    sides = [tensors[f"{side}_logits"][0] for side in ("student", "teacher")]
    with pytest.raises(ValueError, match="gkd: reduction sequence_mean needs logits of texts"):
        recipes.gkd(*sides, reduction="sequence_mean")
    with pytest.raises(ValueError, match="opd_topk: support must be one of student, teacher, both"):
        recipes.opd_topk(**tensors, support="all")
    with pytest.raises(ValueError, match="opd_topk: teacher_logits takes no gradient"):
        recipes.opd_topk(
            tensors["student_logits"], tensors["teacher_logits"].clone().requires_grad_()
        )
    pair = (logits((3, 5, 4)), logits((3, 5, 6)))
    with pytest.raises(ValueError, match="minitron: pairs must have one width, got 4 and 6"):
        recipes.minitron(**tensors, pairs=[pair])
    with pytest.raises(ValueError, match="minitron: reduction must be one of sum, mean"):
        recipes.minitron(**tensors, pairs=[pair], reduction="none")
