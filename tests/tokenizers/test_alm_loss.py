"""alm_loss: every variant against a chunk-by-chunk definition, limits, hostile values, errors."""

import math

import numpy as np
import pytest
import torch
from cases import assert_derivatives, logits, relative_error
from chunks import chunks_of

import fastkd

DIVERGENCES = (
    *("binary_ce", "reverse_binary_kl", "binary_kl_limit", "abs"),
    *("abs_exp", "renyi", "k2", "k3"),
)

PARTS = ("logits", "ids", "chunks")


def problem(batch=3, dtype=torch.float32, chunks=7, student=(12, 40), teacher=(9, 60)):
    arguments = []
    for length, vocab in (student, teacher):
        arguments += [
            logits((batch, length, vocab), dtype),
            torch.randint(0, vocab, (batch, length)),
            chunks_of((batch, length), chunks),
        ]
    return (*arguments, chunks)


def boundaries():
    return {
        "student_boundary": torch.rand(40) < 0.4,
        "teacher_boundary": torch.rand(60) < 0.4,
    }


def assert_matches(arguments, **options):
    leaves = [arguments[0].clone().requires_grad_(), arguments[3].clone().requires_grad_()]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    found = fastkd.alm_loss(leaves[0], *arguments[1:3], leaves[1], *arguments[4:], **options)
    exact = fastkd.reference.alm_loss(
        exact_leaves[0], *arguments[1:3], exact_leaves[1], *arguments[4:], **options
    )
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=1e-7)
    found.sum().backward()
    exact.sum().backward()
    for mine, right in zip(leaves, exact_leaves, strict=True):
        assert relative_error(mine.grad, right.grad) < 2e-5
    return found


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_values_and_gradients(backend, divergence):
    for options in (
        {},
        {"temperature": 3.0, "reduction": "none"},
        {"merge_threshold": 0.4, "reduction": "sum"},
        {"merge_threshold": 0.4, "debias": False},
        {"debias": False, "epsilon": 1e-4, "reduction": "batchmean"},
    ):
        assert_matches(problem(), divergence=divergence, **boundaries(), **options)
    assert_matches(problem(), divergence=divergence, normalizer=torch.tensor(5.0))


def test_merging_is_the_teachers(backend):
    arguments = problem(batch=1)
    everything = {**boundaries(), "merge_threshold": 1.0, "reduction": "none", "debias": False}
    found = assert_matches(arguments, **everything, divergence="k2", temperature=1.0)
    assert (found != 0).sum() == 1  # one chunk for the whole text
    nothing = assert_matches(arguments, **{**everything, "merge_threshold": 0.0})
    plain = fastkd.alm_loss(*arguments, **boundaries(), reduction="none", debias=False)
    torch.testing.assert_close(nothing.detach()[nothing != 0], plain[plain != 0])


def test_a_chunk_that_ends_a_text_is_not_debiased(backend):
    student, teacher = logits((1, 2, 40)), logits((1, 3, 60))
    ids = torch.zeros(1, 3).long()
    one, two = torch.tensor([[0, 0]]), torch.tensor([[0, 0, -1]])
    arguments = (student, ids[:, :2], one, teacher, ids, two, 1)
    found = assert_matches(arguments, **boundaries())
    assert found == fastkd.alm_loss(*arguments, **boundaries(), debias=False)


def test_the_limit_of_the_binary_kl(backend):
    arguments = problem()
    tau = 1e6
    cross = fastkd.alm_loss(*arguments, temperature=tau, epsilon=1e-12, reduction="none")
    same = fastkd.alm_loss(
        arguments[3],
        *arguments[4:6],
        *arguments[3:],
        temperature=tau,
        epsilon=1e-12,
        reduction="none",
    )
    limit = fastkd.alm_loss(
        *arguments, divergence="binary_kl_limit", epsilon=1e-12, reduction="none"
    )
    both = (cross != 0) & (same != 0)
    assert both.any()
    torch.testing.assert_close(((cross - same) * tau)[both], limit[both], rtol=0.2, atol=2.0)


def test_no_loss_against_itself(backend):
    arguments = problem()[3:]
    for divergence in DIVERGENCES:
        leaf = arguments[0].clone().requires_grad_()
        loss = fastkd.alm_loss(leaf, *arguments[1:3], *arguments, divergence=divergence)
        loss.backward()
        assert leaf.grad.abs().max() < 1e-6, divergence
        if divergence != "binary_ce":
            assert loss.abs() < 1e-9, divergence


def test_certain_tokens(backend):
    """Likelihoods of 1, where log(1 - e^x) is a trap in float32."""
    student, teacher = torch.full((1, 3, 9), -40.0), torch.full((1, 3, 9), -40.0)
    student[..., 2] = teacher[..., 2] = 40.0
    ids, chunks = torch.full((1, 3), 2), torch.tensor([[0, 1, 1]])
    for divergence in DIVERGENCES:
        leaf = student.clone().requires_grad_()
        loss = fastkd.alm_loss(leaf, ids, chunks, teacher, ids, chunks, 2, divergence=divergence)
        loss.backward()
        assert loss.isfinite(), divergence
        assert leaf.grad.isfinite().all(), divergence


