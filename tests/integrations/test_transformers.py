"""The Trainer with a teacher: a tiny random model, gradients read off one step of SGD."""

import importlib.util
import math
import os
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastkd
from fastkd.integrations._modules import reads_backbone

lacking = [name for name in ("transformers", "accelerate") if not importlib.util.find_spec(name)]
if lacking:
    pytest.skip(
        f"{', '.join(lacking)} not installed: pip install 'fastkd[transformers]'",
        allow_module_level=True,
    )

import tiny_trainer as tiny  # noqa: E402
import transformers  # noqa: E402
from transformers import Trainer  # noqa: E402

from fastkd.integrations import KDOptions  # noqa: E402
from fastkd.integrations.transformers import DistillationMixin  # noqa: E402


def step(folder, **options):
    """The loss that is logged and the gradient of a step from the same start."""
    student = tiny.model(1)
    run = tiny.trainer(folder, student, **options)
    run.train()
    (loss,) = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    return loss, tiny.moved(tiny.model(1), student)


def formula(*, divergence, label_weight, temperature=1.0):
    """Loss and gradient over all texts, in plain PyTorch."""
    student, teacher = tiny.model(1), tiny.model(2, 24)
    batch = tiny.texts()
    ids, labels = (torch.stack([text[k] for text in batch]) for k in ("input_ids", "labels"))
    z, labels = student(input_ids=ids).logits[:, :-1], labels[:, 1:]
    with torch.no_grad():
        p = (teacher(input_ids=ids).logits[:, :-1] / temperature).log_softmax(-1)
    q = (z / temperature).log_softmax(-1)
    rows = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    if divergence == "reverse_kl":
        rows = F.kl_div(p, q, reduction="none", log_target=True).sum(-1)
    kept = labels != -100
    loss = (
        rows[kept] + label_weight * F.cross_entropy(z[kept], labels[kept], reduction="none")
    ).mean()
    loss.backward()
    return loss.item(), torch.cat([x.grad.flatten() for x in student.parameters()])


def close_gradients(found, expected):
    """Beyond float32's digits of the gradient, the step has rounded each parameter once."""
    parameters = torch.cat([p.detach().flatten() for p in tiny.model(1).parameters()])
    bound = 2e-5 * expected.norm() + 2**-24 * parameters.norm()
    assert (found - expected).norm() < bound


def close(found, expected):
    assert found[0] == pytest.approx(expected[0], rel=1e-4)
    close_gradients(found[1], expected[1])


@pytest.fixture(scope="module")
def truth():
    return formula(divergence="forward_kl", label_weight=0.5)


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_step_is_the_formula(tmp_path, truth, head):
    close(step(tmp_path, teacher=tiny.model(2, 24), label_weight=0.5, head=head), truth)
    other = formula(divergence="reverse_kl", label_weight=0.0, temperature=2.0)
    options = {"divergence": "reverse_kl", "temperature": 2.0, "chunk_size": 5}
    close(step(tmp_path, teacher=tiny.model(2, 24), head=head, **options), other)


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_accumulation_changes_nothing(tmp_path, truth, head):
    options = {"label_weight": 0.5, "head": head, "batch": 2, "accumulate": 4}
    close(step(tmp_path, teacher=tiny.model(2, 24), **options), truth)


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_a_stored_teacher(tmp_path, truth, head):
    teacher = tiny.model(2, 24).eval()
    whole = tiny.texts(stored=(teacher, tiny.VOCAB))
    close(step(tmp_path, dataset=whole, label_weight=0.5, head=head), truth)
    warm = formula(divergence="forward_kl", label_weight=0.5, temperature=2.0)
    options = {"label_weight": 0.5, "temperature": 2.0, "head": head}
    close(step(tmp_path, dataset=whole, **options), warm)
    at_two = tiny.texts(stored=(teacher, tiny.VOCAB), temperature=2.0)
    close(step(tmp_path, dataset=at_two, stored_temperature=2.0, **options), warm)
    student = tiny.model(1)
    few = tiny.texts(stored=(teacher, 5))
    few[0]["teacher_indices"] = torch.full_like(few[0]["teacher_indices"], -1)  # nothing known
    few[1]["teacher_log_probs"] = torch.full_like(few[1]["teacher_log_probs"], -math.inf)
    run = tiny.trainer(tmp_path, student, dataset=few, head=head)
    batch = {k: torch.stack([text[k] for text in few]) for k in few[0]}
    loss = run.compute_loss(student, batch)
    kept = F.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    kept[:2] = False
    expected = fastkd.topk_divergence(
        student(input_ids=batch["input_ids"]).logits,
        batch["teacher_log_probs"],
        batch["teacher_indices"],
        mask=kept,
    )
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("pack", [False, True])
def test_a_store_read_by_the_collator(tmp_path, pack):
    """A step with keys alone in the data set is that with the store's rows as its columns."""
    pytest.importorskip("safetensors", reason='TeacherStore needs safetensors: "fastkd[store]"')
    teacher, columns = tiny.model(2, 24).eval(), tiny.texts()
    settings = {"vocab_size": tiny.VOCAB, "k": 5, "keys": True, "input_ids": True}
    ids = torch.stack([text["input_ids"] for text in columns])
    with torch.no_grad(), fastkd.TeacherStore.create(tmp_path / "store", **settings) as writer:
        best = fastkd.teacher_topk(teacher(input_ids=ids).logits, 5)
        writer.append_batch(*best, keys=range(tiny.TEXTS), input_ids=ids)
    store = fastkd.TeacherStore(tmp_path / "store")
    for i, text in enumerate(columns):
        text |= dict(zip(("teacher_log_probs", "teacher_indices"), store[i], strict=True))
    expected = step(tmp_path, dataset=columns)
    student = tiny.model(1)
    keys = [{"key": i, "labels": text["labels"]} for i, text in enumerate(columns)]
    run = tiny.trainer(tmp_path, student, dataset=keys)
    run.args.remove_unused_columns = False
    run.data_collator = partial(fastkd.teachers.collate, store=store, pack=pack)
    run.train()
    (loss,) = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    close((loss, tiny.moved(tiny.model(1), student)), expected)


