"""nn.ACM, nn.ACMGate, acm.convert: sizes, what is found and replaced, the three phases, budgets."""

import copy
from collections import OrderedDict, UserDict

import pytest
import torch
from torch import nn

import fastkd
from fastkd.acm import convert


def mlp(width=8, hidden=12, act=nn.GELU):
    return nn.Sequential(nn.Linear(width, hidden), act(), nn.Linear(hidden, width))


class Block(nn.Module):
    """A residual MLP with names as in Llama, and a projection beside it."""

    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.mlp = Gated(width, hidden)

    def forward(self, x):
        x = x + self.o_proj(x)
        return x + self.mlp(self.norm(x))


class Gated(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Model(nn.Module):
    def __init__(self, blocks=2, width=8, classes=3):
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(blocks)])
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def test_sizes_of_the_paper():
    acm = fastkd.nn.ACM.from_linear(nn.Linear(768, 768))
    assert acm.w1.shape == (4, 768, 96)
    assert (acm.activation, acm.gate.min_choice, acm.bias) == ("identity", 1, None)
    acm = fastkd.nn.ACM.from_mlp(mlp(768, 3072))
    assert acm.w1.shape == (4, 768, 768)
    assert (acm.activation, acm.gate.min_choice, acm.cost) == ("gelu", 0, 768 * 1536)
    acm = fastkd.nn.ACM.from_linear(nn.Linear(20, 6, dtype=torch.float64), 2, min_choice=0)
    parameters = sum(p.numel() for p in (acm.w1, acm.b1, acm.w2))
    assert abs(parameters - 21 * 6) <= 2 * (20 + 6 + 1) / 2
    assert acm.w2.dtype == torch.float64
    assert fastkd.nn.ACM.from_mlp(Gated(8, 13), 4).w1.shape == (4, 8, 3)
    assert fastkd.nn.ACM.from_linear(nn.Linear(2, 1), 64).w1.shape == (64, 2, 1)


def test_module_runs_its_gate():
    acm, x = fastkd.nn.ACM(8, 5, num_learners=3, width=4, bias=True), torch.randn(2, 9, 8)
    operands = (x, acm.w1, acm.b1, acm.w2)
    acm.eval()
    choices = acm.gate.choices(x)
    assert torch.equal(acm.gate(x).argmax(-1), choices)
    assert torch.equal(acm(x), fastkd.acm.hard(*operands, choices, bias=acm.bias))
    given = torch.randint(0, 4, (2, 9))
    assert torch.equal(acm(x, given), fastkd.acm.hard(*operands, given, bias=acm.bias))
    acm.train()
    torch.manual_seed(5)
    found = acm(x)
    torch.manual_seed(5)
    gates = acm.gate(x)
    assert torch.equal(found, fastkd.acm.soft(*operands, gates) + acm.bias)
    torch.testing.assert_close(found, fastkd.acm.hard(*operands, gates.argmax(-1), bias=acm.bias))
    found.square().sum().backward()
    assert all(p.grad.any() for p in acm.parameters())
    assert fastkd.nn.ACM(8, width=4, gate=False)(x).shape == x.shape


