"""token_log_probs: values and gradients against float64, rows not read, shift, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import allowed_error, assert_derivatives, logits
from raw import check

import fastkd

SHAPES = ((0, 5), (3, 1), (4, 7), (2, 3, 33), (5, 1031), (2, 20011), (7,))


def tokens(shape, vocab=None):
    ids = torch.randint(0, vocab or shape[-1], shape[:-1])
    return torch.where(torch.rand(shape[:-1]) < 0.2, -100, ids)


def results(module, scores, ids, **options):
    found = module.token_log_probs(scores, ids, **options)
    return found if options.get("entropy") else (found,)


def assert_matches(scores, ids, *, gradients=True, atol=4e-6, **options):
    scores = scores.detach().requires_grad_(gradients)
    exact_scores = scores.detach().double().requires_grad_(gradients)
    found = results(fastkd, scores, ids, **options)
    exact = results(fastkd.reference, exact_scores, ids, **options)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    for mine, right in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == scores.shape[:-1]
        torch.testing.assert_close(mine.double(), right, rtol=2e-6, atol=atol, equal_nan=True)
    if not gradients:
        return found
    weights = [torch.randn(right.shape, dtype=torch.float64) for right in exact]

    def gradient_of(outputs, wrt):
        total = sum((x * w.to(x.dtype)).sum() for x, w in zip(outputs, weights, strict=True))
        return torch.autograd.grad(total, wrt)[0]

    mine, right = gradient_of(found, scores), gradient_of(exact, exact_scores)
    assert mine.dtype == scores.dtype
    rows = [x.reshape(-1, x.size(-1)) for x in (mine.double(), right)]
    for own, true in zip(*rows, strict=True):
        assert (own - true).norm() <= allowed_error(true, scores.dtype)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("entropy", [False, True])
def test_values_and_gradients(backend, shape, entropy):
    assert_matches(logits(shape), tokens(shape), entropy=entropy)
    assert_matches(logits(shape), tokens(shape).int(), entropy=entropy, temperature=1.7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("entropy", [False, True])
def test_dtypes(backend, dtype, entropy):
    for shape in ((6, 1500), (2, 151_936)):
        assert_matches(logits(shape, dtype), tokens(shape), entropy=entropy)


@pytest.mark.only("cpu")
def test_is_what_torch_computes(backend):
    scores, ids = logits((5, 40), torch.float64).requires_grad_(), torch.randint(0, 40, (5,))
    found = fastkd.token_log_probs(scores, ids, temperature=1.5, entropy=True)
    model = torch.distributions.Categorical(logits=scores / 1.5)
    torch.testing.assert_close(found.log_probs, model.log_prob(ids))
    torch.testing.assert_close(found.entropy, model.entropy())
    alone = fastkd.token_log_probs(scores, ids)
    torch.testing.assert_close(-alone, F.cross_entropy(scores, ids, reduction="none"))
    mine, theirs = (
        torch.autograd.grad((x.log().sum() if x.min() > 0 else x.sum()), scores, retain_graph=True)
        for x in (found.entropy, model.entropy())
    )
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("entropy", [False, True])
def test_rows_out_are_not_read(backend, entropy):
    scores, ids = logits((3, 12, 40)), tokens((3, 12, 40))
    mask = torch.rand(3, 12) < 0.6
    out = ~mask | (ids == -100)
    scores[out] = math.nan
    ids[~mask] = 10**6  # nobody looks at them
    scores.requires_grad_()
    found = results(fastkd, scores, ids, mask=mask, entropy=entropy)
    sum(x.sum() for x in found).backward()
    assert out.any()
    for x in found:
        assert not x[out].any()
        assert (x[~out] != 0).all()
    assert not scores.grad[out].any()
    assert scores.grad[~out].any(-1).all()
    assert_matches(scores.nan_to_num(), ids, mask=mask, entropy=entropy)


@pytest.mark.parametrize("shift", [1, 2, 7])
def test_shift_takes_the_tokens_of_later_rows(backend, shift):
    scores, ids, mask = logits((3, 5, 40)), tokens((3, 5, 40)), torch.rand(3, 5) < 0.8
    tau = torch.rand(3, 5) + 0.5
    options = {"mask": mask, "entropy": True, "temperature": tau}
    found = assert_matches(scores, ids, shift=shift, **options)
    kept = max(5 - shift, 0)
    sliced = fastkd.token_log_probs(
        scores[:, :kept],
        ids[:, shift:],
        mask=mask[:, shift:],
        entropy=True,
        temperature=tau[:, :kept],
    )
    for whole, part in zip(found, sliced, strict=True):
        torch.testing.assert_close(whole[:, :kept], part)
        assert not whole[:, kept:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_beyond_vocab_size_are_not_read(backend, dtype):
    scores, ids = logits((4, 64), dtype), tokens((4, 64), 50)
    scores[:, 50:] = math.nan
    leaf = scores.clone().requires_grad_()
    found = fastkd.token_log_probs(leaf, ids, vocab_size=50, entropy=True)
    (found.log_probs.sum() + found.entropy.sum()).backward()
    alone = scores[:, :50].clone().requires_grad_()
    right = fastkd.token_log_probs(alone, ids, entropy=True)
    (right.log_probs.sum() + right.entropy.sum()).backward()
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(leaf.grad[:, :50], alone.grad)
    assert not leaf.grad[:, 50:].any()


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_softcap(backend, cap):
    scores, ids = logits((6, 300)) * 3, torch.randint(0, 300, (6,))
    found = assert_matches(scores, ids, logit_softcap=cap, temperature=0.7, entropy=True)
    capped = cap * torch.tanh(scores / cap)
    right = fastkd.token_log_probs(capped, ids, temperature=0.7, entropy=True)
    for mine, other in zip(found, right, strict=True):
        torch.testing.assert_close(mine.detach(), other)
    assert_matches(scores, ids, logit_softcap=cap)


@pytest.mark.parametrize("entropy", [False, True])
def test_special_values(backend, entropy):
    scores, ids = logits((8, 3000)), torch.full((8,), 5)
    scores[0, 1000:2000] = -math.inf
    scores[1, 5] = -math.inf  # an impossible token
    scores[2, 7] = math.nan
    scores[3] = -math.inf
    scores[4, 2999] = math.inf
    scores[5] = -math.inf
    scores[5, 5] = 1.0  # certain
    scores[6] *= 1e4
    scores[7, :] = torch.finfo(torch.float32).min
    found = assert_matches(scores, ids, gradients=False, entropy=entropy)
    assert found[0][1] == -math.inf
    assert found[0][2:5].isnan().all()
    assert found[0][5] == 0
    if entropy:
        assert found[1][2:5].isnan().all()
        assert found[1][5] == 0
        assert math.isclose(found[1][7], math.log(3000), rel_tol=1e-6)
    good = torch.tensor([0, 5, 6, 7])
    assert_matches(scores[good], ids[good], entropy=entropy)
    # 1[v = token] - q_v, also where the token is impossible.
    leaf = scores[1:2].clone().requires_grad_()
    fastkd.token_log_probs(leaf, ids[:1])[0].backward()
    right = -scores[1].softmax(-1)
    right[5] = 1.0
    torch.testing.assert_close(leaf.grad[0], right)


def test_certain_rows_have_an_entropy_with_a_gradient_near_zero(backend):
    scores = torch.full((3, 500), -40.0)
    scores[:, 3] = torch.tensor([0.0, 20.0, -25.0])
    # A block of 512 columns is summed in float32, in one lane where the loop is not vectorised
    # (with sanitizers): beside a sum near 1 each of its additions rounds by up to 2^-24.
    assert_matches(scores, torch.tensor([3, 3, 4]), entropy=True, atol=512 * 2.0**-24)


def test_layouts(backend):
    for scores in (
        logits((5, 3, 64)).transpose(0, 1),
        logits((3, 5, 128))[..., ::2],
        logits((3, 1, 64)).expand(3, 5, 64),
    ):
        assert_matches(scores, tokens((3, 5, 64)), entropy=True)
        assert_matches(scores, tokens((3, 5, 64)).t().contiguous().t())


def test_gradients_of_one_result_alone(backend):
    scores, ids = logits((4, 60)), torch.randint(0, 60, (4,))
    for place in (0, 1):
        mine, right = scores.clone().requires_grad_(), scores.double().requires_grad_()
        fastkd.token_log_probs(mine, ids, entropy=True)[place].sum().backward()
        fastkd.reference.token_log_probs(right, ids, entropy=True)[place].sum().backward()
        torch.testing.assert_close(mine.grad.double(), right.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.only("cpu", "simt")
def test_threads_change_no_bit(backend):
    scores, ids = logits((2, 100_000)), torch.tensor([4, 99_999])
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        leaf = scores.clone().requires_grad_()
        out = fastkd.token_log_probs(leaf, ids, entropy=True)
        (out.log_probs.sum() + out.entropy.sum()).backward()
        found.append((*out, leaf.grad))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_ids": torch.tensor([1, 40, 2])}, IndexError, r"token_ids must lie in \[0, 40\)"),
        ({"token_ids": torch.tensor([1, -1, 2])}, IndexError, "got -1 in row 1"),
        ({"token_ids": torch.ones(3)}, TypeError, "token_ids must be int64 or int32"),
        ({"token_ids": torch.ones(2).long()}, ValueError, "token_ids must have one entry a row"),
        ({"token_ids": [1, 2, 3]}, TypeError, "token_ids must be a tensor"),
        ({"token_ids": None}, TypeError, "token_ids must be a tensor"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "got -1 in row 1"),
        ({"entropy": 1}, TypeError, "entropy must be True or False"),
        ({"shift": -1}, ValueError, "shift must not be negative"),
        ({"vocab_size": 41}, ValueError, "vocab_size is 41, logits has only 40"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be positive"),
        ({"logits": torch.zeros(3, 40).long()}, TypeError, "logits must be float32"),
        ({"logits": 3.0}, TypeError, "logits must be a tensor, got float"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits must have at least one dimension"),
    ],
)
def test_errors(backend, change, error, message):
    arguments = {"logits": torch.zeros(3, 40), "token_ids": torch.tensor([1, 2, 3])}
    with pytest.raises(error, match=f"token_log_probs: .*{message}"):
        fastkd.token_log_probs(**{**arguments, **change})


@pytest.mark.only("cpu")
def test_gradcheck(backend):
    ids = torch.tensor([[1, -100, 2, 0, 5], [3, 4, 0, 1, 2]])

    def run(x):
        return fastkd.token_log_probs(x, ids, temperature=1.3, shift=1, entropy=True)

    scores = logits((2, 5, 6), torch.float64).requires_grad_()
    assert_derivatives(run, scores)
    assert_derivatives(lambda x: fastkd.token_log_probs(x, ids, logit_softcap=2.0), scores)
    assert torch.func.grad(lambda x: run(x)[1].sum())(scores.detach()).isfinite().all()


def test_opcheck():
    scores, ids = logits((4, 40)), tokens((4, 40))
    for entropy in (False, True):
        arguments = (scores, ids, None, 1.5, None, 0, -1, math.inf, entropy, None)
        check("token_log_probs", arguments)
        *found, numbers = torch.ops.fastkd._token_log_probs(*arguments)
        backward = (numbers, *(torch.ones_like(x) for x in found), *arguments)
        torch.library.opcheck(torch.ops.fastkd.token_log_probs_backward.default, backward)
        torch.library.opcheck(
            torch.ops.fastkd._token_log_probs_backward_into.default,
            (torch.empty_like(scores), *backward),
        )


@pytest.mark.only("cpu", "cuda")
@pytest.mark.parametrize("entropy", [False, True])
def test_compile_fullgraph(backend, entropy):
    scores, ids = logits((3, 5, 40)), tokens((3, 5, 40))

    def run(x):
        found = results(fastkd, x, ids, entropy=entropy, shift=1)
        return sum((i + 1) * value.sum() for i, value in enumerate(found))

    plain, compiled = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    run(plain).backward()
    torch.compile(run, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad)
