"""cross_entropy: values and gradients against float64 and torch, rows not read, errors."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import allowed_error, assert_derivatives, logits
from raw import check, loss_arguments
from torch.testing._internal.common_methods_invocations import op_db

import fastkd

SHAPES = ((0, 5), (3, 1), (4, 7), (2, 3, 33), (5, 1031), (2, 20011), (7,))
TERMS = (
    {},
    {"label_smoothing": 0.1},
    {"z_loss_weight": 1e-2},
    {"entropy_weight": 0.7},
    {"entropy_weight": 0.7, "entropy_temperature": 1.5, "temperature": 1.5},
    {"entropy_weight": -0.3, "entropy_temperature": 0.5},
    {"entropy_weight": 2.0, "entropy_mask": "correct"},
    {
        "label_smoothing": 0.2,
        "z_loss_weight": 1e-3,
        "entropy_weight": 0.4,
        "entropy_temperature": 2.0,
        "entropy_mask": "correct",
    },
    {"label_smoothing": 1.0},
)


def labels_of(shape, vocab=None):
    labels = torch.randint(0, vocab or shape[-1], shape[:-1])
    return torch.where(torch.rand(shape[:-1]) < 0.2, -100, labels)


def likely(scores):
    """Labels of which some are the likeliest token."""
    best = scores[..., : scores.size(-1)].float().nan_to_num(-math.inf).argmax(-1)
    return torch.where(torch.rand(best.shape) < 0.5, best, labels_of(scores.shape))


def assert_matches(scores, labels, *, gradients=True, **options):
    options = {"reduction": "none", **options}
    scores = scores.detach().requires_grad_(gradients)
    exact_scores = scores.detach().double().requires_grad_(gradients)
    found = fastkd.cross_entropy(scores, labels, **options)
    exact = fastkd.reference.cross_entropy(exact_scores, labels, **options)
    assert found.dtype == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=4e-6, equal_nan=True)
    if not gradients:
        return found
    weights = torch.randn(exact.shape, dtype=torch.float64)
    (mine,) = torch.autograd.grad((found * weights.to(found.dtype)).sum(), scores)
    (right,) = torch.autograd.grad((exact * weights).sum(), exact_scores)
    assert mine.dtype == scores.dtype
    rows = [x.reshape(-1, x.size(-1)) for x in (mine.double(), right)]
    for own, true in zip(*rows, strict=True):
        assert (own - true).norm() <= 2 * allowed_error(true, scores.dtype)
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("terms", TERMS, ids=str)
def test_values_and_gradients(backend, shape, terms):
    scores = logits(shape)
    labels = likely(scores) if shape[0] else labels_of(shape)
    assert_matches(scores, labels, **terms)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[3], TERMS[7]], ids=str)
def test_dtypes(backend, dtype, terms):
    for shape in ((6, 1500), (2, 151_936)):
        scores = logits(shape, dtype)
        assert_matches(scores, likely(scores).int(), **terms)


def opinfo_samples():
    (info,) = [op for op in op_db if op.name == "nn.functional.cross_entropy"]
    for sample in info.sample_inputs("cpu", torch.float32, requires_grad=True):
        (target,) = sample.args
        given = dict(sample.kwargs)
        if target.is_floating_point() or given.pop("weight", None) is not None:
            continue  # probabilities, weights of classes
        yield sample.input.detach(), target, given


@pytest.mark.only("cpu")
def test_is_torchs_on_its_own_samples(backend):
    seen = 0
    for scores, target, given in opinfo_samples():
        theirs = scores.clone().requires_grad_()
        right = F.cross_entropy(theirs, target, **given)
        if right.isnan().any():  # of no row: 0 here
            continue
        mine = scores.clone().requires_grad_()
        rows = mine.movedim(1, -1) if mine.dim() > 1 else mine
        found = fastkd.cross_entropy(rows, target, **given)
        torch.testing.assert_close(found, right)
        upstream = torch.randn_like(right)
        found.backward(upstream)
        right.backward(upstream)
        torch.testing.assert_close(mine.grad, theirs.grad)
        seen += 1
    assert seen >= 8


@pytest.mark.parametrize("reduction", ["none", "mean", "sum", "batchmean", "elementmean"])
def test_reductions_weights_and_rows_out(backend, reduction):
    scores, labels = logits((3, 12, 40)), labels_of((3, 12, 40))
    mask, weight = torch.rand(3, 12) < 0.6, torch.rand(3, 12)
    weight[torch.rand(3, 12) < 0.2] = 0
    out = ~mask | (labels == -100) | (weight == 0)
    scores[out] = math.nan
    labels[~mask] = 10**6  # nobody looks at them
    options = {"mask": mask, "weight": weight, "reduction": reduction, "entropy_weight": 0.5}
    leaf = scores.clone().requires_grad_()
    found = fastkd.cross_entropy(leaf, labels, **options)
    found.sum().backward()
    right = scores.double().requires_grad_()
    exact = fastkd.reference.cross_entropy(right, labels, **options)
    exact.sum().backward()
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=4e-6)
    torch.testing.assert_close(leaf.grad.double(), right.grad, rtol=2e-5, atol=1e-7)
    assert out.any()
    assert not leaf.grad[out].any()
    assert leaf.grad[~out].any(-1).all()


def test_normalizer_and_empty_denominator(backend):
    scores, labels = logits((4, 30)).requires_grad_(), torch.tensor([1, 2, -100, 4])
    total = fastkd.cross_entropy(scores, labels, reduction="sum")
    for normalizer in (7.0, torch.tensor(7.0)):
        found = fastkd.cross_entropy(scores, labels, normalizer=normalizer)
        torch.testing.assert_close(found, total / 7)
    nothing = fastkd.cross_entropy(scores, torch.full((4,), -100))
    nothing.backward()
    assert nothing == 0
    assert not scores.grad.any()


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[3]], ids=str)
def test_the_entropys_rows(backend, terms):
    scores = logits((40, 300))
    labels, which = likely(scores), torch.rand(40) < 0.5
    options = {"entropy_weight": 0.8, **terms, "reduction": "none"}
    plain = fastkd.cross_entropy(scores, labels, **{**options, "entropy_weight": 0.0})
    whole = fastkd.cross_entropy(scores, labels, **options)
    some = assert_matches(scores, labels, **{**options, "entropy_mask": which})
    torch.testing.assert_close(some.detach(), torch.where(which, whole, plain))
    correct = assert_matches(scores, labels, **{**options, "entropy_mask": "correct"})
    hit = labels == scores.argmax(-1)
    assert 0 < hit.sum() < 40
    torch.testing.assert_close(correct.detach(), torch.where(hit, whole, plain))


def test_of_equal_tokens_the_lowest_is_the_likeliest(backend):
    scores = torch.randint(0, 3, (8, 3000)).float()
    scores[:, 700] = scores[:, 2100] = 5.0
    labels = torch.tensor([700, 2100] * 4)
    options = {"entropy_weight": 1.0, "reduction": "none"}
    found = assert_matches(scores, labels, **options, entropy_mask="correct").detach()
    plain = fastkd.cross_entropy(scores, labels, reduction="none")
    assert ((found > plain + 1e-3) == (labels == 700)).all()


@pytest.mark.parametrize("shift", [1, 2, 7])
def test_shift_takes_the_labels_of_later_rows(backend, shift):
    scores = logits((3, 5, 40))
    labels, mask, which = labels_of((3, 5, 40)), torch.rand(3, 5) < 0.8, torch.rand(3, 5) < 0.5
    options = {"entropy_weight": 0.5, "label_smoothing": 0.1}
    found = assert_matches(scores, labels, mask=mask, entropy_mask=which, shift=shift, **options)
    kept = max(5 - shift, 0)
    sliced = fastkd.cross_entropy(
        scores[:, :kept],
        labels[:, shift:],
        mask=mask[:, shift:],
        entropy_mask=which[:, shift:],
        reduction="none",
        **options,
    )
    torch.testing.assert_close(found[:, :kept].detach(), sliced)
    assert not found[:, kept:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[7]], ids=str)
def test_columns_beyond_vocab_size_are_not_read(backend, dtype, terms):
    scores = logits((4, 5003), dtype)
    labels = labels_of((4, 4990))
    scores[:, 4990:] = math.nan
    leaf, alone = scores.clone().requires_grad_(), scores[:, :4990].clone().requires_grad_()
    found = fastkd.cross_entropy(leaf, labels, vocab_size=4990, **terms)
    right = fastkd.cross_entropy(alone, labels, **terms)
    found.backward(), right.backward()
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(leaf.grad[:, :4990], alone.grad)
    assert not leaf.grad[:, 4990:].any()


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[5], TERMS[7]], ids=str)
def test_softcap_and_temperatures(backend, terms):
    scores = logits((6, 3000)) * 3
    labels, tau = likely(scores), torch.rand(6) + 0.5
    tau[2] = terms.get("entropy_temperature", 1.0)
    assert_matches(scores, labels, **{**terms, "logit_softcap": 20.0})
    assert_matches(scores, labels, **{**terms, "temperature": tau})


def test_special_values(backend):
    scores, labels = logits((8, 3000)), torch.full((8,), 5)
    scores[0, 1000:2000] = -math.inf
    scores[1, 5] = -math.inf  # an impossible label
    scores[2, 7] = math.nan
    scores[3] = -math.inf
    scores[4, 2999] = math.inf
    scores[5] = -math.inf
    scores[5, 5] = 1.0  # certain
    scores[6] *= 1e4
    scores[7, :] = torch.finfo(torch.float32).min
    options = {"entropy_weight": 0.5, "entropy_mask": "correct"}
    found = assert_matches(scores, labels, gradients=False, **options)
    assert found[1] == math.inf
    assert found[2:5].isnan().all()
    assert found[5] == 0
    good = torch.tensor([0, 5, 6, 7])
    for terms in ({}, options, {"z_loss_weight": 1e-6}):
        which = good if "z_loss_weight" not in terms else good[:2]
        assert_matches(scores[which], labels[which], **terms)
    leaf = scores[1:2].clone().requires_grad_()
    fastkd.cross_entropy(leaf, labels[:1]).backward()
    right = scores[1].softmax(-1)
    right[5] = -1.0
    torch.testing.assert_close(leaf.grad[0], right)
    smoothed = fastkd.cross_entropy(scores[:1], labels[:1], label_smoothing=0.1)
    assert smoothed == math.inf


def test_layouts(backend):
    for scores in (
        logits((5, 3, 64)).transpose(0, 1),
        logits((3, 5, 128))[..., ::2],
        logits((3, 1, 64)).expand(3, 5, 64),
    ):
        assert_matches(scores, labels_of((3, 5, 64)), **TERMS[7])


@pytest.mark.parametrize("vocab", [40, 5000])
@pytest.mark.parametrize("terms", [TERMS[0], TERMS[7]], ids=str)
def test_inplace(backend, vocab, terms):
    scores = logits((6, vocab))
    labels = likely(scores)
    plain = scores.clone().requires_grad_()
    right = fastkd.cross_entropy(plain, labels, **terms)
    right.backward()
    leaf = scores.clone().requires_grad_()
    overwritten = leaf * 1.0
    found = fastkd.cross_entropy(overwritten, labels, **terms, inplace=True)
    found.backward()
    assert torch.equal(found, right)
    assert torch.equal(leaf.grad, plain.grad)
    assert torch.equal(overwritten, plain.grad)


@pytest.mark.only("cpu", "simt")
def test_threads_change_no_bit(backend):
    scores, labels = logits((2, 100_000)), torch.tensor([4, 99_999])
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        leaf = scores.clone().requires_grad_()
        loss = fastkd.cross_entropy(leaf, labels, **TERMS[7])
        loss.backward()
        found.append((loss.detach(), leaf.grad))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": torch.tensor([1, 40, 2])}, IndexError, r"labels must lie in \[0, 40\)"),
        ({"labels": torch.ones(3)}, TypeError, "labels must be int64 or int32"),
        ({"labels": None}, TypeError, "labels must be a tensor"),
        ({"mask": torch.ones(3)}, TypeError, "mask must be bool"),
        ({"entropy_mask": torch.ones(3)}, TypeError, "entropy_mask must be bool"),
        ({"entropy_mask": torch.ones(2).bool()}, ValueError, "entropy_mask must have one entry"),
        ({"entropy_mask": "wrong"}, ValueError, "entropy_mask must be a bool tensor, 'correct'"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"entropy_temperature": 0.0}, ValueError, "entropy_temperature must be positive"),
        ({"entropy_weight": math.nan}, ValueError, "entropy_weight must be finite"),
        ({"z_loss_weight": math.inf}, ValueError, "z_loss_weight must be finite"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"vocab_size": 41}, ValueError, "vocab_size is 41, logits has only 40"),
        ({"logits": torch.zeros(3, 40).long()}, TypeError, "logits must be float32"),
        ({"logits": 3.0}, TypeError, "logits must be a tensor, got float"),
        ({"group": object()}, TypeError, "group must be a torch.distributed process group"),
    ],
)
def test_errors(backend, change, error, message):
    arguments = {"logits": torch.zeros(3, 40), "labels": torch.tensor([1, 2, 3])}
    with pytest.raises(error, match=f"cross_entropy: .*{message}"):
        fastkd.cross_entropy(**{**arguments, **change})


@pytest.mark.only("cpu")
def test_gradcheck(backend):
    labels = torch.tensor([[1, -100, 2, 0, 5], [3, 4, 0, 1, 2]])
    scores = logits((2, 5, 6), torch.float64).requires_grad_()
    for terms in ({}, TERMS[7], TERMS[4]):
        terms = {k: v for k, v in terms.items() if k != "entropy_mask"}
        assert_derivatives(lambda x, t=terms: fastkd.cross_entropy(x, labels, shift=1, **t), scores)
    grad = torch.func.grad(lambda x: fastkd.cross_entropy(x, labels, **TERMS[7]))(scores.detach())
    leaf = scores.detach().requires_grad_()
    fastkd.cross_entropy(leaf, labels, **TERMS[7]).backward()
    torch.testing.assert_close(grad, leaf.grad)


def test_opcheck():
    scores = logits((4, 40))
    for terms in (TERMS[0], TERMS[7]):
        arguments = loss_arguments(fastkd.cross_entropy, scores, labels_of((4, 40)), **terms)
        check("cross_entropy", arguments, into=torch.empty_like(scores))


@pytest.mark.only("cpu", "cuda")
def test_compile_fullgraph(backend):
    scores = logits((3, 5, 40))
    labels = likely(scores)

    def run(x):
        return fastkd.cross_entropy(x, labels, shift=1, **TERMS[7])

    plain, compiled = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    right = run(plain)
    right.backward()
    found = torch.compile(run, fullgraph=True)(compiled)
    found.backward()
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(compiled.grad, plain.grad)
