"""Converted models saved and loaded with their learners."""

import json
import pickle

import pytest
import torch

from fastkd import acm
from fastkd.acm import _pretrained

transformers = pytest.importorskip("transformers", reason="acm.from_pretrained needs transformers")
nn = torch.nn

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(tied=False):
    config = transformers.LlamaConfig(
        vocab_size=31, intermediate_size=32, tie_word_embeddings=tied, **SIZES
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=31, n_embd=16, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def bert():
    config = transformers.BertConfig(vocab_size=31, intermediate_size=32, **SIZES)
    return transformers.BertForMaskedLM(config)


def made(make, seed=0, **options):
    torch.manual_seed(seed)
    model = acm.convert(make(), **{"num_learners": 3, **options}).eval()
    with torch.no_grad():
        for module in acm.layers(model).values():
            module.gate.price.fill_(0.01)
            module.w2.normal_()
    return model


IDS = torch.arange(12).view(2, 6)


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
    with torch.no_grad():
        assert torch.equal(one(IDS).logits, other(IDS).logits)
    assert list(acm.layers(one)) == list(acm.layers(other))
    assert acm.settings(one) == acm.settings(other)
    assert type(one) is type(other)


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gpt2, bert])
@pytest.mark.parametrize("keep_original", [True, False])
def test_saved_and_loaded(tmp_path, make, keep_original):
    model = made(make, keep_original=keep_original, gate_depth=2, gate_hidden=5)
    model.save_pretrained(tmp_path)
    again = acm.from_pretrained(type(model), tmp_path)
    same(model, again)
    assert not again.training
    for module in acm.layers(again).values():
        assert (module.original is not None) == keep_original
    again.save_pretrained(tmp_path / "again")  # and once more
    same(model, acm.from_pretrained(type(model), tmp_path / "again"))
    pickle.loads(pickle.dumps(again))


def test_originals_that_were_dropped(tmp_path):
    model = made(llama)
    for module in acm.layers(model).values():
        module.original = None
    assert [x["keep_original"] for x in acm.settings(model)] == [False]
    model.save_pretrained(tmp_path)
    same(model, acm.from_pretrained(transformers.LlamaForCausalLM, tmp_path))


@pytest.mark.parametrize("known", [True, False])
def test_originals_that_were_dropped_of_some_modules(tmp_path, monkeypatch, known):
    """Also where the names in the files are not known before they are read."""
    if not known:
        monkeypatch.setattr(_pretrained, "_saved_names", lambda folder: None)
    model = made(llama)
    model.model.layers[0].mlp.original = None
    assert [(x["select"], x["keep_original"]) for x in acm.settings(model)] == [
        (["model.layers.1.mlp"], True),
        (["model.layers.0.mlp"], False),
    ]
    model.save_pretrained(tmp_path)
    again = acm.from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    same(model, again)
    new = llama()
    for arguments in acm.settings(model):
        acm.convert(new, **arguments)
    new.load_state_dict(model.state_dict())


def test_a_part_that_was_converted(tmp_path):
    torch.manual_seed(0)
    model = llama().eval()
    acm.convert(model.model, select=["layers.0.mlp"], num_learners=3)
    acm.convert(model, select=["model.layers.1.mlp"], num_learners=2)
    assert [x["select"] for x in acm.settings(model)] == [
        ["model.layers.1.mlp"],
        ["model.layers.0.mlp"],
    ]
    model.save_pretrained(tmp_path)
    again = acm.from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    assert [x.num_learners for x in acm.layers(again).values()] == [3, 2]
    assert sorted(again.state_dict()) == sorted(model.state_dict())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_part_with_a_configuration_of_its_own(tmp_path):
    sizes = {**SIZES, "intermediate_size": 32, "projection_dim": 16}
    text = transformers.CLIPTextConfig(vocab_size=31, eos_token_id=2, **sizes)
    vision = transformers.CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    config = transformers.CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    acm.convert(model.vision_model, num_learners=3)
    model.save_pretrained(tmp_path)
    again = acm.from_pretrained(transformers.CLIPModel, tmp_path)
    assert list(acm.layers(again)) == [f"vision_model.encoder.layers.{i}.mlp" for i in range(2)]
    pixels = torch.randn(1, 3, 8, 8)
    found, right = (x.vision_model(pixels).pooler_output for x in (again, model))
    assert torch.equal(found, right)


@pytest.mark.parametrize("known", [True, False])
def test_another_class_of_model(tmp_path, monkeypatch, known):
    if not known:
        monkeypatch.setattr(_pretrained, "_saved_names", lambda folder: None)
    model = made(llama)
    model.save_pretrained(tmp_path / "head")
    base = acm.from_pretrained(transformers.LlamaModel, tmp_path / "head")
    assert list(acm.layers(base)) == ["layers.0.mlp", "layers.1.mlp"]
    right = model.model(IDS).last_hidden_state
    assert torch.equal(base(IDS).last_hidden_state, right)
    base.save_pretrained(tmp_path / "base")
    again = acm.from_pretrained(transformers.LlamaForCausalLM, tmp_path / "base")
    assert torch.equal(again.model(IDS).last_hidden_state, right)
    assert list(acm.layers(again)) == list(acm.layers(model))
    with pytest.raises(
        ValueError, match=r"model_class must have .* 'model.layers.0.mlp', got Bert"
    ):
        acm.from_pretrained(
            transformers.BertModel, tmp_path / "head", config=_bert_config(model.config)
        )