def test_gate_of_any_depth():
    for depth in (1, 3):
        gate = fastkd.nn.ACMGate(8, 4, depth=depth, min_choice=2)
        assert sum(isinstance(layer, nn.Linear) for layer in gate.layers) == depth
        gates = gate(torch.randn(50, 8))
        assert not gates[:, :2].any()
        assert gate.choices(torch.randn(50, 8)).min() >= 2
    for options, message in (
        ({"num_learners": 0}, "num_learners must be at least 1, got 0"),
        ({"num_learners": 4, "min_choice": 5}, r"min_choice must lie in \[0, N = 4\], got 5"),
        ({"num_learners": 4, "depth": 0}, "depth must be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"ACMGate: {message}"):
            fastkd.nn.ACMGate(8, **options)
    with pytest.raises(ValueError, match="ACM: width must be at least 1, got 0"):
        fastkd.nn.ACM(8, width=0)
    with pytest.raises(TypeError, match=r"ACM\.from_mlp: mlp must be .*got Linear"):
        fastkd.nn.ACM.from_mlp(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"ACM\.from_linear: linear must be .*got GELU"):
        fastkd.nn.ACM.from_linear(nn.GELU())


def test_module_under_autocast():
    acm, x = fastkd.nn.ACM(8, width=4), torch.randn(30, 8)
    for training in (True, False):
        acm.train(training)
        with torch.autocast("cpu", torch.bfloat16):
            out = acm(x)
        assert out.dtype == torch.bfloat16
    acm.train()
    with torch.autocast("cpu", torch.bfloat16):
        acm(x).sum().backward()
    assert acm.w1.grad.dtype == torch.float32


def test_module_compiles():
    acm, x = fastkd.nn.ACM(8, width=4).eval(), torch.randn(30, 8)
    run = torch.compile(acm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), acm(x))
    acm.train()
    run(x).sum().backward()
    assert acm.gate.layers[0].weight.grad.any()


def test_what_is_found():
    model = convert(Model())
    assert list(fastkd.acm.layers(model)) == ["blocks.0.mlp", "blocks.1.mlp"]
    model = convert(Model(), kinds=("linear",))
    assert list(fastkd.acm.layers(model)) == ["blocks.0.o_proj", "blocks.1.o_proj", "head"]
    model = convert(Model(), kinds=("mlp", "linear"), select=lambda name, _: "1" in name)
    assert list(fastkd.acm.layers(model)) == ["blocks.1.o_proj", "blocks.1.mlp"]
    assert fastkd.acm.layers(model)["blocks.1.o_proj"].gate.min_choice == 1
    assert fastkd.acm.layers(model)["blocks.1.mlp"].gate.min_choice == 0
    assert isinstance(convert(nn.Linear(4, 4), kinds=("linear",)), fastkd.nn.ACM)
    assert isinstance(convert(nn.Sequential(*mlp(), nn.Dropout())), fastkd.nn.ACM)
    again = convert(Model())
    with pytest.raises(ValueError, match=r"acm\.convert: nothing of kinds mlp to replace in Model"):
        convert(again)
    with pytest.raises(ValueError, match="to replace in Model that select agrees to"):
        convert(Model(), select=lambda name, module: False)
    with pytest.raises(ValueError, match="kinds must be of mlp, linear; got 'conv'"):
        convert(Model(), kinds=("conv",))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
        nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4), nn.Softmax(-1)),
        nn.Sequential(OrderedDict(fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 6), fc3=nn.Linear(6, 2))),
        nn.ModuleDict({"fc1": nn.Linear(4, 8), "fc2": nn.Linear(8, 6), "fc3": nn.Linear(6, 2)}),
        nn.MultiheadAttention(8, 2),
        nn.TransformerEncoderLayer(8, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_mlp(module):
    with pytest.raises(ValueError, match=r"acm\.convert: nothing of kinds mlp"):
        convert(nn.ModuleList([module]))


def test_shared_modules_stay_shared():
    shared = mlp()
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared]), "c": shared})
    model = convert(model)
    assert model["a"] is model["b"][0] is model["c"]
    assert list(fastkd.acm.layers(model)) == ["a"]


def test_state_dict_round_trip():
    first = convert(Model(), kinds=("mlp", "linear"), gate_depth=2)
    fastkd.acm.layers(first)["head"].gate.price.fill_(0.5)
    second = convert(Model(), kinds=("mlp", "linear"), gate_depth=2)
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 5, 8)
    assert torch.equal(first.eval()(x), second.eval()(x))
    assert torch.equal(copy.deepcopy(first)(x), first(x))
    for module in fastkd.acm.layers(first).values():
        module.original = None
    assert not any("original" in name for name in first.state_dict())
    third = convert(Model(), kinds=("mlp", "linear"), gate_depth=2, keep_original=False)
    third.load_state_dict(first.state_dict())
    assert torch.equal(third.eval()(x), second(x))


