"""Linear heads in every mode of PyTorch, and with hostile arguments."""

import pickle
import threading

import pytest
import torch
import torch.utils.checkpoint
from heads import compiled, gradients, head
from torch._subclasses.fake_tensor import FakeTensorMode

import fastkd
from fastkd import LinearLogits

FEATURES, VOCAB = 5, 17


def two(rows, dtype=torch.float32):
    return [*head(rows, FEATURES, VOCAB, dtype), *head(rows, 3, VOCAB, dtype)]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph_for_all_sizes_and_numbers(reduction):
    def step(h, w, b, t, v, c, mask, beta, temperature):
        student, teacher = LinearLogits(h, w, b, scale=0.5), LinearLogits(t, v, c, softcap=3.0)
        return fastkd.softmax_divergence(
            student, teacher, divergence="jsd", mask=mask, beta=beta, temperature=temperature,
            reduction=reduction,
        )  # fmt: skip

    graph, counter = compiled(step)
    for i, rows in enumerate((5, 9, 700, 1500)):
        inputs = two(rows)
        mask, beta = torch.rand(rows) < 0.7, torch.tensor(0.2 + 0.1 * i)
        found = graph(*inputs, mask, beta, 1.0 + i)
        true = step(*inputs, mask, beta, 1.0 + i)
        torch.testing.assert_close(found, true)
        for mine, exact in zip(gradients(found, inputs), gradients(true, inputs), strict=True):
            torch.testing.assert_close(mine, exact)
    assert counter.frame_count <= 2
    nodes = [
        node
        for graph in counter.graphs
        for node in graph.graph.nodes
        if "fastkd.linear" in str(node.target)
    ]
    assert len(nodes) == counter.frame_count


def test_every_op_compiles():
    def step(h, w, t, v, ids):
        student, teacher = LinearLogits(h, w), LinearLogits(t, v)
        best = fastkd.teacher_topk(teacher, 3)
        stats = fastkd.token_stats(student, teacher, labels=ids)
        more = fastkd.topk_stats(student, *best)
        found = fastkd.token_log_probs(student, ids, entropy=True)
        chunks = fastkd.chunk_log_likelihood(student, ids, ids * 0, 2)
        loss, _ = fastkd.linear_softmax_divergence(h, w, t, v, labels=ids, return_stats=True)
        return (
            stats.tvd, more.divergence, found.log_probs, found.entropy,
            chunks.log_likelihood, loss, fastkd.topk_divergence(student, *best),
            fastkd.cross_entropy(student, ids),
            fastkd.clipped_divergence(student, teacher, 0.01, 0.9),
        )  # fmt: skip

    graph, counter = compiled(step, "eager")
    for rows in (4, 6, 30):
        h, w, _, t, v, _ = two(rows)
        t, v = t.detach(), v.detach()
        ids = torch.arange(rows) % VOCAB
        found, true = graph(h, w, t, v, ids), step(h, w, t, v, ids)
        for mine, exact in zip(found, true, strict=True):
            torch.testing.assert_close(mine, exact)
        for mine, exact in zip(gradients(found, [h, w]), gradients(true, [h, w]), strict=True):
            torch.testing.assert_close(mine, exact)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("strict", [True, False])