def _bert_config(converted):
    config = transformers.BertConfig(vocab_size=31, intermediate_size=32, **SIZES)
    config.fastkd_acm = converted.fastkd_acm
    return config


def test_two_parts_with_modules_of_one_name(tmp_path, monkeypatch):
    """Which of them was converted is in the files, or nowhere."""
    config = transformers.T5Config(
        vocab_size=31, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    name = "block.0.layer.0.SelfAttention.q"
    acm.convert(model.encoder, kinds=["linear"], select=[name])
    model.config.fastkd_acm = model.encoder.config.fastkd_acm
    model.save_pretrained(tmp_path)
    again = acm.from_pretrained(type(model), tmp_path)
    assert list(acm.layers(again)) == [f"encoder.{name}"]
    monkeypatch.setattr(_pretrained, "_saved_names", lambda folder: None)
    with pytest.raises(ValueError, match=r"a part of the model was converted, and .* in it may be"):
        acm.from_pretrained(type(model), tmp_path)


def test_a_later_conversion_replaces_an_earlier_one(tmp_path):
    """A plain model of a converted one's configuration, which still has that conversion."""
    made(llama).save_pretrained(tmp_path / "one")
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "one")
    model = acm.convert(plain, num_learners=2).eval()
    model.save_pretrained(tmp_path / "two")
    same(model, acm.from_pretrained(transformers.LlamaForCausalLM, tmp_path / "two"))


def test_loading_info(tmp_path):
    model = made(llama)
    model.model.layers[0].mlp.original = None
    model.save_pretrained(tmp_path)
    again, info = acm.from_pretrained(
        transformers.LlamaForCausalLM, tmp_path, output_loading_info=True
    )
    same(model, again)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_auto_classes_dtypes_and_files_in_parts(tmp_path):
    model = made(llama).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = acm.from_pretrained(transformers.AutoModelForCausalLM, tmp_path, dtype=torch.bfloat16)
    same(model, again)
    wide = acm.from_pretrained(transformers.AutoModelForCausalLM, tmp_path, dtype=torch.float32)
    assert next(iter(acm.layers(wide).values())).w1.dtype == torch.float32


def test_two_conversions_and_selected_modules(tmp_path):
    torch.manual_seed(0)
    model = acm.convert(llama(), select=lambda name, module: ".1." in name)
    acm.convert(
        model, kinds=("linear",), select=["model.layers.0.self_attn.q_proj"], num_learners=2
    )
    model.eval()
    assert list(acm.layers(model)) == ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp"]
    assert [x["select"] for x in acm.settings(model)] == [
        ["model.layers.1.mlp"],
        ["model.layers.0.self_attn.q_proj"],
    ]
    model.save_pretrained(tmp_path)
    same(model, acm.from_pretrained(transformers.LlamaForCausalLM, tmp_path))


def test_a_loaded_model_trains(tmp_path):
    made(llama).save_pretrained(tmp_path)
    model = acm.from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    with torch.no_grad(), acm.calls(model, originals=True) as calls:
        model(IDS)
    acm.phase1_loss(calls).backward()
    assert all(module.w1.grad.any() for module in acm.layers(model).values())


def test_plain_state_dictionaries(tmp_path):
    def plain():
        torch.manual_seed(0)
        mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        return nn.Sequential(nn.LayerNorm(8), mlp)

    for make in (plain, lambda: plain()[1]):  # the second is itself replaced
        model = acm.convert(make(), num_learners=2, min_choice=1)
        saved = {"acm": acm.settings(model), "state": model.state_dict()}
        assert json.loads(json.dumps(saved["acm"])) == saved["acm"]
        torch.save(saved, tmp_path / "model.pt")
        saved, new = torch.load(tmp_path / "model.pt"), make()
        for arguments in saved["acm"]:
            new = acm.convert(new, **arguments)
        new.load_state_dict(saved["state"])
        x = torch.randn(3, 8)
        with torch.no_grad():
            assert torch.equal(model.eval()(x), new.eval()(x))


def test_errors(tmp_path):
    llama().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"must say how the model was converted .*fastkd_acm.*none"
    ):
        acm.from_pretrained(transformers.LlamaForCausalLM, tmp_path)
    with pytest.raises(TypeError, match=r"model_class must be a model's class of .* got Linear"):
        acm.from_pretrained(nn.Linear, tmp_path)
    with pytest.raises(ValueError, match=r"acm.settings: model was not converted, got Llama"):
        acm.settings(llama())
    with pytest.raises(ValueError, match=r"acm.convert: select must name .* got 'model.layers.7"):
        acm.convert(llama(), select=["model.layers.0.mlp", "model.layers.7.mlp"])
    with pytest.raises(ValueError, match="nothing of kinds mlp to replace"):
        acm.convert(llama(), select=["lm_head"])
    with pytest.raises(TypeError, match="select must be a function or names, got str"):
        acm.convert(llama(), select="lm_head")
