"""Errors name the function and the argument, whatever the wrong value is.

Recipes with an entry are in recipe_checks.py.
"""

import inspect

import pytest
import torch
from cases import logits
from chunks import chunks_of
from wrong_values import unclear

import fastkd
from fastkd import acm, recipes

nn = torch.nn
CHUNKS, K = 6, 3
S, T = logits((3, 5, 11)), logits((3, 5, 9))
WIDE = logits((3, 5, 11))
IDS, T_IDS = torch.randint(0, 11, (3, 5)), torch.randint(0, 9, (3, 5))
MASK, WEIGHT = torch.ones(3, 5, dtype=torch.bool), torch.rand(3, 5)
ROWS = {"weight": WEIGHT, "mask": MASK, "labels": IDS}
TOP = fastkd.teacher_topk(WIDE, K)._asdict()
STORED = {"teacher_log_probs": TOP["log_probs"], "teacher_indices": TOP["indices"]}
PAIR = {"student_logits": S, "teacher_logits": WIDE}
PLACES = {
    "student_chunks": chunks_of((3, 5), CHUNKS),
    "teacher_chunks": chunks_of((3, 5), CHUNKS),
    "num_chunks": CHUNKS,
}
ACROSS = {"student_logits": S, "teacher_logits": T}
VOCABS = [fastkd.ByteVocab([bytes([97 + i]) for i in range(n)]) for n in (11, 9)]
OF_VOCABS = {"student_vocab": VOCABS[0], "teacher_vocab": VOCABS[1]}
HEADS = {
    "student_hidden": logits((3, 5, 4)),
    "student_weight": logits((11, 4)),
    "teacher_hidden": logits((3, 5, 6)),
    "teacher_weight": logits((11, 6)),
    "student_bias": torch.zeros(11),
}
DSKD = [recipes.DskdSide(x, x, x, logits((x.size(-1), x.size(-1))), MASK) for x in (S, T)]
LOG_PROBS = {"student_log_probs": -WEIGHT, "teacher_log_probs": -WEIGHT}
HIDDEN, CLASSES = logits((20, 6)), torch.arange(20) % 3
IDS_OF = {"student_ids": IDS}

LOSSES = {
    "softmax_divergence": {**PAIR, **ROWS},
    "cross_entropy": {"logits": S, **ROWS},
    "token_log_probs": {"logits": S, "token_ids": IDS, "mask": MASK},
    "token_stats": {**PAIR, "labels": IDS},
    "topk_divergence": {"student_logits": S, **STORED, **ROWS},
    "topk_stats": {"student_logits": S, **STORED},
    "clipped_divergence": {**PAIR, "lower": WEIGHT / 2, "upper": 1 - WEIGHT / 2, **ROWS},
    "linear_softmax_divergence": {**HEADS, **ROWS},
}
RECIPES = {
    "acceptance": PAIR,
    "alm": {**ACROSS, **PLACES, **IDS_OF, "teacher_ids": T_IDS, **OF_VOCABS, "student_mask": MASK},
    "alm_latents": {
        "student_hidden": T,
        "teacher_hidden": T,
        **PLACES,
    },
    "balanced": {"loss": WEIGHT, "other": WEIGHT},
    "bucket_quantize": {"x": WEIGHT, "levels": 3},
    "class_balanced_weights": {"counts": [3, 4]},
    "ddk_factors": dict.fromkeys(
        ("factors", "student_perplexity", "teacher_perplexity"), torch.ones(3)
    ),
    "distill_weighted": {
        "student_logits": [S, S],
        "teacher_logits": [S, S],
        "scores": [1.0, 2.0],
    },
    "distillm2": {"chosen": (S, WIDE, MASK), "rejected": (S, WIDE, MASK)},
    "distillm2_alphas": {**LOG_PROBS, "mask": MASK, "anchor": 0.2},
    "dskd": {
        "student": DSKD[0],
        "teacher": DSKD[1],
        **IDS_OF,
        "query": None,
        "to_student": lambda x: x @ torch.ones(9, 11),
        "to_teacher": None,
    },
    "edit_distance_map": OF_VOCABS,
    "lad_label_map": {"labels": CLASSES.view(4, 5), "num_classes": 3},
    "lelp_subclasses": {"hidden": HIDDEN, "labels": CLASSES, "head": logits((3, 6)), "num_sub": 2},
    "meal_v2_discrimination": {
        "discriminator": lambda x: x[:, :2],
        "student_logits": HIDDEN,
        "teacher_logits": [HIDDEN],
    },
    "mgsr_position": {**PAIR, "mask": MASK},
    "mined": {
        **ACROSS,
        **PLACES,
        **IDS_OF,
        "vocab_map": torch.arange(11).clamp(max=8),
        "mask": MASK,
    },
    "parc": {"features": HIDDEN, "labels": CLASSES, "num_classes": 3},
    "prefix_map": OF_VOCABS,
    "r2r_features": {"logits": S, "k": 3},
    "r2r_log_u": {"top_logits": S.abs()},
    "shared_tokens": OF_VOCABS,
    "stream_dit_inputs": {"clean": S, "noise": S, "t": torch.rand(3, 5), "sigma_min": 0.0},
    "token_budget": {"scores": WEIGHT, "keep": 0.5, "mask": MASK},
    "token_projection": {**OF_VOCABS, "encode": lambda text: [0]},
    "uld": {**ACROSS, **PLACES},
}
LEARNERS = {
    "x": logits((3, 5, 4)),
    "w1": logits((2, 4, 6)),
    "b1": logits((2, 6)),
    "w2": logits((2, 6, 7)),
}
GATES = torch.rand(3, 5, 3)
ACM = {
    "hard": {**LEARNERS, "choices": torch.ones(3, 5, dtype=torch.int64)},
    "soft": {**LEARNERS, "gates": GATES},
    "prefix_loss": {**LEARNERS, "target": logits((3, 5, 7))},
    "oracle": {**LEARNERS, "target": logits((3, 5, 7))},
    "gate": {"logits": GATES},
    "regularizers": {"gates": [GATES], "costs": [1.0], "target": 0.5, "mask": MASK},
}