def test_originals_run_as_they_were():
    model = Model()
    x = torch.randn(4, 5, 8)
    expected = model(x)
    convert(model, kinds=("mlp", "linear"))
    with fastkd.acm.calls(model, originals=True) as calls:
        assert torch.equal(model(x), expected)
    assert [call.name for call in calls][:2] == ["blocks.0.o_proj", "blocks.0.mlp"]
    assert len(calls) == 5
    for call in calls:
        assert torch.equal(call.module.original(call.input), call.output)
        assert call.gates is None
        assert not call.output.requires_grad
    assert not torch.equal(model(x), expected)
    fastkd.acm.layers(model)["head"].original = None
    with pytest.raises(ValueError, match=r"acm\.calls: head has dropped its original"):
        fastkd.acm.calls(model, originals=True).__enter__()
    with (
        pytest.raises(ValueError, match="model has no ACM, got Linear"),
        fastkd.acm.calls(nn.Linear(2, 2)),
    ):
        pass


def test_three_phases_and_a_budget():
    """Learners come to imitate, gates to tell easy rows from hard ones, and the task is learned."""
    torch.manual_seed(1)
    model, x = Model(blocks=1, width=16), torch.randn(16, 8, 16)
    with torch.no_grad():
        for parameter in model.blocks[0].mlp.parameters():
            parameter.mul_(3)
    expected = model(x).detach()
    convert(model, num_learners=3)
    (module,) = fastkd.acm.layers(model).values()
    with torch.no_grad(), fastkd.acm.calls(model, originals=True) as calls:
        model(x)

    def train(parameters, loss_of, steps, rate):
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[-1]

    learned = (module.w1, module.b1, module.w2)
    first, last = train(learned, lambda: fastkd.acm.phase1_loss(calls), 150, 0.01)
    assert last < 0.7 * first
    assert module.gate.layers[0].weight.grad is None
    every = torch.full(calls[0].input.shape[:-1], 3)
    error = module(calls[0].input, every) - calls[0].output
    assert error.norm() < 0.7 * calls[0].output.norm()

    for rule in ("paper", "code"):
        first, last = train(
            module.gate.parameters(),
            lambda rule=rule: fastkd.acm.phase2_loss(calls, rule=rule, threshold=0.9),
            60,
            0.02,
        )
        assert last < first

    def phase3():
        with fastkd.acm.calls(model) as seen:
            task = (model(x) - expected).square().mean()
        return fastkd.acm.phase3_loss(task, seen, target=0.5, budget_weight=10.0)

    model.train()
    trainable = [p for name, p in model.named_parameters() if "original" not in name]
    train(trainable, phase3, 80, 0.01)
    with fastkd.acm.calls(model) as seen:
        model(x)
    share = (seen[0].gates * torch.arange(4)).sum(-1).mean().item() / 3
    assert abs(share - 0.5) < 0.15

    model.eval()
    for budget in (1.0, 0.6, 0.3, 0.05):
        used = fastkd.acm.set_budget(model, budget, [x[:8], (x[8:],), {"x": x}])
        assert used <= budget
        with fastkd.acm.calls(model) as seen:
            model(x)
        share = (seen[0].gates * torch.arange(4)).sum(-1).mean().item() / 3
        assert share == pytest.approx(used)
        assert used > 0.6 * budget or budget == 1.0
    assert not model.training


