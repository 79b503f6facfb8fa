"""Methods on the student's own texts against their definitions."""

import pytest
import torch
from recipe_checks import Entry, by_rows, one_graph, problem, promises

import fastkd
from fastkd import recipes


def plain_gkd(student_logits, teacher_logits, beta=0.5, temperature=1.0):
    q, p = ((z / temperature).softmax(-1) for z in (student_logits, teacher_logits))
    m = beta * p + (1 - beta) * q
    return sum(
        beta * p[v] * (p[v] / m[v]).log() + (1 - beta) * q[v] * (q[v] / m[v]).log()
        for v in range(len(p))
    )


ENTRIES = [
    Entry("gkd", by_rows(plain_gkd), published={"beta": 0.5, "temperature": 1.0}),
    Entry("gkd", by_rows(plain_gkd), {"beta": 0.1, "temperature": 0.9}),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)


def test_gkd_between_forward_and_reverse_kl():
    tensors = problem(torch.float64)
    for beta, divergence in ((0.0, "forward_kl"), (1.0, "reverse_kl")):
        found = recipes.gkd(**tensors, beta=beta)
        assert found == fastkd.softmax_divergence(**tensors, divergence=divergence)


def test_errors_name_the_recipe_and_the_argument():
    tensors = problem(torch.float32)
    with pytest.raises(ValueError, match=r"gkd: teacher_logits must have the leading"):
        recipes.gkd(tensors["student_logits"], tensors["teacher_logits"][:, 1:])
    with pytest.raises(ValueError, match=r"gkd: mask must be bool \[3, 5\], got"):
        recipes.gkd(**{**tensors, "mask": tensors["mask"][0]})
    with pytest.raises(ValueError, match="gkd: weight must be float"):
        recipes.gkd(**tensors, weight=tensors["mask"])
    with pytest.raises(ValueError, match="gkd: reduction sequence_mean needs logits of texts"):
        recipes.gkd(
            *(tensors[f"{side}_logits"][0] for side in ("student", "teacher")),
            reduction="sequence_mean",
        )