def _but_scale(errors):
    """Without those of logit_scale, which is LinearLogits' scale in them."""
    return [x for x in errors if not x.startswith("logit_scale=")]


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    assert _but_scale(unclear(getattr(fastkd, name), LOSSES[name])) == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_without_an_entry(name):
    assert unclear(getattr(recipes, name), RECIPES[name]) == []


def test_objects_of_recipes():
    assert unclear(recipes.MiCritic, {"student_width": 3, "teacher_width": 4}) == []
    schedule = recipes.TaidSchedule()
    assert unclear(schedule.step, {"loss": 1.0, "progress": 0.5}) == []
    loss = torch.ones((), requires_grad=True)
    assert [type(schedule.step(loss, torch.tensor(x))) for x in (0.0, 0.5)] == [float, float]
    assert isinstance(schedule.momentum, float)  # nothing of the loss's graph


@pytest.mark.parametrize("name", ACM)
def test_gated_routing(name):
    assert unclear(getattr(acm, name), ACM[name]) == []


@pytest.mark.parametrize("name", [x for x in fastkd.nn.__all__ if x not in ("ACM", "KLDivLoss")])
def test_modules(name):
    given = {"in_features": 8, "num_learners": 2} if name == "ACMGate" else {}
    found = _but_scale(unclear(getattr(fastkd.nn, name), given))
    assert [x for x in found if not x.startswith("group=")] == []  # checked where there is one


def test_models():
    def mlp():
        return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def convert(**arguments):
        return acm.convert(**{"model": mlp(), **arguments})

    convert.__signature__ = inspect.signature(acm.convert)
    assert unclear(convert, {}) == []
    assert unclear(fastkd.nn.ACM, {"in_features": 8, "width": 4}) == []
    assert unclear(fastkd.nn.ACM.from_linear, {"linear": nn.Linear(3, 4)}) == []
    assert unclear(fastkd.nn.ACM.from_mlp, {"mlp": mlp()}) == []
    model = acm.convert(mlp())
    for function in (acm.layers, acm.settings):
        assert unclear(function, {"model": model}) == []
    for originals in (True, False):
        with acm.calls(model, originals=originals) as calls:
            model(torch.ones(3, 8))
        if originals:
            assert unclear(acm.phase1_loss, {"calls": calls}) == []
            assert unclear(acm.phase2_loss, {"calls": calls}) == []
        else:
            given = {"task_loss": torch.zeros(()), "calls": calls, "target": 0.5}
            assert unclear(acm.phase3_loss, given) == []
