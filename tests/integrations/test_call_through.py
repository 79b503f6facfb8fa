"""A loss run as a module's forward: alone, and under DDP and FSDP2 in two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from wrapped_models import CASES, WORLD

import fastkd
from fastkd.integrations import KDOptions, call_through, lm_head, normalizer


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both processes found, all cases in one start."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("wrapped_models.py")
    paths = os.pathsep.join(str(Path(file).parents[1]) for file in (fastkd.__file__, __file__))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(folder)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_process(found, name):
    for rank in found:
        assert rank[name]["gradient"] < 1e-12
        assert rank[name]["loss"] < 1e-12


def test_the_inner_call_is_needed(found):
    """Else a head that is an FSDP unit of its own is not gathered."""
    for rank in found:
        result = rank["outer call alone"]["gradient"]
        assert isinstance(result, str) or result > 1e-6


def test_forward_is_restored():
    module = nn.Linear(2, 3)
    calls = []
    module.register_forward_pre_hook(lambda m, args: calls.append(len(args)))
    x = torch.ones(1, 2)

    def inner(a, b):
        assert module(a).shape == (1, 3)  # the module itself, within
        return a + b

    assert call_through(module, inner, x, x).tolist() == [[2.0, 2.0]]
    assert calls == [2, 1]
    assert "forward" not in module.__dict__
    module.forward = lambda a: a  # as hooks of accelerate put it there
    with pytest.raises(ZeroDivisionError):
        call_through(module, lambda: 1 // 0)
    assert module(x) is x


def test_a_compiled_module_runs_it_eagerly():
    module = nn.Linear(2, 3)
    compiled = torch.compile(module, backend="eager")
    assert call_through(compiled, lambda x: x + 1, torch.ones(1)).item() == 2
    both = nn.DataParallel(compiled)
    assert call_through(both, lambda x: x + 1, torch.ones(1)).item() == 2


def test_errors_of_call_through():
    with pytest.raises(TypeError, match=r"call_through: module must be .* got str"):
        call_through("model", print)
    with pytest.raises(TypeError, match=r"call_through: function must be callable, got int"):
        call_through(nn.Linear(1, 1), 3)


class Config:
    def __init__(self, model_type="llama", **numbers):
        self.model_type = model_type
        self.__dict__.update(numbers)


class Outer(Config):
    """Of a model of images and text."""

    def __init__(self, model_type, text):
        super().__init__(model_type)
        self.text = text

    def get_text_config(self):
        return self.text


class Model(nn.Module):
    def __init__(self, config, head):
        super().__init__()
        self.config = config
        self.head = head

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(
    ("config", "scale", "softcap"),
    [
        (Config(), 1.0, None),
        (Config("cohere2", logit_scale=0.0625), 0.0625, None),
        (Config("granitemoe", logits_scaling=8.0), 0.125, None),
        (Config("hyperclovax", logits_scaling=8.0), 8.0, None),
        (Config("minicpm3", logits_scaling=10.0), 0.1, None),
        (Config("falcon_h1", lm_head_multiplier=0.5), 0.5, None),
        (Config("gemma2", final_logit_softcapping=30.0), 1.0, 30.0),
        (Config("recurrent_gemma", logits_soft_cap=20.0), 1.0, 20.0),
        (Config("xlstm", output_logit_soft_cap=30.0), 1.0, 30.0),
        (Config("inkling_text", logits_mup_width_multiplier=4.0), 0.25, None),
        (Config("muse_glimmer", output_multiplier=0.5, final_logit_softcapping=2.0), 0.5, 2.0),
        (Outer("aya_vision", Config("cohere", logit_scale=0.0625)), 1.0, None),
        (Outer("granite4_vision", Config("granite", logits_scaling=8.0)), 0.125, None),
    ],
)
def test_lm_head_has_scale_and_softcap(config, scale, softcap):
    layer = nn.Linear(2, 3, bias=False)
    found = lm_head(nn.DataParallel(Model(config, layer)))
    assert found.module is layer
    assert found.weight is layer.weight
    assert found.bias is None
    assert found.logit_scale == pytest.approx(scale)
    assert found.logit_softcap == softcap
    assert found.is_plain


def test_lm_head_of_odd_models():
    with pytest.raises(TypeError, match=r"lm_head: model must have an output layer"):
        lm_head(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"lm_head: model must be a torch.nn.Module, got int"):
        lm_head(3)
    with pytest.raises(ValueError, match=r"lm_head: logits_scaling .* got 'novel'"):
        lm_head(Model(Config("novel", logits_scaling=2.0), nn.Linear(1, 1)))

    class Adapted(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    assert not lm_head(Model(Config(), Adapted(1, 1))).is_plain
    assert not lm_head(Model(Config(), nn.Sequential())).is_plain


def test_normalizer():
    labels = torch.tensor([[1, -100, 3], [4, 5, 6]])
    assert normalizer(labels).item() == 3
    assert normalizer(labels, shift=False).item() == 5
    assert normalizer([labels, labels[:1]], accumulate=2).item() == 2
    assert normalizer(torch.full((1, 3), -100)).item() == 1  # an empty step is 0, not NaN
    assert normalizer(labels, ignore_index=6).item() == 3
    for bad in (torch.ones(1, 2), torch.ones(1, 2).bool(), torch.tensor(3), [[1, 2]]):
        with pytest.raises(TypeError, match=r"normalizer: labels must be integers"):
            normalizer(bad)
    with pytest.raises(TypeError, match=r"normalizer: labels must be a tensor or a seq.*got int"):
        normalizer(3)
    with pytest.raises(TypeError, match=r"normalizer: shift must be True or False, got str"):
        normalizer(labels, shift="no")
    with pytest.raises(TypeError, match=r"normalizer: ignore_index must be an integer, got None"):
        normalizer(labels, ignore_index=None)
    with pytest.raises(ValueError, match=r"normalizer: accumulate must be 1 or more, got 0"):
        normalizer(labels, accumulate=0)
    with pytest.raises(ValueError, match=r"normalizer: labels must be one tensor or more"):
        normalizer([])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"tail": "none"}, "tail must be one of"),
        ({"head": "linear"}, "head must be one of fused, logits"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"label_weight": -1.0}, "label_weight must not be negative"),
        ({"stored_temperature": 0}, "stored_temperature must be positive"),
        ({"chunk_size": 0}, "chunk_size must be 1 or more"),
        ({"chunk_size": 2.5}, "chunk_size must be an integer, got float"),
        ({"temperature": "2"}, "temperature must be a number, got str"),
        ({"beta": None}, "beta must be a number, got NoneType"),
        ({"label_weight": "0"}, "label_weight must be a number, got str"),
        ({"square_temperature": "no"}, "square_temperature must be True or False, got str"),
    ],
)
def test_options_are_checked(option, message):
    with pytest.raises((ValueError, TypeError), match=rf"^KDOptions: {message}"):
        KDOptions(**option)