@pytest.mark.parametrize("head", ["fused", "logits"])
def test_a_live_teacher_of_packed_texts(tmp_path, head):
    """The teacher reads each text alone, too: position ids say where they begin."""
    columns = tiny.texts()
    student, teacher = tiny.model(1), tiny.model(2, 24)
    assert teacher.config.use_cache
    run = tiny.trainer(tmp_path, student, teacher=teacher, dataset=columns, head=head)
    ids, labels = (torch.stack([text[k] for text in columns]) for k in ("input_ids", "labels"))
    labels[:, 0] = -100
    positions = torch.arange(tiny.LENGTH).repeat(tiny.TEXTS)
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions}
    packed = {name: x.reshape(1, -1) for name, x in packed.items()}
    loss = run.compute_loss(student, packed)
    torch.testing.assert_close(
        loss, run.compute_loss(student, {"input_ids": ids, "labels": labels})
    )


def test_evaluation_and_shifted_labels(tmp_path, truth):
    run = tiny.trainer(tmp_path, tiny.model(1), teacher=tiny.model(2, 24), label_weight=0.5)
    assert run.evaluate()["eval_loss"] == pytest.approx(truth[0], rel=1e-5)
    batch = {k: torch.stack([text[k] for text in tiny.texts()]) for k in ("input_ids", "labels")}
    shifted = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=-100)
    loss = run.compute_loss(run.model, {**batch, "shift_labels": shifted})
    assert loss.item() == pytest.approx(truth[0], rel=1e-5)
    empty = run.compute_loss(run.model, {**batch, "labels": torch.full_like(shifted, -100)})
    empty.backward()
    assert empty.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in run.model.parameters())


def test_metrics_get_logits(tmp_path, truth):
    run = tiny.trainer(tmp_path, tiny.model(1), teacher=tiny.model(2, 24), label_weight=0.5)
    shapes = []
    run.compute_metrics = lambda found: shapes.append(found.predictions.shape) or {"n": 1}
    assert run.evaluate()["eval_loss"] == pytest.approx(truth[0], rel=1e-5)
    assert shapes == [(tiny.TEXTS, tiny.LENGTH, tiny.VOCAB)]


def test_an_adapted_head_has_logits(tmp_path, truth):
    class Adapted(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x)

    student = tiny.model(1)
    layer = Adapted(16, tiny.VOCAB, bias=False)
    layer.load_state_dict(student.lm_head.state_dict())
    student.lm_head = layer
    run = tiny.trainer(tmp_path, student, teacher=tiny.model(2, 24), label_weight=0.5)
    assert run._fused_head(student) is None
    run.train()
    close_gradients(tiny.moved(tiny.model(1), student), truth[1])


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "T5ForConditionalGeneration"])
def test_models_that_are_not_causal(tmp_path, kind):
    sizes = {"vocab_size": tiny.VOCAB, "num_attention_heads": 2, "num_hidden_layers": 1}
    if kind == "BertForMaskedLM":
        config = transformers.BertConfig(**sizes, hidden_size=8, intermediate_size=8)
        message = "BertForMaskedLM, a masked language model"
    else:
        config = transformers.T5Config(vocab_size=tiny.VOCAB, d_model=8, d_ff=8, num_layers=1)
        message = "T5ForConditionalGeneration, an encoder-decoder"
    wrong = getattr(transformers, kind)(config)
    for name, models in (("model", (wrong, None)), ("teacher", (tiny.model(1), wrong))):
        with pytest.raises(
            TypeError, match=f"{name} must be a causal language model, got {message}"
        ):
            tiny.trainer(tmp_path, models[0], teacher=models[1])


