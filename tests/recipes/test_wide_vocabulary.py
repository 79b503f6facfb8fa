"""Recipes in float32 over a real vocabulary's width, against eager definitions in float64."""

import pytest
import torch
from cases import relative_error

from fastkd import recipes
from fastkd.recipes._chunks import log_softmax, softmax

TEXTS, LENGTH, VOCAB = 2, 4, 49152  # SmolLM2's


def log_softmaxes(*logits, temperature=1.0):
    return [(z / temperature).log_softmax(-1) for z in logits]


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def at(log_q, labels):
    return log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def eager_kd(z, y, labels, **_):
    q, p = log_softmaxes(z, y, temperature=2.0)
    return (0.9 * 4 * kl(p, q) - 0.1 * at(z.log_softmax(-1), labels)).mean()


def eager_gkd(z, y, **_):
    q, p = log_softmaxes(z, y)
    m = torch.logaddexp(p, q) - torch.tensor(2.0).double().log()
    return (0.5 * kl(p, m) + 0.5 * kl(q, m)).mean()


def eager_distillm(z, y, **_):
    q, p = log_softmaxes(z, y)
    return kl(p, (0.1 * p.exp() + 0.9 * q.exp()).log()).mean()


def eager_taid(z, y, **_):
    q, p = log_softmaxes(z, 0.6 * z.detach() + 0.4 * y)
    return -(p.exp() * q).sum(-1).mean()


def eager_akl(z, y, **_):
    q, p = log_softmaxes(z, y)
    values, order = p.exp().sort(-1, descending=True)
    apart = (values - q.detach().exp().gather(-1, order)).abs()
    head = values.cumsum(-1) <= 0.5
    head[..., 0] = True
    share = (apart * head).sum(-1) / apart.sum(-1)
    return (share * kl(p, q) + (1 - share) * kl(q, p)).mean()


def eager_bild(z, y, **_):
    total = 0
    for leader in (y, z):
        best = leader.topk(8).indices
        i, j = torch.triu_indices(8, 8, 1)
        mine, other = (x.gather(-1, best) for x in (z, y))
        q, p = log_softmaxes(*(x[..., i] - x[..., j] for x in (mine, other)), temperature=3.0)
        total = total + kl(p, q).mean()
    return total


def eager_opd(z, y, labels, **_):
    q, p = (at(x, labels) for x in log_softmaxes(z, y))
    return -((q - q.detach()).exp() * (p - q).detach()).mean()


def eager_opd_topk(z, y, **_):
    q, p = log_softmaxes(z, y)
    best = q.topk(100).indices
    q, p = (x.gather(-1, best) for x in (q, p))
    q, p = (torch.cat([x, torch.log1p(-x.exp().sum(-1, keepdim=True))], -1) for x in (q, p))
    return kl(q, p).mean()


def eager_adaspec(z, y, r, **_):
    q, p, reference = log_softmaxes(z, y, r)
    losses = kl(p, q)
    behind = (losses - kl(p, reference)).detach()
    kept = behind >= torch.quantile(behind, 0.6)
    return losses[kept].mean()


def eager_align_distil(z, y, r, **_):
    q, p, reference = log_softmaxes(z, y, r)
    a = 10 * (p.exp() - reference.exp()).abs().sum(-1) + 1e-3
    target = (y + a.unsqueeze(-1) * (y - r)).log_softmax(-1)
    return (0.1 / a * kl(q, target)).mean(1).mean()


def eager_dparallel(z, labels, **_):
    q = (z / 0.5).log_softmax(-1)
    right = z.argmax(-1) == labels
    entropy = -(q.exp() * q).sum(-1)
    return -at(z.log_softmax(-1), labels).mean() + 2 * entropy[right].mean()


def eager_preference(z, y, labels, **_):
    q, p = (at(x, labels).sum(1) for x in log_softmaxes(z, y))
    chosen, rejected = (q - p).chunk(2)
    return -torch.sigmoid(0.1 * (chosen - rejected)).log().mean()


RECIPES = {
    "kd": (eager_kd, lambda z, y, labels, **_: recipes.kd(z, y, labels)),
    "gkd": (eager_gkd, lambda z, y, **_: recipes.gkd(z, y)),
    "distillm": (eager_distillm, lambda z, y, **_: recipes.distillm(z, y)),
    "taid": (eager_taid, lambda z, y, **_: recipes.taid(z, y, 0.4)),
    "akl": (eager_akl, lambda z, y, **_: recipes.akl(z, y)),
    "bild": (eager_bild, lambda z, y, **_: recipes.bild(z, y)),
    "opd": (eager_opd, lambda z, y, labels, **_: recipes.opd(z, y, labels)),
    "opd_topk": (eager_opd_topk, lambda z, y, **_: recipes.opd_topk(z, y)),
    "adaspec": (eager_adaspec, lambda z, y, r, **_: recipes.adaspec(z, y, r)),
    "align_distil": (eager_align_distil, lambda z, y, r, **_: recipes.align_distil(z, y, r)),
    "dparallel": (
        eager_dparallel,
        lambda z, labels, **_: recipes.dparallel(z, labels, torch.ones_like(labels) > 0),
    ),
    "preference": (
        eager_preference,
        lambda z, y, labels, **_: recipes.preference(z, y, labels),
    ),
}
#: Of the student's logits from the teacher's: early and late in training.
APART = {"far": 1.5, "near": 1e-2}
#: What they compare is rounded to float32 on the way: log-probabilities, or logits of a mixture.
ROUNDED = ("opd", "opd_topk", "preference", "taid", "align_distil")
LARGEST = 16  # of the numbers that are rounded


@pytest.mark.parametrize("apart", APART)
@pytest.mark.parametrize("name", RECIPES)
def test_against_eager_float64(name, apart):
    shape = (TEXTS, LENGTH, VOCAB)
    y = torch.randn(shape) * 2
    y.scatter_(-1, torch.randint(VOCAB, (*shape[:-1], 20)), 6 + 6 * torch.rand(*shape[:-1], 20))
    z, r = (y + torch.randn(shape) * APART[apart] for _ in range(2))
    labels = torch.where(torch.rand(shape[:-1]) < 0.5, z.argmax(-1), y.topk(5).indices[..., 4])
    labels[0, 0] = z[0, 0].argmax()
    given = {"y": y, "r": r, "labels": labels}
    exact, call = RECIPES[name]
    z.requires_grad_()
    found = call(z, **given)
    (gradient,) = torch.autograd.grad(found, z)
    exact_z = z.detach().double().requires_grad_()
    wide = {k: x.double() if x.is_floating_point() else x for k, x in given.items()}
    right = exact(exact_z, **wide)
    (true,) = torch.autograd.grad(right, exact_z)
    error = max(2e-5, 2**-24 * LARGEST / APART[apart] if name in ROUNDED else 0)
    torch.testing.assert_close(found.double(), right, rtol=error, atol=1e-9)
    assert relative_error(gradient, true) < error


def test_probabilities_of_wide_rows():
    """One large term after the other small ones: torch's own sum to 1 within 1e-5 on a CPU."""
    z = torch.full((2, VOCAB), -11.0)
    z[:, 100::7000] = 0
    right = z.double().softmax(-1)
    torch.testing.assert_close(softmax(z).double(), right, rtol=1e-6, atol=0)
    torch.testing.assert_close(log_softmax(z).double(), right.log(), rtol=1e-7, atol=1e-6)
