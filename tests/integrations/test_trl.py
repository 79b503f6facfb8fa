"""TRL's losses, against numbers that TRL's own code gave, and its seams."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

from fastkd.integrations import trl

#: Inputs and results of TRL 1.16.0: `generalized_jsd_loss` in float64, `_chunked_divergence_loss`.
NUMBERS = json.loads(Path(__file__).with_name("trl_numbers.json").read_text(encoding="utf-8"))


def name_of(case):
    return " ".join(f"{k}={v}" for k, v in case.items() if "norm" not in k and k != "loss")


@pytest.mark.parametrize("case", NUMBERS["jsd"]["cases"], ids=name_of)
def test_generalized_jsd_loss(case):
    given = NUMBERS["jsd"]
    student, teacher = (
        torch.tensor(given[side], dtype=torch.float64) for side in ("student", "teacher")
    )
    student.requires_grad_()
    labels = torch.tensor(given["labels"]) if case["labels"] else None
    options = {k: case[k] for k in ("beta", "temperature", "reduction", "num_items_in_batch")}
    loss = trl.generalized_jsd_loss(student, teacher, labels, **options)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    assert student.grad.norm().item() == pytest.approx(case["gradient_norm"], rel=1e-9)


@pytest.mark.parametrize("case", NUMBERS["probs"], ids=lambda case: f"beta {case['beta']}")
def test_probabilities(case):
    given = NUMBERS["jsd"]
    student, teacher = (
        torch.tensor(given[side], dtype=torch.float64).softmax(-1)[0, :, :3]
        for side in ("student", "teacher")
    )
    student = student.clone().requires_grad_()
    loss = trl.generalized_jsd_loss(student, teacher, beta=case["beta"], logits_are_probs=True)
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-9)
    assert student.grad.norm().item() == pytest.approx(case["gradient_norm"], rel=1e-9)


def test_unequal_widths_and_empty_batches():
    student, teacher = torch.randn(2, 3, 7, requires_grad=True), torch.randn(2, 3, 5)
    torch.testing.assert_close(
        trl.generalized_jsd_loss(student, teacher),
        trl.generalized_jsd_loss(student[..., :5], teacher),
    )
    labels = torch.full((2, 3), -100)
    for reduction in ("batchmean", "sum", "mean"):
        loss = trl.generalized_jsd_loss(student, teacher, labels, reduction=reduction)
        loss.backward()
        assert loss.item() == 0
    assert not student.grad.any()
    with pytest.raises(ValueError, match=r"generalized_jsd_loss: reduction .* got 'none'"):
        trl.generalized_jsd_loss(student, teacher, reduction="none")


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"student_logits": [1.0]}, TypeError, "student_logits must be a tensor, got list"),
        ({"teacher_logits": None}, TypeError, "teacher_logits must be a tensor, got NoneType"),
        ({"student_logits": torch.tensor(1.0)}, ValueError, "student_logits must have a dimension"),
        ({"labels": [1, 2]}, TypeError, "labels must be a tensor, got list"),
        ({"labels": torch.ones(3).long()}, ValueError, r"labels must be one a row, \[2, 3\], got"),
    ],
)
def test_errors_of_generalized_jsd_loss(given, error, message, probs):
    given = {"student_logits": torch.rand(2, 3, 5), "teacher_logits": torch.rand(2, 3, 5), **given}
    with pytest.raises(error, match=f"^generalized_jsd_loss: {message}"):
        trl.generalized_jsd_loss(**given, logits_are_probs=probs)


def test_errors_of_probabilities():
    student = torch.rand(2, 3, 5)
    for given, error, message in (
        (
            {"teacher_logits": torch.rand(3, 5)},
            ValueError,
            r"student_logits' shape \[2, 3, 5\], got",
        ),
        ({"beta": 1.5}, ValueError, r"beta must lie in \[0, 1\], got 1.5"),
        ({"beta": "1"}, TypeError, "beta must be a number, got str"),
        ({"logits_are_probs": 1}, TypeError, "logits_are_probs must be True or False, got int"),
    ):
        given = {"teacher_logits": student, "logits_are_probs": True, **given}
        with pytest.raises(error, match=f"^generalized_jsd_loss: .*{message}"):
            trl.generalized_jsd_loss(student, **given)


@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize(
    ("items", "error", "message"),
    [
        ("3", TypeError, "must be a number, got str"),
        (-7, ValueError, "must not be negative, got -7"),
        (torch.ones(2, 3), ValueError, "must be a number, got a tensor of shape"),
    ],
)
def test_errors_of_the_denominator(items, error, message, probs):
    student = torch.rand(2, 3, 5).softmax(-1)
    with pytest.raises(error, match=f"^generalized_jsd_loss: num_items_in_batch {message}"):
        trl.generalized_jsd_loss(student, student, num_items_in_batch=items, logits_are_probs=probs)


def test_errors_have_the_name_of_trl():
    student = torch.rand(2, 3, 5)
    with pytest.raises(ValueError, match=r"^generalized_jsd_loss: beta must lie in .* got 2"):
        trl.generalized_jsd_loss(student, student, beta=2.0)


def test_labels_that_the_teacher_does_not_have():
    """A student with more tokens than the teacher: labels only say which rows count, as in TRL."""
    student, teacher = torch.randn(2, 3, 9), torch.randn(2, 3, 7)
    labels = torch.tensor([[8, -100, 7], [1, 2, -100]])
    kept = labels != -100
    torch.testing.assert_close(
        trl.generalized_jsd_loss(student, teacher, labels),
        trl.generalized_jsd_loss(student[kept], teacher[kept]),
    )


def test_errors_of_chunked_divergence_loss():
    good = [torch.rand(1, 2, 3)] * 2 + [torch.rand(4, 3)] * 2 + [torch.ones(1, 2)]
    for place, name in enumerate(
        (
            "student_hidden_states",
            "teacher_hidden_states",
            "student_lm_head_weight",
            "teacher_lm_head_weight",
            "completion_mask",
        )
    ):
        given = [None if i == place else x for i, x in enumerate(good)]
        message = f"^chunked_divergence_loss: {name} must be a tensor, got NoneType"
        with pytest.raises(TypeError, match=message):
            trl.chunked_divergence_loss(*given, 0.5)
    for given, error, message in (
        ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch must not be negative"),
        ({"student_lm_head_bias": [1.0]}, TypeError, "student_lm_head_bias must be a tensor, got"),
        ({"teacher_lm_head_bias": torch.ones(3)}, ValueError, "teacher_lm_head_bias must have"),
        ({"teacher_logit_scale": "2"}, TypeError, "teacher_logit_scale must be a number, got str"),
        ({"student_final_logit_softcapping": "2"}, TypeError, "student_final_logit_softcapping mu"),
        ({"teacher_lm_head_weight": torch.ones(4, 2)}, ValueError, "teacher_hidden_states must"),
    ):
        names = ("student_hidden_states", "teacher_hidden_states", "student_lm_head_weight")
        names = (*names, "teacher_lm_head_weight", "completion_mask")
        given = {**dict(zip(names, good, strict=True)), **given}
        with pytest.raises(error, match=f"^chunked_divergence_loss: {message}"):
            trl.chunked_divergence_loss(**given, beta=0.5)


@pytest.mark.parametrize("case", NUMBERS["chunked"]["cases"], ids=lambda c: str(c["options"]))
def test_chunked_divergence_loss(case):
    given = {
        name: torch.tensor(values, dtype=torch.float64 if "mask" not in name else torch.int64)
        for name, values in NUMBERS["chunked"]["inputs"].items()
    }
    for name, tensor in given.items():
        if name.startswith("student"):
            tensor.requires_grad_()
    loss, entropy, count = trl.chunked_divergence_loss(**given, **case["options"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-5)  # theirs in float32
    assert entropy.item() == pytest.approx(case["entropy_sum"], rel=1e-5)
    assert not entropy.requires_grad
    assert count.item() == case["n_valid"]
    for name, norm in case["norms"].items():
        assert given[name].grad.norm().item() == pytest.approx(norm, rel=1e-4), name


class Gkd:
    @staticmethod
    def generalized_jsd_loss(
        student_logits,
        teacher_logits,
        labels=None,
        beta=0.5,
        temperature=1.0,
        reduction="batchmean",
        num_items_in_batch=None,
    ):
        return "theirs"


class Gold:
    @staticmethod
    def generalized_jsd_loss(
        student_logits,
        teacher_logits,
        labels=None,
        beta=0.5,
        temperature=1.0,
        reduction="batchmean",
        logits_are_probs=False,
        num_items_in_batch=None,
    ):
        return "theirs"


class Changed:
    @staticmethod
    def generalized_jsd_loss(student_logits, teacher_logits, labels=None, beta=0.7):
        return "theirs"


class Mine(Gkd):
    pass


@pytest.fixture
def distillation_module():
    """A module with a trainer and the function that it calls as a global."""
    module = types.ModuleType("trl_like")
    parameters = ", ".join(
        name if default is trl.inspect.Parameter.empty else f"{name}={default!r}"
        for name, _, default in trl._parameters(trl.chunked_divergence_loss)
    )
    exec(
        f"def _chunked_divergence_loss({parameters}):\n    return 'theirs'\n"
        "class DistillationTrainer:\n    def loss(self, *args):\n"
        "        return _chunked_divergence_loss(*args)\n",
        module.__dict__,
    )
    sys.modules["trl_like"] = module
    module.DistillationTrainer.__module__ = "trl_like"
    yield module
    del sys.modules["trl_like"]


def test_enable_and_undo(distillation_module):
    student, teacher = torch.randn(2, 5), torch.randn(2, 5)
    expected = trl.generalized_jsd_loss(student, teacher)
    trainer = distillation_module.DistillationTrainer()
    rest = [torch.ones(1, 2, 3), torch.ones(1, 2, 3), torch.eye(4, 3), torch.eye(4, 3)]
    rest += [torch.ones(1, 2), 0.5]
    with trl.enable(Mine, Gold, distillation_module.DistillationTrainer):
        assert torch.equal(Mine().generalized_jsd_loss(student, teacher), expected)
        assert torch.equal(Gkd.generalized_jsd_loss(student, teacher), expected)
        probs = student.softmax(-1), teacher.softmax(-1)
        found = Gold.generalized_jsd_loss(*probs, logits_are_probs=True)
        torch.testing.assert_close(found, expected)
        assert trainer.loss(*rest)[0].item() == 0
    assert Gkd.generalized_jsd_loss(student, teacher) == "theirs"
    assert Gold.generalized_jsd_loss(student, teacher) == "theirs"
    assert trainer.loss(*rest) == "theirs"
    undo = trl.enable(Gkd)
    assert torch.equal(Gkd.generalized_jsd_loss(student, teacher), expected)
    undo()
    undo()
    assert Gkd.generalized_jsd_loss(student, teacher) == "theirs"


def test_another_signature_changes_nothing():
    with pytest.raises(TypeError, match=r"Changed.generalized_jsd_loss must .* got \(student"):
        trl.enable(Gkd, Changed)
    assert Gkd.generalized_jsd_loss(1, 2) == "theirs"
    for wrong in ((), (int,), ("GKDTrainer",)):
        with pytest.raises(TypeError, match=r"enable: "):
            trl.enable(*wrong)


def test_installed_trainers():
    """With TRL: its classes still have what is replaced."""
    if not importlib.util.find_spec("trl"):
        pytest.skip("trl is not installed: pip install 'fastkd[trl]'")
    from trl import DistillationTrainer
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.gold import GOLDTrainer

    with trl.enable(GKDTrainer, GOLDTrainer, DistillationTrainer):
        student, teacher = torch.randn(2, 5), torch.randn(2, 5)
        ours = GKDTrainer.generalized_jsd_loss(student, teacher)
    torch.testing.assert_close(ours, GKDTrainer.generalized_jsd_loss(student, teacher))
