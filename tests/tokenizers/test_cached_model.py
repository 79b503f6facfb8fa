"""CachedModel: a causal language model with its key-value cache, against the model without one."""

import copy
import pickle
import random
import warnings

import pytest
import smollm2
import torch

import fastkd
from fastkd import ByteStream, ByteVocab
from fastkd.tokenizers import CachedModel

transformers = pytest.importorskip("transformers", reason="CachedModel needs transformers")

VOCAB, BOS = 257, 256
SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "bos_token_id": BOS}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32}
POSITIONS = {"max_position_embeddings": 64}


def llama(**more):
    config = transformers.LlamaConfig(**SMALL, **HEADS, **POSITIONS, **more)
    return transformers.LlamaForCausalLM(config)


def mistral():
    config = transformers.MistralConfig(**SMALL, **HEADS, **POSITIONS, head_dim=8, sliding_window=6)
    return transformers.MistralForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=BOS
    )
    return transformers.GPT2LMHeadModel(config)


def mamba():
    config = transformers.MambaConfig(**SMALL, state_size=4, eos_token_id=0)
    return transformers.MambaForCausalLM(config)


def uncached():
    config = transformers.OpenAIGPTConfig(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=BOS
    )
    return transformers.OpenAIGPTLMHeadModel(config)


def made(make, seed=0, **more):
    torch.manual_seed(seed)
    return make(**more).eval()


@pytest.fixture
def quiet():
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def plain(model, ids, prefix=(BOS,)):
    with torch.no_grad():
        return model(input_ids=torch.tensor([[*prefix, *ids]])).logits[0, -1]


def texts(seed=0, count=60):
    """Texts that grow, change their last tokens, go back, repeat and begin anew."""
    draw, text = random.Random(seed), []
    for _ in range(count):
        kind = draw.randrange(6)
        if kind == 0:
            text = text[: draw.randrange(len(text) + 1)]
        elif kind == 1:
            text = [*text[:-1], draw.randrange(256)]
        elif kind == 2 and draw.randrange(3) == 0:
            text = []
        elif kind > 2:
            text = [*text, *(draw.randrange(256) for _ in range(draw.randrange(1, 4)))]
        text = text[:40]
        yield list(text)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_logits_are_the_models(make, dtype, quiet):
    model = made(make).to(dtype)
    cached, total = CachedModel(model), 0
    for ids in texts():
        found = cached(ids)
        total += len(ids) + 1
        assert found.dtype == dtype
        assert found.shape == (VOCAB,)
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 0.02}[dtype]
        torch.testing.assert_close(found, plain(model, ids), atol=tolerance, rtol=tolerance)
    assert cached.computed < total / 3


def test_only_new_tokens_are_computed(quiet):
    cached = CachedModel(made(llama))
    for ids, computed in (
        ([1, 2, 3], 4),
        ([1, 2, 3, 4], 1),
        ([1, 2, 3, 5], 1),  # one back, one anew
        ([1, 2], 1),  # a beginning: its last token again
        ([1, 2], 1),
        ([7, 2], 2),
        ([], 1),
        ([1, 2, 3, 4, 5], 5),
    ):
        before = cached.computed
        cached(ids)
        assert cached.computed - before == computed, ids