class Scaled(transformers.LlamaForCausalLM):
    """As in a repository of its own: nothing in the configuration says so."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits / 8
        return found


@pytest.mark.parametrize("kind", ["Bert", "RecurrentGemma", "Scaled"])
def test_what_comes_between_the_backbone_and_the_logits(tmp_path, kind):
    """BERT's kind has a layer there, RecurrentGemma's configuration another name for the cap."""
    sizes = {"vocab_size": tiny.VOCAB, "hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32}
    if kind == "Bert":
        config = transformers.BertConfig(**sizes, is_decoder=True)
        teacher = transformers.BertLMHeadModel(config)
    elif kind == "Scaled":
        teacher = Scaled(tiny.model(2).config)
    else:
        config = transformers.RecurrentGemmaConfig(**sizes, lru_width=16, logits_soft_cap=0.01)
        teacher = transformers.RecurrentGemmaForCausalLM(config)
    student = tiny.model(1)
    batch = {k: torch.stack([text[k] for text in tiny.texts()]) for k in ("input_ids", "labels")}
    losses = [
        tiny.trainer(tmp_path, student, teacher=teacher, head=head).compute_loss(student, batch)
        for head in ("fused", "logits")
    ]
    torch.testing.assert_close(*losses)


class Capped(transformers.LlamaForCausalLM):
    """The same with a softcap that logits of untrained weights do not show."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 30 * torch.tanh(found.logits / 30)
        return found


class Pictured(transformers.LlamaForCausalLM):
    """It needs more than token ids, or runs out of memory."""

    error = ValueError("pixel_values must be given")

    def forward(self, *args, **kwargs):
        raise self.error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_step_that_untrained_weights_do_not_show(dtype):
    plain = tiny.model(2).to(dtype)
    assert reads_backbone(plain)
    hidden = Capped(plain.config).to(dtype).train()
    assert not reads_backbone(hidden)
    assert all(x.training for x in hidden.modules())
    assert not hidden.base_model._forward_hooks
    found = plain(torch.tensor([[1, 2]])).logits
    assert reads_backbone(plain)
    assert torch.equal(plain(torch.tensor([[1, 2]])).logits, found)


def test_the_comparison_hides_no_error():
    model = Pictured(tiny.model(2).config)
    with pytest.warns(UserWarning, match=r"Pictured could not be run .* ValueError: pixel_values"):
        assert reads_backbone(model)
    for error in (torch.OutOfMemoryError("no memory"), ImportError("no kernel")):
        model.error = error
        with pytest.raises(type(error), match="no "):
            reads_backbone(model)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_learned_prompts(tmp_path, kind):
    """Virtual tokens stand before the text: their rows score none of its labels."""
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(num_virtual_tokens=3, task_type="CAUSAL_LM")
    student, teacher = peft.get_peft_model(tiny.model(1), config), tiny.model(2, 24)
    run = tiny.trainer(tmp_path, student, teacher=teacher)
    batch = {k: torch.stack([text[k] for text in tiny.texts()]) for k in ("input_ids", "labels")}
    ids, kept = batch["input_ids"], batch["labels"][:, 1:] != -100
    loss = run.compute_loss(student, batch)
    logits = student(input_ids=ids).logits[:, -tiny.LENGTH : -1]
    expected = fastkd.softmax_divergence(logits[kept], teacher(input_ids=ids).logits[:, :-1][kept])
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert any(x.grad is not None and x.grad.any() for x in student.parameters())


def test_two_processes_are_one_with_all_texts(tmp_path, truth):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = Path(__file__).with_name("tiny_trainer.py")
    paths = os.pathsep.join(str(Path(file).parents[1]) for file in (fastkd.__file__, __file__))
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    assert not any(rank.returncode for rank in ranks), errors
    close_gradients(torch.load(tmp_path / "gradient.pt"), truth[1])


def test_errors(tmp_path):
    student = tiny.model(1)
    with pytest.raises(TypeError, match=r"teacher must be a torch.nn.Module, got str"):
        DistillationMixin(teacher="model")
    with pytest.raises(TypeError, match=r"kd must be KDOptions, got dict"):
        DistillationMixin(kd={})
    run = tiny.trainer(tmp_path, student)
    with pytest.raises(ValueError, match=r"DistillationMixin: compute_loss_func must not be given"):
        type(run)(student, run.args, compute_loss_func=print)
    smooth = replace(run.args, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match=r"label_smoothing_factor must not be given, .* got 0.1"):
        type(run)(student, smooth)
    batch = {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"a batch must have labels"):
        run.compute_loss(student, batch)
    with pytest.raises(ValueError, match=r"without a teacher a batch must have teacher_log_probs"):
        run.compute_loss(student, {**batch, "labels": batch["input_ids"]})
    assert isinstance(run, Trainer)
    assert run.kd == KDOptions()