def test_phase_losses_by_formula():
    model, x = convert(Model(), kinds=("mlp", "linear")), torch.randn(4, 5, 8)
    with fastkd.acm.calls(model, originals=True) as calls:
        model(x)
    expected, labelled = [], []
    for call in calls:
        m = call.module
        operands = (call.input, m.w1, m.b1, m.w2, call.output)
        losses = fastkd.reference.acm.prefix_loss(*operands, activation=m.activation)
        expected.append(losses.mean())
        labels = fastkd.reference.acm.oracle(*operands, activation=m.activation, rule="code")
        logits = m.gate.logits(call.input)[..., m.gate.min_choice :]
        labels = labels.clamp(min=m.gate.min_choice) - m.gate.min_choice
        labelled.append(torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten()))
    torch.testing.assert_close(fastkd.acm.phase1_loss(calls), torch.stack(expected).mean())
    found = fastkd.acm.phase2_loss(calls, rule="code")
    torch.testing.assert_close(found, torch.stack(labelled).mean())
    with fastkd.acm.calls(model) as seen:
        out = model(x)
    found = fastkd.acm.regularizers(
        [call.gates for call in seen], [call.module.cost for call in seen], 0.4
    )
    expected = out.sum() + 0.1 * found.budget + 0.05 * found.entropy + 0.05 * found.diversity
    torch.testing.assert_close(fastkd.acm.phase3_loss(out.sum(), seen, target=0.4), expected)
    for loss in (fastkd.acm.phase1_loss, fastkd.acm.phase2_loss):
        with pytest.raises(ValueError, match="calls is empty"):
            loss([])
    with pytest.raises(ValueError, match=r"acm\.phase3_loss: calls hold no gates"):
        fastkd.acm.phase3_loss(out.sum(), calls, target=0.4)


def test_output_bias_is_part_of_what_learners_need_not_give():
    model = fastkd.nn.ACM(8, width=3, bias=True)
    model.original = nn.Linear(8, 8)
    with torch.no_grad():
        model.original.weight.zero_()
        model.bias.copy_(model.original.bias)
    with fastkd.acm.calls(model, originals=True) as calls:
        model(torch.zeros(3, 8))
    first = fastkd.acm.prefix_loss(calls[0].input, model.w1, model.b1, model.w2, torch.zeros(3, 8))
    torch.testing.assert_close(fastkd.acm.phase1_loss(calls), first.mean())
    fastkd.acm.phase1_loss(calls).backward()
    assert model.bias.grad.any()


def test_budget_errors():
    model = convert(Model(), kinds=("linear",))
    x = torch.randn(5, 8)
    with pytest.raises(ValueError, match=r"budget must lie in \(0, 1\], got 0"):
        fastkd.acm.set_budget(model, 0, [x])
    with pytest.raises(ValueError, match="batches is empty"):
        fastkd.acm.set_budget(model, 0.5, [])
    with pytest.raises(ValueError, match="model has no ACM with an ACMGate"):
        fastkd.acm.set_budget(nn.Linear(2, 2), 0.5, [x])
    with pytest.raises(ValueError, match=r"budget 0\.2 is below the 0\.250 that the least choices"):
        fastkd.acm.set_budget(model, 0.2, [x])
    assert not any(module.gate.price for module in fastkd.acm.layers(model).values())
    assert model.training
    assert fastkd.acm.set_budget(model, 0.25, [x]) == pytest.approx(0.25)


def tiny_models():
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {"input_ids": torch.randint(0, 50, (2, 7))}
    yield (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)
        ),
        ids,
        ["model.layers.0.mlp", "model.layers.1.mlp"],
    )
    yield (
        transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50)),
        ids,
        ["encoder.layer.0.intermediate", "encoder.layer.1.intermediate"],
    )
    yield (
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)
        ),
        ids,
        ["transformer.h.0.mlp", "transformer.h.1.mlp"],
    )
    yield (
        transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)),
        {"pixel_values": torch.randn(2, 3, 8, 8)},
        None,
    )