def test_impossible_chunks(backend):
    student, teacher = logits((1, 3, 9)), logits((1, 3, 9))
    ids, chunks = torch.full((1, 3), 2), torch.tensor([[0, 1, 2]])
    student[0, 0, 2] = teacher[0, 1, 2] = -math.inf
    student[0, 2, 2] = teacher[0, 2, 2] = -math.inf
    infinite = {
        "binary_ce": [True, False],
        "reverse_binary_kl": [False, True],
        "abs_exp": [False, False],
        "renyi": [False, False],
    }
    for divergence in DIVERGENCES:
        leaf = student.clone().requires_grad_()
        loss = fastkd.alm_loss(
            leaf, ids, chunks, teacher, ids, chunks, 3, divergence=divergence, reduction="none"
        )
        expected = infinite.get(divergence, [True, True])
        assert (loss[0, :2] == math.inf).tolist() == expected, divergence
        assert loss[0, 2].abs() < 1e-9, divergence
        loss.sum().backward()
        assert leaf.grad.isfinite().all(), divergence


def test_empty(backend):
    arguments = problem(chunks=0)
    leaf = arguments[0].clone().requires_grad_()
    loss = fastkd.alm_loss(leaf, *arguments[1:], **boundaries(), merge_threshold=0.1)
    loss.backward()
    assert loss == 0
    assert not leaf.grad.any()


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"divergence": "kl"}, ValueError, "divergence must be one of binary_ce"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"epsilon": 0.0}, ValueError, "epsilon must be positive"),
        ({"student_boundary": torch.ones(40).bool()}, ValueError, "debias needs"),
        ({"merge_threshold": 0.1}, ValueError, "merge_threshold needs teacher_boundary"),
        ({"reduction": "median"}, ValueError, "reduction must be one of"),
        ({"normalizer": -1.0}, ValueError, "normalizer must not be negative"),
        ({"normalizer": torch.ones(1)}, ValueError, r"normalizer must be .* got shape \[1\]"),
        ({"normalizer": torch.ones(3, 7)}, ValueError, r"normalizer must be .* \[3, 7\]"),
        ({"normalizer": "three"}, TypeError, "normalizer must be a number .* got str"),
        (
            {**boundaries(), "merge_threshold": torch.tensor(0.5, requires_grad=True)},
            ValueError,
            "merge_threshold takes no gradient",
        ),
        ({"temperature": "high"}, TypeError, "temperature must be a number, got str"),
        ({"divergence": ["k2"]}, ValueError, "divergence must be one of"),
        ({"student_boundary": [True]}, TypeError, "student_boundary must be a tensor or an array"),
        (
            {**boundaries(), "merge_threshold": "low"},
            TypeError,
            "merge_threshold must be a number, got str",
        ),
        (
            {**boundaries(), "merge_threshold": math.nan},
            ValueError,
            "merge_threshold must be a number, got nan",
        ),
        (
            {**boundaries(), "merge_threshold": torch.tensor(math.nan)},
            ValueError,
            "merge_threshold must be a number, got nan",
        ),
        ({"epsilon": 10**400}, ValueError, "epsilon must be positive and finite"),
        ({"epsilon": torch.tensor(True)}, TypeError, "epsilon must be a number, got Tensor"),
        ({"temperature": 10**400}, ValueError, "temperature must be positive and finite"),
        ({"normalizer": 10**400}, ValueError, "normalizer must .*, got an integer larger than any"),
        (
            {**boundaries(), "merge_threshold": 10**400},
            ValueError,
            "merge_threshold must be a number, got 1000",
        ),
        ({"debias": "no"}, TypeError, "debias must be True or False, got str"),
        ({"debias": 0}, TypeError, "debias must be True or False, got int"),
    ],
)
def test_errors(backend, options, error, message):
    with pytest.raises(error, match=f"alm_loss: .*{message}"):
        fastkd.alm_loss(*problem(), **options)


def test_numbers_of_any_kind(backend):
    """Of numpy, and True, which is 1."""
    given, sets = problem(), boundaries()
    for name, one, other in (
        ("merge_threshold", 0.5, np.array(0.5)),
        ("epsilon", 1.0, True),
        ("temperature", 3.0, np.float32(3)),
    ):
        both = (fastkd.alm_loss(*given, **sets, **{name: x}) for x in (one, other))
        torch.testing.assert_close(*both)