def test_exported_heads_train(strict):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(VOCAB, FEATURES))

        def forward(self, hidden, teacher, weight):
            return fastkd.linear_softmax_divergence(hidden, self.weight, teacher, weight)

    module, rows = Head(), torch.export.Dim("rows")
    weight = torch.randn(VOCAB, 3)
    example = (torch.randn(6, FEATURES), torch.randn(6, 3), weight)
    shapes = ({0: rows}, {0: rows}, None)
    exported = torch.export.export(module, example, dynamic_shapes=shapes, strict=strict).module()
    inputs = (torch.randn(9, FEATURES, requires_grad=True), torch.randn(9, 3), weight)
    exported.zero_grad()
    exported(*inputs).backward()  # also of hidden states, which needed none in the example
    found = exported.weight.grad.clone(), inputs[0].grad.clone()
    module.zero_grad()
    inputs[0].grad = None
    module(*inputs).backward()
    torch.testing.assert_close(found, (module.weight.grad, inputs[0].grad))
    loss = exported(*inputs)
    (slope,) = torch.autograd.grad(loss, exported.weight, create_graph=True)
    slope.square().sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives(reduction):
    inputs = [x.detach().requires_grad_() for x in two(3, torch.float64)]

    def divergence(h, w, b, t, v, c):
        return fastkd.linear_softmax_divergence(
            h, w, t, v, student_bias=b, teacher_bias=c, reduction=reduction, divergence="jsd",
            chunk_size=2,
        )  # fmt: skip

    assert torch.autograd.gradcheck(divergence, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(divergence, inputs, fast_mode=True)
    ids = torch.arange(3)
    assert torch.autograd.gradgradcheck(
        lambda h, w: fastkd.token_log_probs(LinearLogits(h, w), ids), inputs[:2]
    )


def test_transforms_and_batched_gradients():
    h, w, _, t, v, _ = (x.detach() for x in two(4, torch.float64))

    def loss(h, **options):
        return fastkd.linear_softmax_divergence(h, w, t, v, **options)

    def plain(h):
        leaf = h.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    torch.testing.assert_close(torch.func.grad(loss)(h), plain(h))
    each = torch.func.vmap(torch.func.grad(lambda x, y: fastkd.linear_softmax_divergence(
        x.unsqueeze(0), w, y.unsqueeze(0), v)))(h, t)  # fmt: skip
    torch.testing.assert_close(each / 4, plain(h))
    _, tangent = torch.func.jvp(loss, (h,), (torch.ones_like(h),))
    torch.testing.assert_close(tangent, plain(h).sum())
    leaf = h.clone().requires_grad_()
    rows = loss(leaf, reduction="none")
    (found,) = torch.autograd.grad(rows, leaf, torch.eye(4).double(), is_grads_batched=True)
    torch.testing.assert_close(found.sum(0) / 4, plain(h))
    total = loss(leaf)
    (found,) = torch.autograd.grad(total, leaf, torch.ones(2).double(), is_grads_batched=True)
    torch.testing.assert_close(found[1], plain(h))
    with pytest.raises(NotImplementedError, match="return_stats"):
        torch.func.grad(lambda h: loss(h, return_stats=True)[0])(h)


def test_checkpoint_and_other_threads():
    h, w, _, t, v, _ = two(6)
    true = gradients(fastkd.linear_softmax_divergence(h, w, t, v), [h, w])
    loss = torch.utils.checkpoint.checkpoint(
        fastkd.linear_softmax_divergence, h, w, t, v, use_reentrant=False
    )
    torch.testing.assert_close(gradients(loss, [h, w]), true)
    found = [None] * 4

    def run(i):
        found[i] = gradients(fastkd.linear_softmax_divergence(h, w, t, v, chunk_size=2), [h, w])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for each in found:
        torch.testing.assert_close(each, true)


def test_autocast_casts_as_linear_does():
    h, w, b, t, v, _ = two(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = fastkd.linear_softmax_divergence(h, w, t, v, student_bias=b)
    loss.backward()
    assert h.grad.dtype == w.grad.dtype == b.grad.dtype == torch.float32
    rounded = [x.detach().bfloat16().float().requires_grad_() for x in (h, w, t, v)]
    true = fastkd.reference.linear_softmax_divergence(*rounded, student_bias=b.detach())
    torch.testing.assert_close(loss, true, rtol=1e-5, atol=1e-6)
    true.backward()
    torch.testing.assert_close(w.grad, rounded[1].grad, rtol=1e-2, atol=1e-3)


def test_inference_mode_fake_and_meta_tensors():
    inputs = [x.detach() for x in (two(4))]
    h, w, _, t, v, _ = inputs
    true = fastkd.linear_softmax_divergence(h, w, t, v)
    with torch.inference_mode():
        assert torch.equal(fastkd.linear_softmax_divergence(h, w, t, v), true)
        made = torch.randn(4, FEATURES)
    leaf = w.clone().requires_grad_()
    fastkd.linear_softmax_divergence(made, leaf, t, v).backward()
    meta = [x.to("meta") for x in (h, w, t, v)]
    assert fastkd.linear_softmax_divergence(*meta, reduction="none").shape == (4,)
    with pytest.raises(ValueError, match="columns"):
        fastkd.linear_softmax_divergence(*meta[:3], meta[3][:5])
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (h, w, t, v)]
        loss, stats = fastkd.linear_softmax_divergence(*fakes, return_stats=True)
        assert loss.shape == ()
        assert stats.student_argmax.dtype == torch.int64


def test_rows_that_are_not_read_may_hold_anything():
    h, w, b, t, v, _ = two(12, torch.float64)
    mask = torch.arange(12) % 3 > 0
    true = gradients(
        fastkd.linear_softmax_divergence(h[mask], w, t[mask], v, student_bias=b), [w, b, v]
    )
    with torch.no_grad():
        h[::3], t[::3] = torch.nan, torch.inf
    for compact in (None, False):
        loss = fastkd.linear_softmax_divergence(
            h, w, t, v, student_bias=b, mask=mask, compact=compact, chunk_size=5
        )
        found = gradients(loss, [h, w, b, t, v])
        torch.testing.assert_close((found[1], found[2], found[4]), true)
        for gradient in (found[0], found[3]):
            assert (gradient[::3] == 0).all()
            assert gradient.isfinite().all()
    losses = fastkd.linear_softmax_divergence(h, w, t, v, reduction="none")
    assert torch.equal(losses.isnan(), ~mask)
    for nothing in (torch.zeros(12, dtype=torch.bool), None):
        rows = 12 if nothing is not None else 0
        loss = fastkd.linear_softmax_divergence(h[:rows], w, t[:rows], v, mask=nothing)
        assert loss.item() == 0
        for gradient in gradients(loss, [w, v]):
            assert (gradient == 0).all()


def test_impossible_tokens():
    """A bias of -inf is a masked column."""
    h, w, b, t, v, c = two(6, torch.float64)
    with torch.no_grad():
        b[3] = c[3] = -torch.inf
    for softcap in (None, 2.0):
        loss = fastkd.linear_softmax_divergence(
            h, w, t, v, student_bias=b, teacher_bias=c, logit_softcap=softcap
        )
        assert loss.isfinite()
        for gradient in gradients(loss, [h, w, b]):
            assert gradient.isfinite().all()


def test_strides():
    """Of hidden states and weight: any; also leading dimensions without a flat view."""
    h, w, _, t, v, _ = two((2, 3, 4), torch.float64)
    true = fastkd.linear_softmax_divergence(h, w, t, v, reduction="none")
    odd = torch.randn(4, 2 * FEATURES, 3, 2, dtype=torch.float64).permute(3, 2, 0, 1)[..., ::2]
    odd = odd.detach()
    with torch.no_grad():
        odd.copy_(h)
    weight = torch.empty(FEATURES, 2 * VOCAB, dtype=torch.float64).mT[::2]
    weight.copy_(w.detach())
    odd.requires_grad_(), weight.requires_grad_()
    found = fastkd.linear_softmax_divergence(odd, weight, t, v, reduction="none", chunk_size=5)
    torch.testing.assert_close(found, true)
    mine, exact = gradients(found, [odd, weight]), gradients(true, [h, w])
    torch.testing.assert_close(mine, exact)
    one = torch.randn(FEATURES, dtype=torch.float64).expand(2, 3, FEATURES)
    loss = fastkd.linear_softmax_divergence(one, weight, one[..., :3], v, mask=one[..., 0] < 9)
    assert loss.isfinite()


def errors():
    h, w, _, t, v, _ = (x.detach() for x in two(4))
    f = fastkd.linear_softmax_divergence
    labels = torch.tensor([0, 1, 2, VOCAB])
    best = fastkd.teacher_topk(h @ w.T, 2)
    wrong = best.indices.clone()
    wrong[3, 0] = VOCAB
    ids = torch.tensor([0, 1, 2, -7])
    linear = LinearLogits(h, w, chunk_size=2)
    trained = LinearLogits(h, w.clone().requires_grad_())
    yield "student_hidden must have shape", ValueError, lambda: f(h[:, :3], w, t, v)
    yield r"student_hidden must have shape \[\.\.\., 5\]", ValueError, lambda: f(t[0, 0], w, t, v)
    yield "student_weight must have 2 dimensions", ValueError, lambda: f(h, w[0], t, v)
    yield "student_weight must be a tensor, got int", TypeError, lambda: f(h, 3, t, v)
    yield "teacher_weight must be float32", TypeError, lambda: f(h, w, t, v.long())
    yield "student_bias must have shape", ValueError, lambda: f(h, w, t, v, student_bias=t[0])
    yield "student_weight must have the dtype", TypeError, lambda: f(h, w.double(), t, v)
    yield "on the device of student_hidden", ValueError, lambda: f(h, w.to("meta"), t, v)
    yield "leading dimensions", ValueError, lambda: f(h, w, t[:3], v)
    yield "has 17; pass vocab_size", ValueError, lambda: f(h, w, t, v[:5])
    yield "vocab_size is 18", ValueError, lambda: f(h, w, t, v, vocab_size=18)
    yield "got 17 in row 3", IndexError, lambda: f(h, w, t, v, labels=labels, chunk_size=3)
    yield "logit_scale", ValueError, lambda: f(h, w, t, v, logit_scale=(1.0, 2.0, 3.0))
    for scale in (float("nan"), float("inf"), 1e300):
        yield (
            "logit_scale must be finite in torch.float32",
            ValueError,
            lambda scale=scale: f(h, w, t, v, logit_scale=scale),
        )
    yield "chunk_size must be positive", ValueError, lambda: f(h, w, t, v, chunk_size=0)
    yield "chunk_size must be an integer", TypeError, lambda: f(h, w, t, v, chunk_size=1.5)
    yield "compact must be True or False", TypeError, lambda: f(h, w, t, v, compact="yes")
    yield "logits_dtype must be", TypeError, lambda: f(h, w, t, v, logits_dtype=torch.int8)
    yield "return_stats must be", TypeError, lambda: f(h, w, t, v, return_stats=1)
    yield "weight must have one entry a row", ValueError, lambda: f(h, w, t, v, weight=t)
    yield "linear_softmax_divergence: temp", ValueError, lambda: f(h, w, t, v, temperature=0.0)
    yield "group", TypeError, lambda: f(h, w, t, v, group=object())
    yield "softcap must be positive", ValueError, lambda: LinearLogits(h, w, softcap=0.0)
    yield "inplace", ValueError, lambda: fastkd.cross_entropy(linear, labels, inplace=True)
    yield (
        "in a list take no gradient", ValueError,
        lambda: fastkd.softmax_divergence(linear, [linear, trained]),
    )  # fmt: skip
    yield (
        "has a softcap already", ValueError,
        lambda: fastkd.cross_entropy(LinearLogits(h, w, softcap=2.0), ids, logit_softcap=2.0),
    )  # fmt: skip
    yield "in row 3", IndexError, lambda: fastkd.topk_divergence(linear, best[0], wrong)
    yield "in row 3", IndexError, lambda: fastkd.topk_stats(linear, best[0], wrong)
    yield "in row 3", IndexError, lambda: fastkd.token_stats(linear, labels=labels)
    yield "one entry a row", ValueError, lambda: fastkd.token_stats(linear, labels=labels[:3])
    yield "in row 3", IndexError, lambda: fastkd.token_log_probs(linear, ids)
    vocab = fastkd.ByteVocab([b"a"])
    yield "got LinearLogits", TypeError, lambda: fastkd.byte_log_probs(linear, vocab)


ERRORS = list(errors())


@pytest.mark.parametrize(("message", "kind", "call"), ERRORS, ids=[x[0] for x in ERRORS])
def test_errors(message, kind, call):
    with pytest.raises(kind, match=message):
        call()


def test_a_sharded_weight_is_refused():
    """With advice: the loss inside the forward of the module that owns the weight."""

    class DTensor(torch.Tensor):
        pass

    weight = torch.randn(VOCAB, FEATURES).as_subclass(DTensor)
    with pytest.raises(TypeError, match=r"fastkd\.integrations\.call_through"):
        LinearLogits(torch.randn(2, FEATURES), weight)


def test_the_container():
    h, w, b, *_ = two((2, 3))
    logits = LinearLogits(h, w, b, scale=2.0)
    assert (logits.shape, logits.dim(), logits.size(-1)) == ((2, 3, VOCAB), 3, VOCAB)
    assert logits.dtype == torch.float32
    assert logits.requires_grad
    assert not logits.detach().requires_grad
    torch.testing.assert_close(logits.logits(), 2 * (h @ w.T) + b)
    assert LinearLogits(h.bfloat16(), w.bfloat16()).dtype == torch.float32
    text = "LinearLogits(shape=[2, 3, 17], features=5, dtype=torch.float32, device='cpu', bias="
    assert repr(logits) == f"{text}True, scale=2.0)"
    assert repr(LinearLogits(h, w, softcap=3.0)) == f"{text}False, softcap=3.0)"
    again = pickle.loads(pickle.dumps(logits.detach()))
    assert torch.equal(again.logits(), logits.detach().logits())


def test_nothing_of_each_size():
    h, w, _, t, v, _ = (x.detach() for x in two(4))
    no_features = torch.randn(4, 0, requires_grad=True), torch.randn(VOCAB, 0, requires_grad=True)
    loss = fastkd.linear_softmax_divergence(*no_features, t, v)
    uniform = fastkd.softmax_divergence(torch.zeros(4, VOCAB), t @ v.T)
    torch.testing.assert_close(loss, uniform)
    assert gradients(loss, no_features)[1].shape == (VOCAB, 0)
    with pytest.raises(ValueError, match="at least one column"):
        fastkd.linear_softmax_divergence(h, w[:0], t, v[:0])
    assert fastkd.linear_softmax_divergence(h[:0], w, t[:0], v, reduction="none").shape == (0,)
    for rows in ((0,), (2, 0)):
        assert fastkd.teacher_topk(LinearLogits(h.new_empty(*rows, FEATURES), w), 3)[0].shape == (
            *rows,
            3,
        )


def test_retained_graphs_saved_tensors_and_default_devices():
    h, w, _, t, v, _ = two(4)
    true = gradients(fastkd.linear_softmax_divergence(h, w, t, v), [h, w])
    with torch.autograd.graph.save_on_cpu():
        loss = fastkd.linear_softmax_divergence(h, w, t, v)
    torch.testing.assert_close(gradients(loss, [h, w], retain_graph=True), true)
    torch.testing.assert_close(gradients(loss, [h, w], retain_graph=True), true)
    with torch.device("meta"):  # of tensors that a call makes without saying where
        again = fastkd.linear_softmax_divergence(h, w, t, v)
    torch.testing.assert_close(gradients(again, [h, w]), true)
