"""verl's top-k losses: the numbers of its own, and the seam, in modules of the same form."""

import sys
import types
from dataclasses import dataclass

import pytest
import torch

from fastkd.integrations import verl

VOCAB, ROWS, K = 13, 5, 4


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(1, ROWS, VOCAB, dtype=torch.float64, generator=random) for _ in range(2)
    )
    best = teacher.log_softmax(-1).topk(K)
    log_probs, ids = best.values.clone(), best.indices.clone()
    log_probs[0, -1], ids[0, -1] = 0.0, 0  # how verl fills a text's last row
    return student.requires_grad_(), log_probs, ids


def formula(student, log_probs, ids):
    """verl's quantities, row by row: its loss is the bare sum (tail="drop")."""
    found = {name: [] for name in ("kl", "rest", "student", "teacher", "count", "gain")}
    for z, lp, index in zip(student[0], log_probs[0], ids[0], strict=True):
        log_q = z.log_softmax(-1)
        lq, own = log_q[index], set(z.topk(K).indices.tolist())
        p, q = lp.exp().sum(), lq.exp().sum()
        terms = lp.exp() * (lp - lq)
        shared = torch.tensor([i in own for i in index.tolist()])
        found["kl"].append(terms.sum())
        found["rest"].append((1 - p) * ((1 - p) / (1 - q)).log())
        found["student"].append(q)
        found["teacher"].append(p)
        found["count"].append(shared.sum())
        found["gain"].append(-terms[shared].sum() / max(1, int(shared.sum())))
    return {name: torch.stack(values) for name, values in found.items()}


@pytest.mark.parametrize("tail", ["drop", "lump"])
def test_token_losses(batch, tail):
    student, log_probs, ids = batch
    found = verl.token_losses(student, log_probs, ids, tail=tail)
    truth = formula(*batch)
    loss = truth["kl"] + (truth["rest"] if tail == "lump" else 0)
    names = {"student_mass": "student", "teacher_mass": "teacher"}
    names |= {"overlap_count": "count", "overlap_token_advantage": "gain"}
    kept = slice(0, -1)
    torch.testing.assert_close(
        found["distillation_losses"][0, kept], loss[kept], check_dtype=False, rtol=1e-5, atol=1e-6
    )
    for ours, theirs in names.items():
        torch.testing.assert_close(
            found[ours][0, kept], truth[theirs][kept], check_dtype=False, rtol=1e-5, atol=1e-6
        )
    for values in found.values():
        assert values.shape == (1, ROWS)
        assert values[0, -1] == 0
    (gradient,) = torch.autograd.grad(found["distillation_losses"].sum(), student)
    (expected,) = torch.autograd.grad(loss[kept].sum(), student)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert not gradient[0, -1].any()


def test_shapes_are_checked(batch):
    student, log_probs, ids = batch
    with pytest.raises(ValueError, match=r"token_losses: teacher_log_probs and teacher_ids"):
        verl.token_losses(student[:, 1:], log_probs, ids)
    with pytest.raises(TypeError, match=r"token_losses: teacher_ids must be a tensor, got list"):
        verl.token_losses(student, log_probs, ids.tolist())


@dataclass
class Loss:
    loss_mode: str
    log_prob_min_clamp: float | None = None


@dataclass
class Config:
    distillation_loss: Loss


@pytest.fixture
def like_verl(monkeypatch):
    """Modules with the names and signatures of verl 0.9.1."""
    names = ("verl", "verl.utils", "verl.utils.ulysses", "verl.trainer")
    names += ("verl.trainer.distillation", "verl.trainer.distillation.losses")
    names += ("verl.trainer.distillation.fsdp", "verl.trainer.distillation.fsdp.losses")
    modules = {}
    for name in names:
        modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(modules[parent], last, modules[name])
    modules["verl.utils.ulysses"].get_ulysses_sequence_parallel_world_size = lambda: 1
    losses, fsdp = modules[names[5]], modules[names[7]]
    losses.DISTILLATION_LOSS_REGISTRY = {"forward_kl_topk": "aggregate"}
    losses.DISTILLATION_SETTINGS_REGISTRY = {}

    @dataclass
    class Settings:
        names: list
        use_topk: bool = False

    def register_distillation_loss(settings):
        def decorate(function):
            for name in settings.names:
                losses.DISTILLATION_LOSS_REGISTRY[name] = function
                losses.DISTILLATION_SETTINGS_REGISTRY[name] = settings
            return function

        return decorate

    losses.DistillationLossSettings = Settings
    losses.register_distillation_loss = register_distillation_loss

    def compute_forward_kl_topk(
        student_logits, teacher_topk_log_probs, teacher_topk_ids, config, data_format
    ):
        return "theirs"

    fsdp.compute_forward_kl_topk = compute_forward_kl_topk
    return losses, fsdp


def test_register_and_undo(like_verl, batch):
    losses, fsdp = like_verl
    theirs = fsdp.compute_forward_kl_topk
    undo = verl.register("divergence", tail="lump")
    assert losses.DISTILLATION_LOSS_REGISTRY["divergence"] == "aggregate"
    assert losses.DISTILLATION_SETTINGS_REGISTRY["divergence"].use_topk
    student, log_probs, ids = batch

    class Nested:
        def __init__(self, values):
            self.found = values[0]

        def values(self):
            return self.found

    call = {
        "student_logits": student,
        "teacher_topk_log_probs": Nested(log_probs),
        "teacher_topk_ids": Nested(ids),
        "data_format": "thd",
    }
    found = fsdp.compute_forward_kl_topk(config=Config(Loss("divergence")), **call)
    expected = verl.token_losses(student, log_probs, ids, tail="lump")
    assert found.keys() == expected.keys()
    assert torch.equal(found["distillation_losses"], expected["distillation_losses"])
    assert (found["distillation_losses"] >= 0).all()
    assert fsdp.compute_forward_kl_topk(config=Config(Loss("forward_kl_topk")), **call) == "theirs"
    with pytest.raises(ValueError, match=r"register: verl has a distillation loss 'divergence'"):
        verl.register("divergence")
    undo()
    assert fsdp.compute_forward_kl_topk is theirs
    assert list(losses.DISTILLATION_LOSS_REGISTRY) == ["forward_kl_topk"]


def test_another_verl_is_refused(like_verl):
    losses, fsdp = like_verl
    fsdp.compute_forward_kl_topk = lambda student_logits, config: None
    with pytest.raises(TypeError, match=r"register: .* got student_logits, config"):
        verl.register()
    assert list(losses.DISTILLATION_LOSS_REGISTRY) == ["forward_kl_topk"]
    with pytest.raises(ValueError, match=r"register: tail must be one of .* got 'none'"):
        verl.register(tail="none")
    with pytest.raises(TypeError, match=r"register: beta must be a number, got str"):
        verl.register(beta="x")
    with pytest.raises(TypeError, match=r"register: name must be a string, got int"):
        verl.register(3)
