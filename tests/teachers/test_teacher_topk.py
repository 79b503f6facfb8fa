"""teacher_topk: against torch, order, ties, special values, errors."""

import math

import pytest
import torch
from cases import logits

import fastkd


def assert_matches(found, teacher, k, **options):
    """The same tokens in the same order as the reference's, and its log-probabilities."""
    exact, indices = fastkd.reference.teacher_topk(teacher.double(), k, **options)
    assert found.log_probs.dtype == torch.float32
    assert found.indices.dtype == torch.int32
    assert found.log_probs.shape == found.indices.shape == (*teacher.shape[:-1], k)
    assert torch.equal(found.indices, indices)
    torch.testing.assert_close(
        found.log_probs.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("shape", "ks"),
    [
        ((3, 1), (1,)),
        ((4, 7), (1, 3, 7)),
        ((2, 3, 33), (5, 33)),
        ((0, 9), (2,)),
        ((9,), (4,)),
        ((3, 5000), (1, 64, 1024)),
        ((2, 50_257), (64, 1000)),
    ],
)
def test_values(backend, dtype, shape, ks):
    for k in ks:
        teacher = logits(shape, dtype)
        assert_matches(fastkd.teacher_topk(teacher, k), teacher, k)


@pytest.mark.parametrize("k", [1, 64, 1024])
def test_large_vocabulary(backend, k):
    teacher = logits((2, 151_936), torch.bfloat16)  # full of ties
    assert_matches(fastkd.teacher_topk(teacher, k, temperature=1.7), teacher, k, temperature=1.7)


@pytest.mark.parametrize("vocab", [40, 700, 20_000])
def test_ties_go_to_the_lower_index(backend, vocab):
    teacher = torch.randint(0, 3, (4, vocab)).float()
    teacher[0] = 1.0
    teacher[1, ::2] = -0.0  # equal to 0.0
    for k in (1, 17, 40):
        assert_matches(fastkd.teacher_topk(teacher, k), teacher, k)


@pytest.mark.parametrize("order", ["ascending", "descending", "late peak"])
def test_adverse_orders(backend, order):
    teacher = torch.linspace(-5, 5, 30_000).repeat(2, 1)
    if order == "descending":
        teacher = teacher.flip(-1)
    elif order == "late peak":
        teacher = teacher.flip(-1) * 1e-3
        teacher[:, -5:] = 40.0
    for k in (1, 64, 1024):
        assert_matches(fastkd.teacher_topk(teacher, k), teacher, k)


