"""align_distil against its definition."""

import pytest
import torch
from recipe_checks import (
    Entry,
    by_rows,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    problem,
    promises,
    with_,
)

import fastkd
from fastkd import recipes

VARIANTS = ("aligndistil", "theorem1_adaptive", "theorem1_contrast", "theorem1")
with_reference = with_("reference_logits")


def plain_align_distil(
    student_logits,
    teacher_logits,
    reference_logits,
    variant="aligndistil",
    beta=0.1,
    beta2=10.0,
    temperature=1.0,
    teacher_temperature=None,
):
    first, second = teacher_logits.softmax(-1), reference_logits.softmax(-1)
    a = beta2 * sum(abs(first[v] - second[v]) for v in range(len(first))) + 1e-3
    w = beta / beta2
    if variant == "aligndistil":
        target, coefficient = teacher_logits + a * (teacher_logits - reference_logits), beta / a
    elif variant == "theorem1_adaptive":
        target, coefficient = a * teacher_logits + (1 - a) * reference_logits, beta / a
    elif variant == "theorem1_contrast":
        target, coefficient = teacher_logits + w * (teacher_logits - reference_logits), beta2
    else:
        target, coefficient = w * teacher_logits + (1 - w) * reference_logits, beta2
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    q = (student_logits / temperature).log_softmax(-1)
    p = (target / teacher_temperature).log_softmax(-1)
    return coefficient * sum(q[v].exp() * (q[v] - p[v]) for v in range(len(q)))


ENTRIES = [
    Entry(
        "align_distil",
        by_rows(plain_align_distil),
        {} if variant == "aligndistil" else {"variant": variant},
        problem=with_reference,
        default="sequence_mean",
        published={"variant": "aligndistil", "beta": 0.1, "beta2": 10.0, "temperature": 1.0},
    )
    for variant in VARIANTS
]
ENTRIES.append(
    Entry(
        "align_distil",
        by_rows(plain_align_distil),
        {"beta": 0.3, "beta2": 15.0, "temperature": 1.0, "teacher_temperature": 2.0},
        problem=with_reference,
        default="sequence_mean",
    )
)
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
GIVEN = with_reference(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "all": lambda x: (
            recipes.align_distil(**GIVEN, beta=x, beta2=x, temperature=x, teacher_temperature=x)
            + recipes.align_distil(**GIVEN, beta=x, beta2=x + 1, variant="theorem1")
        )
    }
)


@pytest.mark.parametrize("variant", VARIANTS)
def test_equal_teacher_and_reference(variant):
    """Then a is 1e-3, and every mixture is the teacher."""
    tensors = with_reference(torch.float64)
    tensors["reference_logits"] = tensors["teacher_logits"]
    found = recipes.align_distil(**tensors, variant=variant, reduction="mean")
    del tensors["reference_logits"]
    right = fastkd.softmax_divergence(**tensors, divergence="reverse_kl")
    coefficient = 10.0 if variant.endswith(("theorem1", "contrast")) else 0.1 / 1e-3
    torch.testing.assert_close(found, coefficient * right)


def test_theorem1_of_equal_betas_is_the_reverse_kl_of_the_teacher():
    tensors = with_reference(torch.float64)
    options = {"beta": 4.0, "beta2": 4.0, "variant": "theorem1", "reduction": "mean"}
    found = recipes.align_distil(**tensors, **options)
    del tensors["reference_logits"]
    right = fastkd.softmax_divergence(**tensors, divergence="reverse_kl")
    torch.testing.assert_close(found, 4 * right)


def test_padded_columns():
    tensors = with_reference(torch.float64)
    right = recipes.align_distil(**tensors)
    for name in ("student_logits", "teacher_logits", "reference_logits"):
        x = tensors[name]
        tensors[name] = torch.cat([x, torch.randn(*x.shape[:-1], 3).double() + 9], -1)
    torch.testing.assert_close(recipes.align_distil(**tensors, vocab_size=11), right)


def test_errors():
    tensors = with_reference(torch.float32)
    with pytest.raises(ValueError, match="align_distil: variant must be one of aligndistil, theo"):
        recipes.align_distil(**tensors, variant="dpo")
    with pytest.raises(ValueError, match="align_distil: reference_logits must have the leading"):
        recipes.align_distil(**{**tensors, "reference_logits": torch.zeros(3, 4, 11)})
    with pytest.raises(ValueError, match="align_distil: beta2 must be positive and finite, got 0"):
        recipes.align_distil(**tensors, beta2=0.0)
    tensors["reference_logits"].requires_grad_()
    with pytest.raises(ValueError, match="align_distil: reference_logits takes no gradient"):
        recipes.align_distil(**tensors)
    with pytest.raises(ValueError, match="align_distil: reduction sequence_mean needs logits of"):
        recipes.align_distil(*(problem(torch.float32)["student_logits"][0] for _ in range(3)))
