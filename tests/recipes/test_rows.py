"""Values of a row that recipes share, and the table of all recipes."""

import math
from pathlib import Path

import pytest
import torch
from cases import logits
from recipe_checks import problem

import fastkd
from fastkd import recipes
from fastkd.recipes import _rows, _table


def test_label_log_probs():
    tensors = problem(torch.float64, "labels")
    z, labels, mask = (tensors[name] for name in ("student_logits", "labels", "mask"))
    z.requires_grad_()
    kept = mask & (labels != -100)
    right = (z / 1.5).log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    right = torch.where(kept, right, 0)
    found = _rows.label_log_probs(z, labels, mask=mask, temperature=1.5)
    torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    weights = torch.rand(found.shape)
    grads = [torch.autograd.grad((x * weights).sum(), z)[0] for x in (found, right)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)
    one = _rows.label_log_probs(z[0, 0], labels[0, 0], mask=mask[0, 0])
    torch.testing.assert_close(one, z[0, 0].log_softmax(-1)[labels[0, 0]])


def test_entropy():
    z, mask = logits((2, 3, 9), torch.float64).requires_grad_(), torch.rand(2, 3) < 0.5
    mask[0, 0] = True
    q = (z / 0.5).softmax(-1)
    right = torch.where(mask, -(q * q.log()).sum(-1), 0)
    found = _rows.entropy(z, temperature=0.5, mask=mask)
    torch.testing.assert_close(found, right, rtol=1e-11, atol=1e-11)
    grads = [torch.autograd.grad(x.sum(), z)[0] for x in (found, right)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-11)
    one_possible = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert _rows.entropy(one_possible).abs() < 1e-6


def test_log_probs_at():
    z, at = logits((2, 3, 9), torch.float64), torch.randint(0, 9, (2, 3, 4), dtype=torch.int32)
    temperature = torch.rand(2, 3).double() + 0.5
    lse = fastkd.token_stats(z, temperature=temperature).student_lse
    right = (z / temperature.unsqueeze(-1)).log_softmax(-1).gather(-1, at.long())
    torch.testing.assert_close(_rows.log_probs_at(z, at, lse, temperature), right)


def test_masked_mean():
    values = torch.tensor([1.0, math.nan, 3.0])
    assert _rows.masked_mean(values, torch.tensor([True, False, True])) == 2
    assert _rows.masked_mean(values, torch.zeros(3, dtype=torch.bool)) == 0


def test_the_table_is_that_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    assert _table.markdown() in text


def test_every_call_has_its_row():
    called = [call for recipe in recipes.RECIPES for call in recipe.calls]
    papers = [(recipe.arxiv, recipe.calls) for recipe in recipes.RECIPES]
    assert len(set(papers)) == len(papers)
    functions = {
        name
        for name in recipes.__all__
        if callable(getattr(recipes, name)) and not isinstance(getattr(recipes, name), type)
    }
    assert set(called) == functions
    for recipe in recipes.RECIPES:
        assert recipe.arxiv in recipes.__doc__
        assert set(recipe.evidence.split("+")) <= set("CTSM")
        for call in recipe.calls:
            recalled = "(recalled, not verified)" in getattr(recipes, call).__doc__
            assert not recalled or "M" in recipe.evidence.split("+")


def test_no_module_is_called_like_what_it_holds():
    folder = Path(recipes.__file__).parent
    assert not {path.stem for path in folder.glob("*.py")} & set(recipes.__all__)


@pytest.mark.parametrize("check", ["share", "choice"])
def test_checks_name_the_argument(check):
    with pytest.raises(ValueError, match="f: x must"):
        getattr(_rows, f"check_{check}")("f", "x", 2, *([("a", "b")] if check == "choice" else []))