@pytest.mark.only("cpu")
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_errors_of_a_side_name_its_arguments(backend, side):
    """Not those of chunk_log_likelihood, which finds them."""
    names = [f"{s}_{part}" for s in ("student", "teacher") for part in PARTS]
    call = dict(zip([*names, "num_chunks"], problem(), strict=True))
    logits, ids, chunks = (call[f"{side}_{part}"] for part in PARTS)
    backwards = torch.arange(chunks.size(-1)).flip(-1).expand_as(chunks).clamp(max=6)
    for part, wrong, error, message in (
        ("logits", logits[0, 0], ValueError, "must have at least two dimensions"),
        ("logits", logits.long(), TypeError, "must"),
        ("ids", ids[:1], ValueError, "must have one entry a row"),
        ("ids", ids.double(), TypeError, "must be int64 or int32"),
        ("ids", ids + 1000, IndexError, r"must lie in \[0, "),
        ("chunks", chunks.bool(), TypeError, "must be int64 or int32"),
        ("chunks", chunks + 100, IndexError, r"must lie in \[-1, num_chunks = 7\)"),
        ("boundary", torch.ones(3).bool(), ValueError, "must have one entry a column"),
        ("boundary", boundaries()[f"{side}_boundary"].long(), TypeError, "must be bool"),
    ):
        options = {**call, **boundaries(), f"{side}_{part}": wrong}
        with pytest.raises(error, match=f"^alm_loss: {side}_{part} {message}"):
            fastkd.alm_loss(**options)
    with pytest.raises(ValueError, match=f"^alm_loss: the tokens of .*; {side}_chunks has"):
        fastkd.alm_loss(**{**call, f"{side}_chunks": backwards})
    with pytest.raises(ValueError, match=r"^alm_loss: num_chunks must lie in"):
        fastkd.alm_loss(**{**call, "num_chunks": -1})


@pytest.mark.only("cpu")
@pytest.mark.parametrize(
    ("place", "name"),
    enumerate(f"{side}_{part}" for side in ("student", "teacher") for part in PARTS),
)
def test_what_is_no_tensor(backend, place, name):
    arguments = list(problem())
    for wrong in (arguments[place].numpy(), arguments[place].tolist(), None):
        with pytest.raises(TypeError, match=f"alm_loss: {name} must be a tensor, got"):
            fastkd.alm_loss(*arguments[:place], wrong, *arguments[place + 1 :])


@pytest.mark.only("cpu")
def test_integers_of_other_types(backend):
    *arguments, chunks = problem()
    right = fastkd.alm_loss(*arguments, chunks)
    for number in (np.int64(chunks), np.int32(chunks), torch.tensor(chunks)):
        assert fastkd.alm_loss(*arguments, number) == right
    for number in (7.0, "7", None):
        with pytest.raises(TypeError, match="alm_loss: num_chunks must be an integer, got"):
            fastkd.alm_loss(*arguments, number)
    for number in (np.float32(5), np.int64(5), torch.tensor(5)):
        found = fastkd.alm_loss(*arguments, chunks, normalizer=number)
        assert found == fastkd.alm_loss(*arguments, chunks, normalizer=5)


def test_estimators_of_a_divergence(backend):
    """With r = log p_T - log q_S of a chunk: r^2 / 2 and e^r - 1 - r, whose mean over chunks drawn
    from the student's model is KL(q_S || p_T)."""
    student, teacher = torch.tensor([0.1, 0.3, 0.6]), torch.tensor([0.5, 0.2, 0.3])
    ids, one = torch.arange(3).view(3, 1), torch.zeros(3, 1).long()
    sides = [x.log().expand(3, 1, 3) for x in (student, teacher)]
    r = (teacher / student).log()
    options = {"temperature": 1.0, "epsilon": 1e-9, "reduction": "none"}
    for divergence, right in (("k2", r.square() / 2), ("k3", r.exp() - 1 - r)):
        found = fastkd.alm_loss(
            sides[0], ids, one, sides[1], ids, one, 1, divergence=divergence, **options
        )
        torch.testing.assert_close(found[:, 0], right, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((found[:, 0] * student).sum(), -(r * student).sum())


@pytest.mark.only("cpu")
def test_unequal_batches(backend):
    first, second = problem(batch=3), problem(batch=2)
    with pytest.raises(ValueError, match=r"alm_loss: teacher_logits must have .* got \[2\]"):
        fastkd.alm_loss(*first[:3], *second[3:])


@pytest.mark.only("cpu")
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(backend, divergence):
    arguments = problem(batch=1, dtype=torch.float64, student=(5, 5), teacher=(4, 6), chunks=3)
    leaves = [arguments[i].requires_grad_() for i in (0, 3)]
    options = {"student_boundary": torch.arange(5) < 2, "teacher_boundary": torch.arange(6) < 3}

    def run(student, teacher):
        return fastkd.alm_loss(
            *(student, *arguments[1:3], teacher, *arguments[4:]),
            divergence=divergence,
            temperature=2.0,
            merge_threshold=0.3,
            **options,
        )

    assert_derivatives(run, leaves)


@pytest.mark.only("cpu", "cuda")
def test_compile_fullgraph(backend):
    arguments, options = problem(), {**boundaries(), "merge_threshold": 0.3}

    def run(x):
        return fastkd.alm_loss(x, *arguments[1:], **options)

    plain, compiled = (arguments[0].clone().requires_grad_() for _ in range(2))
    run(plain).backward()
    torch.compile(run, fullgraph=True)(compiled).backward()
    torch.testing.assert_close(compiled.grad, plain.grad, rtol=1e-4, atol=1e-7)
