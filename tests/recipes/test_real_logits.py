"""Recipes in float32 on logits of SmolLM2 over its 49,152 tokens, against eager float64.

The teacher has read a whole text, the student its last tokens alone, the reference some more.
"""

import os
from functools import partial
from pydoc_data.topics import topics

import pytest
import smollm2
import torch
from cases import relative_error
from test_wide_vocabulary import RECIPES as WIDE
from test_wide_vocabulary import at, kl, log_softmaxes

from benchmarks.recipe_cases import RECIPES as BENCHMARKED
from fastkd import ByteVocab, recipes

#: Tokens of a text that are scored, and how many before each model has read.
LENGTH, TEACHER, REFERENCE, STUDENT = 8, 64, 16, 4
TOPICS = ("assignment", "for", "numbers", "strings")
#: Of values and gradients, relative.
ERROR = 2e-5


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """Logits by the names of their arguments, from a file that the session's workers share."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    path = folder / "smollm2.pt"
    if not path.exists():
        mine = path.with_name(f"{path.name}.{os.getpid()}")
        torch.save(read(), mine)
        mine.replace(path)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def read():
    tokenizer, model = smollm2.load()
    ids = [tokenizer(topics[name], add_special_tokens=False)["input_ids"] for name in TOPICS]
    ids = torch.tensor([x[: TEACHER + LENGTH + 1] for x in ids])
    found = {"labels": ids[:, -LENGTH:]}
    for name, context in (("y", TEACHER), ("r", REFERENCE), ("z", STUDENT)):
        found[name] = model(ids[:, -LENGTH - 1 - context : -1]).logits[:, -LENGTH:].clone()
    tokens = ByteVocab.from_tokenizer(tokenizer).tokens
    tokens += [None] * (found["z"].size(-1) - len(tokens))
    found["first"] = torch.tensor([x[0] if x else 256 for x in tokens])
    return found


def with_label(exact, call):
    return exact, lambda z, y, labels, **_: call(z, y, labels)


def without_label(exact, call):
    return exact, lambda z, y, **_: call(z, y)


def eager_sequence_kd(z, labels, **_):
    return -at(z.log_softmax(-1), labels).mean()


def eager_ddk(z, y, labels, **_):
    q, p = log_softmaxes(z, y)
    return (0.2 * kl(p, q) - at(q, labels)).mean()


def eager_distillspec(z, y, **_):
    q, p = log_softmaxes(z, y)
    return (p.exp() - q.exp()).abs().sum(-1).mean() / 2


def eager_select_tkd(z, y, **_):
    q, p = log_softmaxes(z, y)
    accepted = (y.topk(5).indices == z.argmax(-1, keepdim=True)).any(-1)
    return (kl(p, q) * torch.where(accepted, 1.0, 0.01)).mean()


def eager_tip(z, y, **_):
    q, p = log_softmaxes(z, y)
    losses = kl(q, p)
    h, d = (-(q.exp() * q).sum(-1)).detach(), losses.detach()
    h, d = ((x - x.min()) / (x.max() - x.min()) for x in (h, d))
    scores = h + d - h * d
    return losses[scores >= scores.quantile(0.5)].mean()


def eager_eopd(z, y, **_):
    q, p = log_softmaxes(z, y)
    best = p.topk(100).indices
    parts = (x.gather(-1, best) for x in (q, p))
    few_q, few_p = (torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1) for x in parts)
    uncertain = -(p.exp() * p).sum(-1) >= 0.8
    return (kl(q, p) + torch.where(uncertain, kl(few_p, few_q), 0)).mean()


def eager_byte_kd(z, y, first, **_):
    q, p = (
        torch.zeros(*x.shape[:-1], 257).double().index_add(-1, first, x.softmax(-1))[..., :256]
        for x in (z, y)
    )
    q, p = (x / x.sum(-1, keepdim=True) for x in (q, p))
    q, p = q[..., seen := p.sum((0, 1)) > 0], p[..., seen]
    m = (q + p) / 2
    return (torch.xlogy(q, q / m) + torch.xlogy(p, p / m)).sum(-1).mean() / 2


def byte_kd(z, y, first, **_):
    vocab = ByteVocab([bytes([x]) if x < 256 else None for x in first.tolist()])
    return recipes.byte_kd(z, y, vocab, vocab)


def another_vocabulary(width):
    """The teacher's columns in another order, the student's ids there, and a second id for some."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    ids, v = order.argsort(), torch.arange(width)
    first = torch.tensor([0.5, 0.8, 1.0, 1.0, 1.0])[v % 5]
    second = torch.where(first < 1, ids.roll(1), -1)
    shared = torch.where(v % 3 == 0, -1, ids)
    return order, shared, (torch.stack([ids, second], -1), torch.stack([first, 1 - first], -1))


def shared_pairs(z, y):
    """Rows that score a text's tokens but the first; shared columns of both sides."""
    order, shared, _ = another_vocabulary(z.size(-1))
    known = shared >= 0
    return z[:, :-1], y[:, :-1, order], known.nonzero()[:, 0], shared[known]


def others(x, columns):
    mask = torch.ones(x.size(-1), dtype=torch.bool)
    mask[columns] = False
    return x[..., mask].exp().sort(-1, descending=True).values


