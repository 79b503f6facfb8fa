"""The raw ops on one process's columns, on every backend, against plain formulas in float64."""

import math

import pytest
import torch
from cases import ALL_DIVERGENCES, DIVERGENCES, NEED_LABELS, logits

from fastkd import reference
from fastkd._ops import shards as ops
from fastkd._ops.arguments import CHOICES

ROWS, VOCAB = 5, 300
DTYPES = (torch.float32, torch.bfloat16)
LN2 = math.log(2)
LABELS = torch.tensor([0, 299, 3, 7, -100])
IS_LABEL = torch.arange(VOCAB) == LABELS.unsqueeze(1)


def numbers(*columns) -> torch.Tensor:
    return ops.table(ROWS, torch.empty(0), *columns)


def call(name, *arguments):
    return getattr(torch.ops.fastkd, name)(*arguments)


def near(found, expected, dtype=torch.float32, scale=1.0):
    tolerance = (2e-6 if dtype == torch.float32 else 2**-8) * scale
    torch.testing.assert_close(
        found.double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics(backend, dtype):
    z = logits((ROWS, VOCAB)).to(dtype)
    z[1, 3], z[2], z[3, 7] = -torch.inf, -torch.inf, torch.nan
    keep = torch.tensor([1.0, 1, 1, 1, 0])
    ids, columns = torch.tensor([0, 299, 3, -1, 2]), torch.arange(VOCAB) % 3 == 0
    holes = torch.tensor([[4, 150, -1]]).expand(ROWS, -1).contiguous()
    tau, second, cap = 1.3, 0.6, 4.0
    table = numbers(keep, tau, second, cap)
    columns = columns[: VOCAB - 1].contiguous()
    found = call("_shard_statistics", z, table, ids, columns, holes, VOCAB - 1, 15)
    capped = z.double()
    capped = torch.where(capped.isinf(), capped, cap * torch.tanh(capped / cap))
    token = capped.gather(1, ids.clamp(min=0).unsqueeze(1)).squeeze(1)
    without = capped[:, : VOCAB - 1].clone()
    without[:, [4, 150]] = -torch.inf
    at = without - without.nan_to_num(-torch.inf).amax(1, keepdim=True).nan_to_num(neginf=0)
    total = torch.where(without == -torch.inf, 0, at)
    total[:, [4, 150]] = 0
    total[1, 3] = -torch.inf
    for row in (0, 1, 3):
        top = without[row].nan_to_num(-torch.inf).amax()
        shift = found[ops.ORIGIN, row] - top
        second_shift = found[ops.SECOND_ORIGIN, row] - top
        first = ((at[row] - shift) / tau).exp()
        other = ((at[row] - second_shift) / second).exp() * columns
        near(found[ops.SUM, row], first.sum(), scale=10)
        if row == 3:  # a NaN in the first sum says that the row has one
            continue
        log2 = ((at[row] - shift) / tau / LN2).nan_to_num(neginf=0, nan=math.nan)
        near(found[ops.WEIGHTED, row], (first * log2).sum(), scale=30)
        near(found[ops.SECOND_SUM, row], other.sum(), scale=10)
        log2 = ((at[row] - second_shift) / second / LN2).nan_to_num(neginf=0, nan=math.nan)
        near(found[ops.SECOND_WEIGHTED, row], (other * log2).sum(), scale=30)
        near(found[ops.TOTAL, row], total[row].sum() - shift * (VOCAB - 3), scale=10)
    assert found[ops.COLUMNS].tolist() == [VOCAB - 3] * 4 + [0]
    assert found[ops.ORIGIN, 2] == -torch.inf
    assert found[ops.SUM, 2] == 0
    best = without.nan_to_num(-torch.inf).argmax(1)
    assert found[ops.BEST_COLUMN, :2].tolist() == best[:2].tolist()
    near(found[ops.BEST_LOGIT, :2], without[:2].amax(1))
    near(found[ops.TOKEN_LOGIT, 0], token[0])
    # The last column is beyond the vocabulary, the last two rows have no token.
    assert (found[ops.TOKEN_LOGIT, [1, 2, 3, 4]] == -torch.inf).all()


@pytest.mark.parametrize("below", [10.0, 1000.0, 1e20])
def test_statistics_of_rare_columns(backend, below):
    """The second softmax has an origin of its own where it has columns far below the others."""
    z, columns = logits((ROWS, VOCAB)), torch.arange(VOCAB) % 7 == 3
    z[:, columns] -= below
    z[1, columns], ids = -torch.inf, torch.full((ROWS,), -1)
    table = numbers(1.0, 1.3, 0.6, math.inf)
    found = call("_shard_statistics", z, table, ids, columns, None, VOCAB, ops.SECOND)
    assert found[ops.SECOND_ORIGIN, 1] == -torch.inf
    assert found[ops.SECOND_SUM, 1] == 0
    rows = torch.tensor([0, 2, 3, 4])
    origin = found[ops.SECOND_ORIGIN, rows]
    expected = ((z[rows][:, columns].double() - origin.unsqueeze(1)) / 0.6).exp().sum(1)
    near(found[ops.SECOND_SUM, rows], expected, scale=10)
    found[ops.SECOND_SUM, 1] = 1
    found[ops.SECOND_ORIGIN, 1] = 0
    numbers_of = (found[ops.ORIGIN], found[ops.SECOND_ORIGIN], 0.0, found[ops.SECOND_SUM].log2())
    table = torch.cat([table, numbers(*numbers_of, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0)])
    gradient = call("_shard_softmax_gradient", z, table, ids, columns, None, VOCAB, None)
    right = (z.double() / 0.6).masked_fill(~columns, -torch.inf).softmax(1)
    right[1] = 0
    near(gradient, right, scale=10 if below < 1e19 else 1e9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_gradient(backend, dtype):
    z = logits((ROWS, VOCAB)).to(dtype)
    keep = torch.tensor([1.0, 1, 1, 1, 0])
    z[4] = torch.nan
    ids, columns = torch.tensor([0, 298, 3, -1, 2]), torch.arange(VOCAB) % 3 == 0
    holes = torch.tensor([[4, 150, -1]]).expand(ROWS, -1).contiguous()
    hole_gradients = torch.linspace(-1, 1, 3, dtype=torch.float64).expand(ROWS, -1).contiguous()
    tau, second, cap = 1.3, 0.6, 4.0
    origin, second_origin, log2_sum, second_log2_sum = 3.0, 2.5, 5.0, 4.0
    factors = (0.3, -0.2, 0.5, 0.1, 0.7, 0.01)
    origins = (origin, second_origin)
    table = numbers(keep, tau, second, cap, *origins, log2_sum, second_log2_sum, *factors)
    width = VOCAB - 1
    arguments = (z, table, ids, columns[:width].contiguous(), holes, width, hole_gradients)
    found = call("_shard_softmax_gradient", *arguments)
    capped = cap * torch.tanh(z.double() / cap)
    expected = torch.full((ROWS, VOCAB), factors[5], dtype=torch.float64)
    for scale, zero, shift, constant, slope, where in (
        (tau, origin, log2_sum, factors[0], factors[1], torch.ones_like(columns)),
        (second, second_origin, second_log2_sum, factors[2], factors[3], columns),
    ):
        x = (capped - zero) / scale / LN2 - shift
        expected += where * 2**x * (constant + slope * x)
    for row in range(3):
        expected[row, ids[row]] += factors[4]
    expected[:, [4, 150]] = hole_gradients[:, :2]
    expected *= 1 - torch.tanh(z.double() / cap) ** 2
    expected[:, width:] = 0
    expected[4] = 0
    near(found, expected, dtype)
    into = torch.full_like(z, torch.nan)
    call("_shard_softmax_gradient_into", into, *arguments)
    assert torch.equal(into, found)


def pair(name, student, teacher, keep, tau, tau_t, beta, alpha, caps):
    """The table of one process that has all columns."""
    frames = []
    for z, scale, cap in ((student, tau, caps[0]), (teacher, tau_t, caps[1])):
        x = reference._rows.softcapped(z.double(), cap)
        if name in NEED_LABELS:
            x = x.masked_fill(IS_LABEL, -torch.inf)
        top = x.nan_to_num(-torch.inf).amax(1)
        frames += [top, ((x - top.unsqueeze(1)) / scale).logsumexp(1) / LN2]
    return numbers(keep, tau, tau_t, beta, alpha, *caps, *frames)


@pytest.mark.parametrize("near_rows", [False, True])
@pytest.mark.parametrize("name", ALL_DIVERGENCES)
def test_sums_and_gradients(backend, name, near_rows):
    """One process that has all columns: the value, and the gradients of value and softmaxes."""
    student, teacher = (logits((ROWS, VOCAB)) for _ in range(2))
    if near_rows:
        teacher = student + 1e-3 * teacher
    if name in ("jsd", "skew_kl", "skew_reverse_kl", "mixed_kl"):
        beta = torch.tensor([0.0, 1.0, 0.3, 0.5, 0.5], dtype=torch.float64)
    else:
        beta = torch.full((ROWS,), 0.3, dtype=torch.float64)
    keep = torch.tensor([1.0, 1, 1, 1, 0])
    tau, tau_t = (1.3, 1.3) if near_rows else (1.3, 0.8)
    caps = (math.inf, math.inf) if near_rows else (6.0, math.inf)
    table = pair(name, student, teacher, keep, tau, tau_t, beta, 0.4, caps)
    place = CHOICES["softmax_divergence.divergence"][name]
    sums = call("_shard_sums", student, teacher, table, LABELS, place, VOCAB)
    inputs = [x.double().requires_grad_() for x in (student, teacher)]
    options = {
        "divergence": name,
        "beta": beta,
        "alpha": 0.4,
        **({"alpha": 0.0, "beta": 1.0} if name in NEED_LABELS else {}),
        "labels": LABELS,
        "label_weight": 0.0,
        "temperature": tau,
        "teacher_temperature": tau_t,
        "logit_softcap": None if near_rows else (caps[0], None),
        "mask": keep.bool(),
        "reduction": "none",
    }
    expected = reference.softmax_divergence(*inputs, **options)
    torch.testing.assert_close(
        sums[0],
        expected.detach(),
        rtol=1e-4 if near_rows else 2e-6,
        atol=0 if near_rows else 2e-6,
    )
    total = expected.sum()
    own, token, at_one_factor = (0.3, 0.2), (-0.4, 0.6), (0.7, 0.0)
    at_one = None
    for side, (x, scale) in enumerate(zip(inputs, (tau, tau_t), strict=True)):
        z = reference._rows.softcapped(x, caps[side])
        others = z.masked_fill(IS_LABEL, -torch.inf) if name in NEED_LABELS else z
        parts = own[side] * scale * (others / scale).logsumexp(1)
        parts = parts + at_one_factor[side] * others.logsumexp(1)
        parts = parts + token[side] * z.gather(1, LABELS.clamp(min=0).unsqueeze(1)).squeeze(1)
        total = total + parts[keep.bool()].sum()
        if side == 0:
            at_one = (others - others.amax(1, keepdim=True)).logsumexp(1).detach() / LN2
    total.backward()
    for side, x in enumerate(inputs):
        factors = numbers(1.0, own[side], token[side], at_one_factor[side], at_one)
        extra = torch.stack([sums[0], sums[1 + side], *factors])
        arguments = (student, teacher, torch.cat([table, extra]), LABELS, place, VOCAB, bool(side))
        found = call("_shard_gradient", *arguments)
        assert (found[4] == 0).all()
        torch.testing.assert_close(found.double(), x.grad, rtol=1e-4, atol=2e-6)
        into = torch.full_like(student, torch.nan)
        call("_shard_gradient_into", into, *arguments)
        assert torch.equal(into, found)


def test_infinite_and_nan_rows(backend):
    student, teacher = (logits((ROWS, VOCAB)) for _ in range(2))
    student[1, 5], teacher[2, 5], student[3, 0] = -torch.inf, -torch.inf, torch.nan
    ones = torch.ones(ROWS)
    infinite = {
        "forward_kl": 1,
        "reverse_kl": 2,
        "cross_entropy": 1,
    }
    for name in DIVERGENCES:
        table = pair(name, student, teacher, ones, 1.0, 1.0, 0.5, 0.4, (math.inf, math.inf))
        place = CHOICES["softmax_divergence.divergence"][name]
        sums = call("_shard_sums", student, teacher, table, LABELS, place, VOCAB)
        assert sums[0].isnan().tolist() == [False, False, False, True, False]
        if name in infinite:
            assert sums[0].isinf().tolist() == [i == infinite[name] for i in range(ROWS)]
        assert sums[1, [0, 1, 2, 4]].isfinite().all()
        assert sums[2, [0, 1, 2, 4]].isfinite().all()


def test_strides_and_dtypes(backend):
    """Other strides, and a teacher of another dtype, give the same as contiguous float32."""
    student, teacher = (logits((ROWS, VOCAB)) for _ in range(2))
    table = pair("jsd", student, teacher, torch.ones(ROWS), 1.0, 1.0, 0.5, 1.0, (math.inf,) * 2)
    place = CHOICES["softmax_divergence.divergence"]["jsd"]
    expected = call("_shard_sums", student, teacher, table, LABELS, place, VOCAB)
    wide = torch.stack([student, student], -1)[..., 0]
    assert torch.equal(
        call("_shard_sums", wide, teacher.T.contiguous().T, table, LABELS, place, VOCAB), expected
    )
    half = teacher.half()
    table = pair("jsd", student, half, torch.ones(ROWS), 1.0, 1.0, 0.5, 1.0, (math.inf,) * 2)
    same = call("_shard_sums", student, half.float(), table, LABELS, place, VOCAB)
    assert torch.equal(call("_shard_sums", student, half, table, LABELS, place, VOCAB), same)


def test_no_rows(backend):
    z = torch.empty(0, 7)
    empty = torch.empty(0, dtype=torch.int64)
    table = torch.empty(4, 0, dtype=torch.float64)
    found = call("_shard_statistics", z, table, empty, None, None, 7, 15)
    assert found.shape == (11, 0)


def test_opcheck():
    student, teacher = (logits((ROWS, VOCAB)) for _ in range(2))
    ids = torch.arange(ROWS)
    place = CHOICES["softmax_divergence.divergence"]["jsd"]
    table = pair("jsd", student, teacher, torch.ones(ROWS), 1.0, 1.0, 0.5, 1.0, (math.inf,) * 2)
    more = torch.cat([table, torch.ones(7, ROWS, dtype=torch.float64)])
    side = torch.ones(4, ROWS, dtype=torch.float64)
    softmax = torch.ones(14, ROWS, dtype=torch.float64)
    tests = {
        "_shard_statistics": (student, side, ids, None, None, VOCAB, 15),
        "_shard_sums": (student, teacher, table, ids, place, VOCAB),
        "_shard_gradient": (student, teacher, more, ids, place, VOCAB, True),
        "_shard_gradient_into": (student.clone(), student, teacher, more, ids, place, VOCAB, False),
        "_shard_softmax_gradient": (student, softmax, ids, None, None, VOCAB, None),
        "_shard_softmax_gradient_into": (
            student.clone(),
            student,
            softmax,
            ids,
            None,
            None,
            VOCAB,
            None,
        ),
    }
    for name, arguments in tests.items():
        torch.library.opcheck(getattr(torch.ops.fastkd, name).default, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": torch.ones(3, ROWS, dtype=torch.float64)}, "numbers must be contiguous with"),
        ({"table": torch.ones(4, ROWS)}, "numbers must be contiguous with"),
        ({"ids": torch.zeros(ROWS - 1, dtype=torch.int64)}, "token_ids must be contiguous with"),
        ({"columns": torch.ones(VOCAB - 1, dtype=torch.bool)}, "columns must be contiguous with"),
        ({"holes": torch.zeros(ROWS + 1, 2, dtype=torch.int64)}, "holes must have shape"),
        ({"vocab_size": VOCAB + 1}, "has only 300 columns"),
    ],
)
def test_errors(backend, change, message):
    given = {
        "logits": logits((ROWS, VOCAB)),
        "table": torch.ones(4, ROWS, dtype=torch.float64),
        "ids": torch.zeros(ROWS, dtype=torch.int64),
        "columns": None,
        "holes": None,
        "vocab_size": VOCAB,
        "wanted": 0,
        **change,
    }
    with pytest.raises(RuntimeError, match=message):
        call("_shard_statistics", *given.values())