def test_special_values(backend):
    teacher = logits((7, 3000))
    teacher[0, 100:] = -math.inf  # fewer than k are possible
    teacher[1] = -math.inf
    teacher[2, 5] = math.nan
    teacher[3, 2999] = math.inf
    teacher[4, :] = -math.inf
    teacher[4, 2000] = 3.0
    teacher[5] *= 1e4
    found = fastkd.teacher_topk(teacher, 128)
    assert_matches(found, teacher, 128)
    assert found.log_probs.isnan().all(-1).tolist() == [
        False,
        True,
        True,
        True,
        False,
        False,
        False,
    ]
    assert found.log_probs[4, 0] == 0
    assert (found.log_probs[4, 1:] == -math.inf).all()
    assert (found.log_probs[0, 100:] == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_and_options(backend, dtype):
    for teacher in (
        logits((5, 3, 64), dtype).transpose(0, 1),
        logits((3, 128), dtype)[:, ::2],
        logits((1, 50), dtype).expand(6, 50),
        logits((40, 7), dtype).t(),
        logits((4 * 1037 + 1,), dtype)[1:].view(4, 1037),
    ):
        assert_matches(fastkd.teacher_topk(teacher, 5), teacher, 5)
    teacher = logits((3, 4, 60), dtype)
    teacher[..., 50:] = 100.0
    temperature = torch.rand(3, 4) + 0.5
    options = {"temperature": temperature, "vocab_size": 50}
    assert_matches(fastkd.teacher_topk(teacher, 5, **options), teacher, 5, **options)


@pytest.mark.only("cpu", "simt")
def test_threads_change_no_bit(backend):
    teacher = logits((2, 100_000))
    threads, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        found.append(fastkd.teacher_topk(teacher, 50))
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(other.log_probs, found[0].log_probs)
        assert torch.equal(other.indices, found[0].indices)


def test_feeds_topk_divergence(backend):
    student, teacher = logits((5, 400)).requires_grad_(), logits((5, 400)).requires_grad_()
    best = fastkd.teacher_topk(teacher, 20)
    assert not best.log_probs.requires_grad
    lump = fastkd.topk_divergence(student, *best)
    dense = fastkd.softmax_divergence(student, teacher)
    assert 0 < lump < dense  # merging outcomes only loses


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((logits((3, 40)), 0), {}, ValueError, r"k must lie in \[1, 40\]"),
        ((logits((3, 40)), 41), {}, ValueError, r"k must lie in \[1, 40\].*got 41"),
        ((logits((3, 40)), 35), {"vocab_size": 30}, ValueError, r"k must lie in \[1, 30\]"),
        ((logits((3, 40)), 2.0), {}, TypeError, "k must be an integer, got float"),
        ((logits((3, 40)), 2), {"temperature": 0.0}, ValueError, "temperature must be positive"),
        ((logits((3, 40)), 2), {"vocab_size": 50}, ValueError, "teacher_logits has only 40"),
        ((torch.ones(3, 4, dtype=torch.int64), 2), {}, TypeError, "teacher_logits must be float32"),
        (([1.0, 2.0], 2), {}, TypeError, "teacher_logits must be a tensor, got list"),
        ((torch.tensor(1.0), 1), {}, ValueError, "teacher_logits must have at least one dimension"),
    ],
)
def test_errors(backend, arguments, options, error, message):
    with pytest.raises(error, match=f"teacher_topk: .*{message}"):
        fastkd.teacher_topk(*arguments, **options)


@pytest.mark.only("simt", "cuda")
def test_limits_of_cuda(backend):
    with pytest.raises(ValueError, match="teacher_topk: k may be at most 1024 on CUDA, got 1025"):
        fastkd.teacher_topk(logits((2, 2000)), 1025)
    with pytest.raises(TypeError, match="teacher_topk: float64 logits are supported on the CPU"):
        fastkd.teacher_topk(logits((2, 20), torch.float64), 3)


@pytest.mark.only("simt", "cuda")
def test_temperatures_no_check_could_see(backend):
    teacher = logits((5, 300))
    temperature = torch.tensor([1.0, 0.0, -1.0, math.inf, math.nan])
    found = fastkd.teacher_topk(teacher, 4, temperature=temperature)
    assert_matches(fastkd.teacher_topk(teacher[:1], 4), teacher[:1], 4)
    assert found.log_probs.isnan().all(-1).tolist() == [False, True, True, True, True]
    assert (found.indices[1:] == torch.arange(4)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [257, 1024, 9001, 70_000])
def test_more_equals_than_wanted(backend, dtype, vocab):
    """Equals across the k-th place, all over the row, above and below any others."""
    teacher = torch.full((6, vocab), -3.0)
    teacher[0] = 0.0
    teacher[1, 1::2] = -math.inf
    teacher[2, vocab // 3 :: 3] = 5.0
    teacher[3, -7:] = 5.0
    teacher[4, :-7] = -math.inf
    teacher[5] = torch.arange(vocab) // 200
    for k in (1, 8, 255, min(vocab, 1024)):
        found = fastkd.teacher_topk(teacher.to(dtype), k)
        assert_matches(found, teacher.to(dtype), k)


def test_opcheck(backend):
    torch.library.opcheck(
        torch.ops.fastkd._teacher_topk.default, (logits((3, 40)), 5, 1.0, None, -1, None)
    )


@pytest.mark.only("cpu", "cuda")
def test_compile_fullgraph(backend):
    teacher = logits((4, 60))
    found = torch.compile(lambda x: fastkd.teacher_topk(x, 6), fullgraph=True)(teacher)
    assert_matches(found, teacher, 6)
