"""byte_log_probs: values and gradients against float64 and against enumeration, errors."""

import math

import pytest
import torch
from cases import allowed_error, assert_derivatives, logits
from raw import check

import fastkd


def vocabulary(size, seed=0, specials=7):
    """Tokens over few letters, so that prefixes are shared; duplicates, holes, special ids."""
    generator = torch.Generator().manual_seed(seed)
    tokens = []
    for _ in range(size):
        length = int(torch.randint(1, 5, (), generator=generator))
        letters = torch.randint(0, 4, (length,), generator=generator).tolist()
        tokens.append(bytes(b"ab \xff"[i] for i in letters))
    for i in range(0, size, max(1, size // max(specials, 1))):
        tokens[i] = None
    return fastkd.ByteVocab(tokens, special={"eos": [0]} if specials else {})


def enumerated(scores, vocab, prefix):
    """The definition, id by id, for one row in float64."""
    mass = torch.zeros(vocab.num_columns, dtype=torch.float64)
    q = scores.double()[: len(vocab)].softmax(-1)
    columns = vocab.columns.tolist()
    for id, token in enumerate(vocab.tokens):
        if token is None:
            mass[columns[id]] += q[id] if prefix == b"" else 0
        elif token.startswith(prefix):
            rest = token[len(prefix) :]
            mass[rest[0] if rest else 256] += q[id]
    return (mass / mass.sum()).log()


def assert_matches(scores, vocab, *, gradients=True, **options):
    scores = scores.detach().requires_grad_(gradients)
    exact_scores = scores.detach().double().requires_grad_(gradients)
    found = fastkd.byte_log_probs(scores, vocab, **options)
    exact = fastkd.reference.byte_log_probs(exact_scores, vocab, **options)
    assert found.shape == (*scores.shape[:-1], vocab.num_columns)
    assert found.dtype == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=4e-6, equal_nan=True)
    if gradients and scores.numel():
        weights = torch.where(exact.isfinite(), torch.randn_like(exact), 0)
        outputs = [torch.where(x.isfinite(), x, 0) for x in (found, exact)]
        mine = torch.autograd.grad((outputs[0] * weights.to(found.dtype)).sum(), scores)[0]
        right = torch.autograd.grad((outputs[1] * weights).sum(), exact_scores)[0]
        assert mine.dtype == scores.dtype
        known = ~exact.isnan().any(-1)
        right = right[known]
        assert (mine[known].double() - right).norm() <= allowed_error(right, scores.dtype)
    return found


@pytest.mark.parametrize("size", [1, 6, 40, 1031, 20_011])
@pytest.mark.parametrize("prefix", [b"", b"a", b"ab ", b"\xff"])
def test_values_and_gradients(backend, size, prefix):
    vocab = vocabulary(size)
    for shape in ((3, size), (2, 2, size + 3), (size,), (0, size)):
        assert_matches(logits(shape), vocab, prefix=prefix)
    assert_matches(logits((2, size)), vocabulary(size, specials=0), prefix=prefix)


@pytest.mark.only("cpu")
def test_the_definition(backend):
    vocab = vocabulary(300)
    scores = logits((4, 310))
    for prefix in (b"", b"a", b"a ", b"zz"):
        found = fastkd.byte_log_probs(scores, vocab, prefix=prefix)
        for row in range(4):
            right = enumerated(scores[row], vocab, prefix)
            torch.testing.assert_close(
                found[row].double(), right, rtol=1e-5, atol=1e-5, equal_nan=True
            )
    assert found.isnan().all()  # no token starts with zz
    torch.testing.assert_close(fastkd.byte_log_probs(scores, vocab).exp().sum(-1), torch.ones(4))


def test_a_prefix_for_each_row(backend):
    vocab, scores = vocabulary(500), logits((2, 3, 500))
    prefixes = [[b"a", b"", b"b\xff"], [b"", b"a", b"ab"]]
    found = assert_matches(scores, vocab, prefix=prefixes)
    for i in range(2):
        for j in range(3):
            one = fastkd.byte_log_probs(scores[i, j], vocab, prefix=prefixes[i][j])
            assert torch.equal(found[i, j], one)
    assert_matches(logits((0, 500)), vocab, prefix=[])


def test_valid(backend):
    vocab, scores = vocabulary(700), logits((3, 720))
    valid = torch.rand(3, 720) < 0.5
    valid[2] = False
    for prefix in (b"", b"a"):
        found = assert_matches(scores, vocab, prefix=prefix, valid=valid, gradients=False)
        assert found[2].isnan().all()
        assert_matches(scores[:2], vocab, prefix=prefix, valid=valid[:2])
        assert_matches(scores, vocab, prefix=prefix, valid=valid[0])
        masked = scores.masked_fill(~valid, -math.inf)
        same = fastkd.byte_log_probs(masked, vocab, prefix=prefix)
        torch.testing.assert_close(found, same, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(backend, dtype):
    for prefix in (b"", b"a"):
        assert_matches(logits((4, 1500), dtype), vocabulary(1500), prefix=prefix)


def test_special_values(backend):
    vocab = vocabulary(900)
    scores = logits((6, 900))
    first = torch.tensor(vocab.columns) == ord("a")
    scores[0, 100:700] = -math.inf
    scores[1, first] = -math.inf  # an impossible byte
    scores[2, 5] = math.nan
    scores[3] = -math.inf
    scores[4, first] = -150.0  # a byte whose share underflows in float32
    scores[5] *= 1e4
    found = assert_matches(scores, vocab, gradients=False)
    assert found[1, ord("a")] == -math.inf
    assert found[2].isnan().all()
    assert found[3].isnan().all()
    assert -170 < found[4, ord("a")] < -100
    assert_matches(scores[[0, 1, 4, 5]], vocab)
    scores[2:4] = math.nan
    leaf = scores.requires_grad_()
    found = fastkd.byte_log_probs(leaf, vocab, prefix=[b"a", b"a", b"", b"a", b"a", b"a"])
    found[[0, 5]][:, 256].sum().backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[1:5].any()


def test_impossible_columns_take_no_gradient(backend):
    vocab, scores = vocabulary(50), logits((2, 50)).requires_grad_()
    probabilities = fastkd.byte_log_probs(scores, vocab)
    (probabilities.exp() * probabilities).nan_to_num().sum().backward()
    assert scores.grad.isfinite().all()
    assert scores.grad.abs().sum() > 0


def test_layouts(backend):
    vocab = vocabulary(64)
    for scores in (
        logits((5, 3, 64)).transpose(0, 1),
        logits((3, 5, 128))[..., ::2],
        logits((3, 1, 64)).expand(3, 5, 64),
    ):
        assert_matches(scores, vocab)
        assert_matches(scores, vocab, prefix=b"a", valid=(torch.rand(3, 5, 128) < 0.7)[..., ::2])


@pytest.mark.only("cpu", "simt")
def test_threads_change_no_bit(backend):
    vocab, scores = vocabulary(100_000), logits((2, 100_000))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        leaf = scores.clone().requires_grad_()
        out = fastkd.byte_log_probs(leaf, vocab)
        out[:, [32, 97, 257]].sum().backward()
        found.append((out.detach(), leaf.grad))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(2, 39)}, ValueError, "vocab has 40 ids, logits has only 39"),
        ({"logits": torch.zeros(2, 40).int()}, TypeError, "logits must be float32"),
        ({"logits": [0.0] * 40}, TypeError, "logits must be a tensor"),
        ({"vocab": [b"a"]}, TypeError, "vocab must be a fastkd.ByteVocab, got list"),
        ({"prefix": "a"}, ValueError, "prefix must be bytes"),
        ({"prefix": None}, ValueError, r"prefix must be bytes, .* got 1 of NoneType"),
        ({"prefix": 7}, ValueError, r"prefix must be bytes, .* got 1 of int"),
        ({"prefix": torch.zeros(2)}, ValueError, r"prefix must be bytes, .* got 1 of Tensor"),
        ({"prefix": [b"a"]}, ValueError, r"shape \[2\], got 1 of bytes"),
        ({"prefix": [b"a", "b"]}, ValueError, r"shape \[2\], got 2 of bytes, str"),
        (
            {"valid": torch.ones(2, 39).bool()},
            ValueError,
            r"valid must have .* got shape \[2, 39\]",
        ),
        ({"valid": torch.ones(2, 40)}, TypeError, "valid must be bool"),
    ],
)
def test_errors(backend, change, error, message):
    arguments = {"logits": torch.zeros(2, 40), "vocab": vocabulary(40)}
    with pytest.raises(error, match=f"byte_log_probs: .*{message}"):
        fastkd.byte_log_probs(**{**arguments, **change})


