"""Recipes of segmentation against their definitions in loops."""

import pytest
import torch
from cases import logits
from recipe_checks import (
    Entry,
    at_once,
    mixed_dtypes,
    one_graph,
    one_graph_for_all,
    promises,
)
from test_attention import plain_kl

from fastkd import recipes


def plain_cwd(student_maps, teacher_maps, temperature=4.0):
    losses = [
        temperature**2 * plain_kl((s / temperature).softmax(-1), (t / temperature).softmax(-1))
        for i in range(student_maps.size(0))
        for s, t in zip(student_maps[i].flatten(1), teacher_maps[i].flatten(1), strict=True)
    ]
    return sum(losses) / len(losses)


def maps(dtype):
    return {f"{side}_maps": logits((2, 3, 2, 4), dtype, 3.0) for side in ("student", "teacher")}


def two_paths(dtype):
    return dict(zip(("first_maps", "second_maps"), maps(dtype).values(), strict=True))


def plain_consistency(first_maps, second_maps, weight=5.0):
    there, back = (
        plain_cwd(a, b.detach()) for a, b in ((first_maps, second_maps), (second_maps, first_maps))
    )
    return weight * (there + back)


UNMASKED = {"reductions": (), "read": None}
ENTRIES = [
    Entry(
        "cwd",
        at_once(plain_cwd),
        {},
        maps,
        tuple(maps(torch.float32)),
        **UNMASKED,
        published={"temperature": 4.0},
    ),
    Entry(
        "lad_consistency",
        at_once(plain_consistency),
        {},
        two_paths,
        ("first_maps", "second_maps"),
        **UNMASKED,
        published={"weight": 5.0, "temperature": 4.0},
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)
MAPS = maps(torch.float32)
test_one_graph_for_all_numbers = one_graph_for_all(
    {
        "cwd": lambda x: recipes.cwd(**MAPS, temperature=x),
        "lad_consistency": lambda x: recipes.lad_consistency(*MAPS.values(), weight=x),
    }
)


def test_the_order_of_pixels_does_not_matter_to_cwd():
    given = maps(torch.float64)
    order = torch.randperm(8)
    moved = {k: x.flatten(2)[..., order] for k, x in given.items()}
    torch.testing.assert_close(recipes.cwd(**moved), recipes.cwd(**given))
    # T^2 KL of softmaxes tends to half the variance of the difference over pixels.
    difference = (given["student_maps"] - given["teacher_maps"]).flatten(2)
    limit = difference.var(-1, correction=0).mean() / 2
    torch.testing.assert_close(recipes.cwd(**given, temperature=1e4), limit, rtol=1e-3, atol=0)


def test_label_map():
    labels = torch.tensor([[0, 2, 1], [255, 2, -1]])
    generator = torch.Generator().manual_seed(1)
    values = torch.tensor([1.0, 2.0, 3.0])
    exact = recipes.lad_label_map(labels, 3, noise=0.0, values=values)
    assert exact.tolist() == [[100, 300, 200], [0, 300, 0]]
    only = recipes.lad_label_map(labels, 1, noise=0.0, scale=1.0, values=values[2:])
    assert only.tolist() == [[3, 0, 0], [0, 0, 0]]
    found = [recipes.lad_label_map(labels.expand(500, 2, 3), 3, generator=generator) for _ in "ab"]
    assert not torch.equal(*found)
    for x in found:
        assert x.var(0).sqrt().mean().item() == pytest.approx(3.0, rel=0.1)  # 100 x 0.03
        assert (x[:, 0, 1] - x[:, 1, 1]).mean().abs() < 1
    again = torch.Generator().manual_seed(1)
    first = recipes.lad_label_map(labels.expand(500, 2, 3), 3, generator=again)
    assert torch.equal(first, found[0])


def test_errors_name_the_recipe_and_the_argument():
    x, image = torch.zeros(2, 5), torch.zeros(2, 3, 4, 4)
    y = torch.zeros(2, dtype=torch.int64)
    r = recipes
    wrong = [
        (r.cwd, (x, x), {}, r"student_maps must be \[B, C, H, W\]"),
        (r.cwd, (image, image[:1]), {}, "teacher_maps must have the shape"),
        (r.cwd, (image, image), {"temperature": 0.0}, "temperature must be positive"),
        (r.lad_consistency, (image, image), {"weight": 0.0}, "weight must be positive"),
        (r.lad_label_map, (x, 5), {}, "labels must be int64 or int32"),
        (r.lad_label_map, (y, 0), {}, "num_classes must be positive"),
        (r.lad_label_map, (y, 3), {"values": x}, r"values must be \[3\]"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError, IndexError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