def test_a_sliding_window_that_has_moved_on():
    """Within the window the cache is cut; beyond it texts are computed anew, with a warning."""
    model = made(mistral)
    cached = CachedModel(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached([1, 2, 3])
        cached([1, 2, 4])
        cached([1, 2, 3, 4, 5, 6, 7, 8, 9])
    with pytest.warns(UserWarning, match="the cache of MistralForCausalLM cannot be cut; texts"):
        cached([1, 2, 3, 4, 5, 6, 7, 8, 1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        for ids in texts(1):
            torch.testing.assert_close(cached(ids), plain(model, ids), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", [mamba, uncached])
def test_models_whose_cache_cannot_be_cut(make):
    model = made(make).double()
    cached = CachedModel(model)
    if make is mamba:
        cached([1, 2, 3])
    with pytest.warns(UserWarning, match=r"CachedModel: .*; texts are computed from their"):
        cached([1, 2, 4])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="CachedModel")
        for ids in texts(2, 30):
            torch.testing.assert_close(cached(ids), plain(model, ids))
    if make is mamba:  # its state goes on, though it does not go back: by several tokens, too
        cached.clear()
        cached([1, 2, 3])
        before = cached.computed
        torch.testing.assert_close(cached([1, 2, 3, 4, 5]), plain(model, [1, 2, 3, 4, 5]))
        assert cached.computed == before + 2


def test_a_stream_gets_the_same_distribution():
    model = made(llama)
    tokens = [bytes([i]) for i in range(200)] + [b"the", b"he", b" th", b"ca", b"at", b"cat"] * 9
    vocab = ByteVocab([*tokens[:256], None])
    text = b" the cat"
    with torch.no_grad():
        streams = [
            ByteStream(call, vocab, text, max_covers=6)
            for call in (CachedModel(model), lambda ids: plain(model, ids))
        ]
        for byte in b" that":
            found, expected = (x.next_byte_log_probs() for x in streams)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            for stream in streams:
                stream.push(byte)
    assert streams[0].log_prob(b"he") == pytest.approx(streams[1].log_prob(b"he"), abs=1e-4)


def test_prefixes():
    model = made(llama)
    for prefix in ((), (3, 4), [3], torch.tensor([3, 4])):
        cached = CachedModel(model, prefix=prefix)
        expected = plain(model, [1, 2], torch.as_tensor(prefix).tolist())
        torch.testing.assert_close(cached([1, 2]), expected)
    torch.testing.assert_close(CachedModel(model, prefix=7)([]), plain(model, [], [7]))
    with pytest.raises(ValueError, match="ids must not be empty without a prefix"):
        CachedModel(model, prefix=())([])
    assert (
        repr(CachedModel(model)) == "CachedModel(LlamaForCausalLM, prefix=[256], 0 tokens cached)"
    )


def test_copies_and_pickles_have_no_cache():
    model = made(llama)
    cached = CachedModel(model)
    expected = cached([1, 2, 3])
    for other in (copy.copy(cached), pickle.loads(pickle.dumps(cached)), copy.deepcopy(cached)):
        before = other.computed
        torch.testing.assert_close(other([1, 2, 3]), expected)
        assert other.computed == before + 4
    assert copy.copy(cached).model is model
    before = cached.computed
    cached([1, 2, 3, 4])
    assert cached.computed == before + 1  # no copy has touched its cache


def test_an_error_in_the_model_leaves_no_trace():
    model = made(llama)
    cached = CachedModel(model)
    cached([1, 2, 3])
    hook = model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cached([1, 2, 3, 4, 5])
    hook.remove()
    torch.testing.assert_close(cached([1, 2, 3, 6]), plain(model, [1, 2, 3, 6]))


def test_weights_that_change():
    model = made(llama)
    cached = CachedModel(model)
    cached([1, 2, 3])
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.normal_()
    cached.clear()
    torch.testing.assert_close(cached([1, 2, 3]), plain(model, [1, 2, 3]))
    model.train()
    with pytest.raises(ValueError, match="model must be in eval mode"):
        cached([1])


def test_errors():
    model = made(llama)
    for bad, error, message in (
        (torch.nn.Linear(2, 2), TypeError, "causal language model of transformers, got Linear"),
        (lambda ids: ids, TypeError, "got function"),
        (made(llama).train(), ValueError, "training mode"),
    ):
        with pytest.raises(error, match=f"CachedModel: model must be .*{message}"):
            CachedModel(bad)
    t5 = transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with pytest.raises(TypeError, match="encoder-decoder T5ForConditionalGeneration"):
        CachedModel(transformers.T5ForConditionalGeneration(t5).eval())
    for options, error, message in (
        ({"prefix": 257}, IndexError, r"prefix must lie in \[0, 257\), got 257"),
        ({"prefix": [-1]}, IndexError, "prefix must lie in"),
        ({"prefix": "ab"}, TypeError, "prefix must hold integers"),
        ({"prefix": [[1]]}, ValueError, r"prefix must be \[length\], got shape \[1, 1\]"),
        ({"max_length": 0}, ValueError, "max_length must be 1 or more, got 0"),
        ({"max_length": 2.5}, TypeError, "max_length must be an integer, got float"),
    ):
        with pytest.raises(error, match=f"CachedModel: {message}"):
            CachedModel(model, **options)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no bos_token_id"):
        CachedModel(made(lambda: llama_without_bos()))
    cached = CachedModel(model)
    for ids, error, message in (
        ([1, 257], IndexError, r"ids must lie in \[0, 257\), got 257"),
        ([1.5], TypeError, "ids must hold integers, got float64"),
        (torch.zeros(1, 2, dtype=torch.int64), ValueError, r"ids must be \[length\]"),
        ([1] * 64, ValueError, "ids must have at most 64 tokens .* got 65"),
    ):
        with pytest.raises(error, match=f"CachedModel: {message}"):
            cached(ids)
    cached([1] * 63)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "LoraConfig"])
def test_peft(kind):
    """With learned prompts, which PEFT puts before whatever tokens are new."""
    peft = pytest.importorskip("peft")
    more = (
        {"r": 2, "init_lora_weights": False} if kind == "LoraConfig" else {"num_virtual_tokens": 3}
    )
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **more)
    model = peft.get_peft_model(made(llama), config).double().eval()
    cached, some = CachedModel(model), [*texts(3, 30)]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore" if kind != "LoraConfig" else "error", message="CachedModel"
        )
        for ids in some:
            torch.testing.assert_close(cached(ids), plain(model, ids))


ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32,
}  # fmt: skip