@pytest.mark.only("cpu")
def test_gradcheck(backend):
    vocab = vocabulary(12)
    possible = sorted(set(vocab.columns.tolist()))
    scores = logits((2, 13), torch.float64).requires_grad_()

    def run(x):
        return fastkd.byte_log_probs(x, vocab)[..., possible]

    assert_derivatives(run, scores)
    assert torch.func.grad(lambda x: run(x)[0, 0])(scores.detach()).isfinite().all()


def test_opcheck():
    vocab, scores = vocabulary(40), logits((3, 41))
    from raw import byte_arguments

    for prefix, valid in ((b"", None), ([b"", b"a", b"b"], torch.rand(3, 41) < 0.8)):
        arguments = (scores, *byte_arguments(scores, vocab, prefix, valid))
        check("byte_log_probs", arguments)
        out, sums = torch.ops.fastkd._byte_log_probs(*arguments)
        backward = (sums, torch.ones_like(out), *arguments)
        torch.library.opcheck(torch.ops.fastkd.byte_log_probs_backward.default, backward)
        torch.library.opcheck(
            torch.ops.fastkd._byte_log_probs_backward_into.default,
            (torch.empty_like(scores), *backward),
        )


@pytest.mark.only("cpu")
def test_tables_of_another_vocabulary(backend):
    from raw import byte_arguments

    scores = logits((3, 40))
    arguments = list(byte_arguments(scores, vocabulary(40), b"", None))
    for place, value in ((0, 40), (1, 999), (2, 41)):
        broken = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
        broken[place].view(-1)[-1] = value
        with pytest.raises(RuntimeError, match="must come from one ByteVocab"):
            torch.ops.fastkd._byte_log_probs(scores, *broken)


@pytest.mark.only("cpu", "cuda")
@pytest.mark.parametrize("prefix", [b"", b"a", [b"a", b"", b"b", b"a"]])
def test_compile_fullgraph(backend, prefix):
    torch._dynamo.reset()
    vocab, scores = vocabulary(60), logits((4, 60))

    def run(x):
        return fastkd.byte_log_probs(x, vocab, prefix=prefix)[..., ord("a")].sum()

    plain, compiled = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    run(plain).backward()
    torch.compile(run, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)


@pytest.mark.only("cpu")
def test_compile_with_two_prefixes(backend):
    torch._dynamo.reset()
    vocab, other, scores = vocabulary(60), vocabulary(55, seed=1), logits((4, 60))

    def run(x):
        found = [fastkd.byte_log_probs(x, vocab, prefix=prefix) for prefix in (b"a", b"b", b"")]
        return torch.cat([*found, fastkd.byte_log_probs(x, other, prefix=b"a")], -1)

    torch.testing.assert_close(
        torch.compile(run, fullgraph=True)(scores), run(scores), equal_nan=True
    )