def eager_strict_topk(z, y, **_):
    z, y, mine, its = shared_pairs(z, y)
    best = z[..., mine].topk(16)
    q, p = log_softmaxes(best.values, y[..., its].gather(-1, best.indices))
    return kl(q, p).mean()


def eager_gold(z, y, **_):
    z, y, mine, its = shared_pairs(z, y)
    q, p = log_softmaxes(z, y, temperature=0.9)
    both = q[..., mine], p[..., its]
    m = torch.logaddexp(*both) - torch.tensor(2.0).double().log()
    share = len(mine) / z.size(-1)
    apart = (others(q, mine) - others(p, its)).abs().sum(-1)
    return (share * sum(kl(x, m) for x in both) / 2 + (1 - share) * apart).mean()


def eager_p_kl(z, y, k, **_):
    order, _, (ids, weights) = another_vocabulary(z.size(-1))
    z, y = z[:, :-1], y[:, :-1, order]
    moved = torch.zeros_like(z)
    for u, w in zip(ids.T, weights.double().T, strict=True):
        moved = moved.index_add(-1, u.clamp(min=0), z.softmax(-1) * torch.where(u < 0, 0, w))
    best = y.amax((0, 1)).topk(k).indices
    q = moved[..., best]
    q = q / (q.sum(-1, keepdim=True) + 1e-10) + 1e-10
    return kl(y[..., best].log_softmax(-1), q.log()).mean()


def eager_h_kl(z, y, **_):
    order, _, (ids, weights) = another_vocabulary(z.size(-1))
    q, p = log_softmaxes(z[:, :-1], y[:, :-1, order])
    mine = (weights[:, 0] >= 0.6).nonzero()[:, 0]
    its = ids[mine, 0]
    apart = (others(q, mine) - others(p, its))[..., :8192].abs().sum(-1)
    return ((p[..., its].exp() * (p[..., its] - q[..., mine])).sum(-1) + apart).mean()


def across(call, which, *, ids=False, **options):
    """A call for a teacher with the other vocabulary; every token is a chunk."""

    def run(z, y, labels, **_):
        order, *found = another_vocabulary(z.size(-1))
        chunks = torch.arange(LENGTH).expand(len(z), LENGTH)
        places = (labels, chunks) if ids else (chunks,)
        sides = (z, *places, y[..., order], *places)
        return call(*sides, LENGTH, found[which], **options)

    return run


def eager_bpm(z, y, first, **_):
    mapping = first[another_vocabulary(z.size(-1))[0]]
    p = torch.zeros_like(z).index_add(-1, mapping.clamp(min=0), y.softmax(-1))
    return (torch.xlogy(p, p) - p * z.log_softmax(-1)).sum(-1).mean()


def bpm(z, y, first, **_):
    return recipes.bpm(z, y, first[another_vocabulary(z.size(-1))[0]])


def benchmarked(name):
    recipe = BENCHMARKED[name]
    return (
        lambda z, y, **_: recipe.definition(z.flatten(0, 1), y.flatten(0, 1)).mean(),
        lambda z, y, **_: recipe.ours(z.flatten(0, 1), y.flatten(0, 1)),
    )


RECIPES = {
    **{name: benchmarked(name) for name in BENCHMARKED},
    **WIDE,
    "sequence_kd": (eager_sequence_kd, lambda z, labels, **_: recipes.sequence_kd(z, labels)),
    "ddk": with_label(eager_ddk, recipes.ddk),
    "distillspec": without_label(eager_distillspec, recipes.distillspec),
    "select_tkd": without_label(eager_select_tkd, recipes.select_tkd),
    "tip": without_label(eager_tip, recipes.tip),
    "eopd": without_label(eager_eopd, partial(recipes.eopd, k=100)),
    "byte_kd": (eager_byte_kd, byte_kd),
    "bpm": (eager_bpm, bpm),
    "strict_topk": (eager_strict_topk, across(recipes.strict_topk, 0)),
    "gold": (eager_gold, across(recipes.gold, 0, ids=True)),
    "x_token": (partial(eager_p_kl, k=8192), across(recipes.x_token, 1)),
    "x_token-h_kl": (eager_h_kl, across(recipes.x_token, 1, kind="h_kl")),
}


def undecided(z, y):
    """What the signs of a sorted distance can change in its gradient where rounding decides them.

    Logits are within 32 of their row's largest. Rounded to float32 they move a probability by
    2^-24 x 32 of it, and both sides' by 2^-18. A sign moves the gradient by at most 4 times it.
    """
    q, p = (x.double().softmax(-1).sort(-1, descending=True).values for x in (z, y))
    return (4 * q * ((q - p).abs() <= 2**-18 * q)).sum(-1).norm() / z[..., 0].numel()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_against_eager_float64(name, real):
    exact, call = RECIPES[name]
    given = dict(real)
    z = given.pop("z").requires_grad_()
    exact_z = z.detach().double().requires_grad_()
    wide = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    found, right = call(z, **given), exact(exact_z, **wide)
    torch.testing.assert_close(found.double(), right, rtol=ERROR, atol=0)
    (gradient,), (true,) = torch.autograd.grad(found, z), torch.autograd.grad(right, exact_z)
    allowed = ERROR + (undecided(z, real["y"]) / true.norm() if name == "uld" else 0)
    error = relative_error(gradient, true)
    print(f"{name}: value {(found / right - 1).abs():.1e}, gradient {error:.1e} of {allowed:.1e}")
    assert error < allowed