def t5_encoder():
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=VOCAB, **sizes))


def of_bert(name, **options):
    return lambda: getattr(transformers, name)(transformers.BertConfig(**ENCODER, **options))


def of_llama(name):
    config = transformers.LlamaConfig(**SMALL, **HEADS, **POSITIONS, pad_token_id=0, num_labels=3)
    return lambda: getattr(transformers, name)(config)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (of_llama("LlamaModel"), "return logits, .* got LlamaModel, which returns none"),
        (t5_encoder, "return logits, .* got T5EncoderModel, which returns none"),
        (of_bert("BertModel"), "return logits, .* got BertModel, which returns none"),
        (
            of_llama("LlamaForSequenceClassification"),
            r"over the vocabulary, \[1, 8, 257\] for 8 tokens, got \[1, 3\] of LlamaForSequenceC",
        ),
        (of_llama("LlamaForTokenClassification"), r"got \[1, 8, 3\] of LlamaForTokenClassif"),
        (of_bert("BertForMaskedLM"), "be causal, got BertForMaskedLM, whose logits of a"),
        (of_bert("BertLMHeadModel"), "be causal, got BertLMHeadModel"),
        (of_bert("BertLMHeadModel", initializer_range=1e-3), "be causal, got BertLMHeadModel"),
        (of_bert("BertLMHeadModel", initializer_range=0.5), "be causal, got BertLMHeadModel"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_models_that_are_no_causal_language_models(make, message, dtype):
    with pytest.raises(TypeError, match=f"^CachedModel: model must .*{message}"):
        CachedModel(made(make).to(dtype), prefix=())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_encoder_in_any_mode(mode):
    """And whose embedding is called twice, so that values alone tell."""
    model = made(of_bert("BertLMHeadModel")).half()
    with mode(), pytest.raises(TypeError, match=r"must be causal, .* have derivatives by later"):
        CachedModel(model, prefix=())
    assert not model.get_input_embeddings()._forward_hooks
    twice = made(of_bert("BertLMHeadModel", initializer_range=0.5))

    def call(*_):
        twice.get_input_embeddings()(torch.tensor([0]))

    twice.register_forward_pre_hook(call)
    with pytest.raises(TypeError, match=r"must be causal, .* change with later"):
        CachedModel(twice, prefix=())


@pytest.mark.parametrize(
    "make", [llama, mistral, gpt2, mamba, uncached, of_bert("BertLMHeadModel", is_decoder=True)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore:CachedModel. OpenAIGPTLMHeadModel returns no key-value cache")
def test_causal_models_are_taken(make, dtype):
    cached = CachedModel(made(make).to(dtype), prefix=(), max_length=None)
    assert cached.computed == 0
    assert not cached([1, 2, 3]).requires_grad


def test_a_short_context():
    """The texts that tell whether the model is causal fit."""
    model = made(gpt2)
    for longest in (1, 2):
        cached = CachedModel(model, prefix=(), max_length=longest)
        torch.testing.assert_close(cached([5]), plain(model, [5], ()))


def llama_without_bos():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, "bos_token_id": None}, **HEADS)
    )


@pytest.mark.slow
def test_a_real_model():
    """SmolLM2's stream is the same, and computes few tokens more than the text has."""
    tokenizer, model = smollm2.load()

    def encode(text):
        return tokenizer.backend_tokenizer.encode(text.decode(), add_special_tokens=False).ids

    vocab = ByteVocab.from_tokenizer(tokenizer)
    prompt, text = b"They live in France, in the city of Par", b"is, near the river"
    cached, calls = CachedModel(model, prefix=0), []

    def alone(ids):
        calls.append(len(ids) + 1)
        return plain(model, ids, (0,))

    found = []
    for call in (cached, alone):
        stream = ByteStream(call, vocab, prompt, encode=encode, tolerance=1e-3)
        found.append((stream.next_byte_log_probs(), stream.log_prob(text)))
    torch.testing.assert_close(found[0][0].exp(), found[1][0].exp(), atol=1e-4, rtol=1e-3)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-3)
    assert cached.computed < sum(calls) / 5
    assert fastkd.tokenizers.CachedModel is CachedModel