def test_transformers():
    for model, batch, names in tiny_models():
        model.eval()
        with torch.no_grad():
            expected = model(**batch)[0]
            convert(model)
            layers = fastkd.acm.layers(model)
            assert len(layers) == 2
            assert names is None or list(layers) == names
            assert all(module.w1.shape == (4, 16, module.w1.size(2)) for module in layers.values())
            with fastkd.acm.calls(model, originals=True) as calls:
                assert torch.equal(model(**batch)[0], expected)
        fastkd.acm.phase1_loss(calls).backward()
        fastkd.acm.phase2_loss(calls).backward()
        assert all(p.grad.isfinite().all() for m in layers.values() for p in (m.w1, m.b1, m.w2))
        model.train()
        with fastkd.acm.calls(model) as calls:
            task = model(**batch)[0].square().mean()
        fastkd.acm.phase3_loss(task, calls, target=0.5).backward()
        gradients = [m.gate.layers[0].weight.grad for m in layers.values()]
        assert all(g.isfinite().all() and g.any() for g in gradients)
        assert fastkd.acm.set_budget(model, 0.4, [batch]) <= 0.4


class SplitLayer(nn.Module):
    """An MLP in two halves, as BERT has it."""

    def __init__(self, width=8, hidden=12):
        super().__init__()
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense = nn.Linear(width, hidden)
        self.intermediate.forward = lambda x: nn.functional.gelu(self.intermediate.dense(x))
        self.output.dense = nn.Linear(hidden, width)

    def forward(self, x):
        return self.output.dense(self.intermediate(x))


@pytest.mark.parametrize("training", [False, True])
def test_replacements_take_the_mode_of_what_they_replace(training):
    for inner in (SplitLayer(), mlp(), Gated(8, 12)):
        model = nn.Sequential(nn.LayerNorm(8), inner).train(training)
        convert(model)
        assert {module.training for module in model.modules()} == {training}
    x = torch.randn(50, 8)
    if not training:
        assert torch.equal(model(x), model(x))


def test_rows_of_nan_stay_nan_in_evaluation():
    acm, x = fastkd.nn.ACM(8, num_learners=3, width=4).eval(), torch.randn(5, 8)
    right = acm(x)
    x[2] = torch.nan
    found = acm(x)
    assert acm.gate.choices(x)[2] == 3
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 1, 3, 4]], right[[0, 1, 3, 4]])


def test_a_module_with_parameters_of_its_own_is_no_mlp():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(
        ValueError, match=r"acm\.convert: nothing of kinds mlp to replace in Sequential"
    ):
        convert(nn.Sequential(Scaled()))


def test_a_context_in_a_context():
    model, x = convert(mlp()), torch.randn(3, 8)
    with fastkd.acm.calls(model) as outer:
        model(x)
        with fastkd.acm.calls(model, originals=True) as inner:
            model(x)
        fastkd.acm.set_budget(model, 0.5, [x])
        model(x)
    assert (len(outer), len(inner)) == (2, 1)
    assert model._watch is None


def test_budget_on_mappings_and_on_nothing():
    """A tokenizer's output is a mapping and no dict."""
    model, x = fastkd.nn.ACM(8, width=4), torch.randn(30, 8)
    assert fastkd.acm.set_budget(model, 0.5, [UserDict(x=x)]) <= 0.5
    with pytest.raises(ValueError, match=r"acm\.set_budget: batches hold no rows"):
        fastkd.acm.set_budget(model, 0.5, [x[:0]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fastkd.nn.ACM.from_mlp(mlp(), 0), ValueError, "ACM.from_mlp: num_learners"),
        (
            lambda: fastkd.nn.ACM.from_linear(nn.Linear(3, 3), 0),
            ValueError,
            "ACM.from_linear: num_learners must be at least 1, got 0",
        ),
        (lambda: fastkd.nn.ACM(8, width=4, activation="tanh"), ValueError, "ACM: activation must"),
        (lambda: fastkd.acm.set_budget(mlp(), "a", []), TypeError, "budget must be a number, got"),
        (lambda: fastkd.nn.ACM(8, width=4, activation=1), TypeError, "ACM: activation must be a s"),
        (lambda: fastkd.nn.ACMGate(8, 4, temperature=-1), ValueError, "ACMGate: temperature must"),
        (lambda: fastkd.nn.ACMGate(8, 4, depth=2, hidden=0), ValueError, "ACMGate: hidden must be"),
    ],
)
def test_wrong_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
