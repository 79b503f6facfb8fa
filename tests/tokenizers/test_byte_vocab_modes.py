"""Tables of a vocabulary, made in one mode of PyTorch and used in another."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import fastkd

TOKENS = [b" a", b"ab", b"b", None, b"a"]
CHUNKS = torch.tensor([[-1, 0, 0, 1]] * 2)


def new_vocab():
    return fastkd.ByteVocab(TOKENS, special={"eos": [3]})


def calls(x, vocab):
    """All that uses tables of a vocabulary, with columns that are possible."""
    ids = torch.zeros_like(CHUNKS)
    columns = [97, 98, 257]
    whole = fastkd.byte_log_probs(x, vocab)[..., columns]
    inside = fastkd.byte_log_probs(x, vocab, prefix=b"a")[..., [98, 256]]
    rows = fastkd.byte_log_probs(x, vocab, prefix=[[b"", b"a", b" ", b"a"]] * 2)
    rows = torch.where(rows.isfinite(), rows, 0)
    alm = fastkd.recipes.alm(x, ids, CHUNKS, 2 * x, ids, CHUNKS, 2, vocab, vocab)
    return whole.sum() + inside.sum() + rows.sum() + alm


def scores():
    return torch.randn(2, 4, len(TOKENS) + 2)


def gradient(x, vocab):
    leaf = x.clone().requires_grad_()
    loss = calls(leaf, vocab)
    assert type(loss) is torch.Tensor
    return torch.autograd.grad(loss, leaf)[0]


class Calls(torch.nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.vocab = vocab

    def forward(self, x):
        return calls(x, self.vocab)


def in_inference_mode(x, vocab):
    with torch.inference_mode():
        calls(x, vocab)
        calls(x.clone(), vocab)


def with_fake_tensors(x, vocab):
    with FakeTensorMode() as mode:
        assert isinstance(fastkd.byte_log_probs(mode.from_tensor(x), vocab), FakeTensor)
    fake = mode.from_tensor(x)
    assert isinstance(fastkd.byte_log_probs(fake, vocab), FakeTensor)  # outside of its mode
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert isinstance(calls(mode.from_tensor(x), vocab), FakeTensor)


def exported(strict):
    def run(x, vocab):
        program = torch.export.export(Calls(vocab), (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), calls(x, new_vocab()))

    return run


def traced(mode):
    def run(x, vocab):
        graph = make_fx(lambda x: fastkd.byte_log_probs(x, vocab), tracing_mode=mode)(x)
        assert torch.equal(graph(x), fastkd.byte_log_probs(x, new_vocab()))

    return run


def compiled_in_inference_mode(x, vocab):
    torch._dynamo.reset()
    run = torch.compile(lambda x: calls(x, vocab), fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        run(x)
    leaf = x.clone().requires_grad_()
    found = torch.autograd.grad(run(leaf), leaf)[0]
    torch.testing.assert_close(found, gradient(x, new_vocab()))


def transformed(x, vocab):
    found = torch.func.grad(lambda x: calls(x, vocab))(x)
    torch.testing.assert_close(found, gradient(x, new_vocab()))


def batched(x, vocab):
    torch.func.vmap(lambda x: fastkd.byte_log_probs(x, vocab))(x)


def on_another_default_device(x, vocab):
    with torch.device("meta"):
        fastkd.byte_log_probs(x, vocab)
        assert fastkd.byte_log_probs(x.to("meta"), vocab).is_meta


MODES = {
    "inference": in_inference_mode,
    "fake": with_fake_tensors,
    "export": exported(strict=False),
    "strict export": exported(strict=True),
    **{f"make_fx {mode}": traced(mode) for mode in ("real", "fake", "symbolic")},
    "compiled": compiled_in_inference_mode,
    "grad": transformed,
    "vmap": batched,
    "default device": on_another_default_device,
}


@pytest.mark.parametrize("mode", MODES)
def test_made_in_one_mode_and_used_in_another(mode):
    x, vocab = scores(), new_vocab()
    MODES[mode](x, vocab)
    for tensors in vocab._constants._tensors.values():
        for table in tensors:
            assert type(table) is torch.Tensor
            assert not table.is_inference()
            assert not torch._C._functorch.is_functorch_wrapped_tensor(table)
    torch.testing.assert_close(gradient(x, vocab), gradient(x, new_vocab()))
    MODES[mode](x, vocab)  # and the other way round


def test_a_stream_in_inference_mode_and_training_after_it():
    vocab = new_vocab()
    with torch.inference_mode(), torch.device("meta"):
        stream = fastkd.ByteStream(
            lambda ids: torch.arange(5, dtype=torch.float32, device="cpu"), vocab, b"a"
        )
        first = stream.next_byte_log_probs()
    assert first.device.type == "cpu"
    x = scores()
    torch.testing.assert_close(gradient(x, vocab), gradient(x, new_vocab()))


def test_copies_and_pickles_have_their_own_tables():
    x, vocab = scores(), new_vocab()
    gradient(x, vocab)
    kept = {t.data_ptr() for pair in vocab._constants._tensors.values() for t in pair}
    assert len(kept) == 4
    for other in (copy.copy(vocab), copy.deepcopy(vocab), pickle.loads(pickle.dumps(vocab))):
        assert other == vocab
        assert not other._constants._tensors
        torch.testing.assert_close(gradient(x, other), gradient(x, vocab))
        assert not kept & {t.data_ptr() for p in other._constants._tensors.values() for t in p}
    assert not copy.deepcopy(vocab._constants)._tensors
    assert len(pickle.dumps(vocab)) == len(pickle.dumps(new_vocab()))


def test_nothing_keeps_a_vocabulary_alive():
    vocab = new_vocab()
    gradient(scores(), vocab)
    kept = weakref.ref(vocab)
    del vocab
    gc.collect()
    assert kept() is None


def test_threads_share_one_table():
    x, vocab, found = scores(), new_vocab(), []
    gate = threading.Barrier(8)

    def run():
        gate.wait()
        found.append(gradient(x, vocab))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(torch.equal(x, found[0]) for x in found)
    assert len(vocab._constants._tensors) == 3


def test_an_equal_vocabulary_compiles_to_the_same_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    run = torch.compile(fastkd.byte_log_probs, fullgraph=True, backend=counter)
    x, vocab = scores()[0], new_vocab()
    for _ in range(2):
        torch.testing.assert_close(run(x, vocab), fastkd.byte_log_probs(x, vocab))
    assert counter.frame_count == 1
    other = fastkd.ByteVocab(TOKENS[::-1])
    torch.testing.assert_close(run(x, other), fastkd.byte_log_probs(x, other))
    assert counter.frame_count == 2


@pytest.mark.parametrize(
    ("call", "dynamic"), [("byte_log_probs", None), ("byte_log_probs", True), ("alm", True)]
)
def test_one_graph_for_every_batch(call, dynamic):
    torch._dynamo.reset()
    counter, vocab = torch._dynamo.testing.CompileCounterWithBackend("eager"), new_vocab()

    def run(x, ids, chunks, num_chunks):
        if call == "byte_log_probs":
            return fastkd.byte_log_probs(x, vocab)[..., 97].sum()
        sides = (x, ids, chunks, 2 * x.detach(), ids, chunks)
        return fastkd.recipes.alm(*sides, num_chunks, vocab, vocab)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=dynamic)
    for i in range(3):
        shape = (3 + i, 5 + i)
        x = torch.randn(*shape, len(TOKENS) + 2, requires_grad=True)
        arguments = (torch.zeros(shape).long(), (torch.arange(5 + i) // 2).expand(shape), 4 + i)
        found, right = (torch.autograd.grad(f(x, *arguments), x)[0] for f in (compiled, run))
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-7)
    assert counter.frame_count <= 2
