"""Recipes of diffusion models against their definitions in loops."""

import math

import pytest
import torch
from cases import logits
from recipe_checks import Entry, at_once, mixed_dtypes, one_graph, promises

from fastkd import recipes

B, FRAMES, PIXELS = 3, 4, 5


def samples(*names):
    return lambda dtype: {name: logits((B, FRAMES, PIXELS), dtype, 1.5) for name in names}


def plain_generator(x, real, fake, alpha=1.0):
    total = 0
    for a, r, f in zip(x.flatten(1), real.flatten(1), fake.flatten(1), strict=True):
        n = len(a)
        weight = max(float((a - r).detach().abs().sum()) / n, 1e-5)
        for i in range(n):
            term = (r[i] - f[i]) * ((r[i] - a[i]) - alpha * (r[i] - f[i]))
            total = total + term / weight
    return total / B


def plain_score(prediction, target, snr=None):
    total = 0
    for b in range(B):
        factor = 1 if snr is None else snr[b] / (snr[b] + 1)
        for u, v in zip(prediction[b].flatten(), target[b].flatten(), strict=True):
            total = total + factor * (u - v) ** 2
    return total / B


def with_snr(dtype):
    found = samples("prediction", "target")(dtype)
    return {**found, "snr": torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)}


def plain_flow(prediction, velocity, weight=None, mask=None):
    terms = []
    for b in range(B):
        for f in range(FRAMES):
            if mask is None or mask[b, f]:
                square = sum((prediction[b, f, i] - velocity[b, f, i]) ** 2 for i in range(PIXELS))
                factor = 1 if weight is None else weight[b, f]
                terms.append(factor * square / PIXELS)
    return sum(terms) / len(terms)


def weighted_frames(dtype):
    found = samples("prediction", "velocity")(dtype)
    mask = torch.rand(B, FRAMES) < 0.7
    mask[0] = True
    return {**found, "weight": torch.rand(B, FRAMES), "mask": mask}


UNMASKED = {"reductions": (), "read": None}
ENTRIES = [
    *(
        Entry(
            "sid_generator",
            at_once(plain_generator),
            options,
            samples("x", "real", "fake"),
            ("x", "real", "fake"),
            **UNMASKED,
            published={"alpha": 1.0},
            bf16_error=2e-2,
        )
        for options in ({}, {"alpha": 1.2}, {"alpha": 0.5})
    ),
    *(
        Entry(
            "sid_score",
            at_once(plain_score),
            {},
            problem,
            ("prediction", "target"),
            **UNMASKED,
            published={"snr": None},
        )
        for problem in (samples("prediction", "target"), with_snr)
    ),
    Entry(
        "stream_dit",
        at_once(plain_flow),
        {},
        samples("prediction", "velocity"),
        ("prediction", "velocity"),
        **UNMASKED,
        published={"weight": None},
    ),
    Entry(
        "stream_dit",
        at_once(plain_flow),
        {},
        weighted_frames,
        ("prediction",),
        (),
    ),
]
test_promises = promises(ENTRIES)
test_one_graph = one_graph(ENTRIES)
test_mixed_dtypes = mixed_dtypes(ENTRIES)


def test_the_generators_loss_with_alpha_one():
    given = samples("x", "real", "fake")(torch.float64)
    x, real, fake = given.values()
    weight = (x - real).abs().mean((1, 2), keepdim=True)
    right = ((real - fake) * (fake - x) / weight).sum() / B
    torch.testing.assert_close(recipes.sid_generator(**given), right)


def test_samples_with_nan_are_dropped():
    for name, call in (("fake", recipes.sid_generator), ("target", recipes.sid_score)):
        names = ("x", "real", "fake") if name == "fake" else ("prediction", "target")
        given = samples(*names)(torch.float32)
        rest = call(**{k: x[1:] for k, x in given.items()}) * (B - 1) / B
        given[name][0, 1, 2] = math.nan
        leaves = [x.requires_grad_() for x in given.values()]
        loss = call(**given)
        torch.testing.assert_close(loss, rest)
        for gradient in torch.autograd.grad(loss, leaves):
            assert not gradient[0].any()
            assert gradient[1:].isfinite().all()
    assert call(torch.full((2, 3), math.nan), torch.zeros(2, 3)) == 0


def test_a_generator_at_its_target():
    """The weight is at least 1e-5."""
    x = torch.zeros(2, 3, requires_grad=True)
    loss = recipes.sid_generator(x, x.detach(), x.detach() + 1e-3)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(B,), (B, FRAMES)])
def test_the_velocity_is_the_derivative_of_the_inputs(shape):
    clean, noise = samples("clean", "noise")(torch.float64).values()
    t, step = torch.rand(shape, dtype=torch.float64), 1e-6
    found = recipes.stream_dit_inputs(clean, noise, t, sigma_min=1e-2)
    above, below = (
        recipes.stream_dit_inputs(clean, noise, t + x, sigma_min=1e-2).inputs for x in (step, -step)
    )
    torch.testing.assert_close((above - below) / (2 * step), found.velocity, rtol=1e-7, atol=1e-7)
    for b in range(B):
        for f in range(FRAMES):
            at = t[b] if len(shape) == 1 else t[b, f]
            right = at * clean[b, f] + (1 - 0.99 * at) * noise[b, f]
            torch.testing.assert_close(found.inputs[b, f], right)
    torch.testing.assert_close(
        recipes.stream_dit_inputs(clean, noise, torch.ones(shape), sigma_min=0.0).inputs, clean
    )


def test_distillation_of_steps():
    """A student that takes the teacher's steps at once has no loss."""
    x = torch.randn(B, FRAMES, PIXELS, dtype=torch.float64)
    teacher = x
    for _ in range(4):
        teacher = teacher + 0.25 * torch.tanh(teacher)
    assert recipes.stream_dit(teacher, teacher) == 0
    right = (x - teacher).square().mean()
    torch.testing.assert_close(recipes.stream_dit(x, teacher), right)


def test_weights_of_videos_are_those_of_their_frames():
    given = weighted_frames(torch.float64)
    pair = given["prediction"], given["velocity"]
    weight = torch.rand(B, dtype=torch.float64)
    frames = weight.unsqueeze(-1).expand(B, FRAMES)
    right = recipes.stream_dit(*pair, weight=frames)
    torch.testing.assert_close(recipes.stream_dit(*pair, weight=weight), right)


def test_errors_name_the_recipe_and_the_argument():
    x, t = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    mask, leaf = t > 0, torch.zeros(2, 3, requires_grad=True)
    wrong = [
        (recipes.sid_generator, (x, x, x[:1]), {}, "fake must have the shape"),
        (recipes.sid_generator, (x, x, x), {"alpha": "1"}, "alpha must be a number"),
        (recipes.sid_generator, (mask, x, x), {}, "x must be floating-point"),
        (recipes.sid_score, (x, x[0]), {}, "target must have the shape"),
        (recipes.sid_score, (x, x), {"snr": t}, r"snr must be float \[2\]"),
        (recipes.stream_dit_inputs, (x, x, t[:1]), {"sigma_min": 0.0}, "t must be one a video or"),
        (recipes.stream_dit_inputs, (x, x[:1], t), {"sigma_min": 0.0}, "noise must have the shape"),
        (recipes.stream_dit_inputs, (x, x, t), {"sigma_min": 2.0}, "sigma_min must lie in"),
        (recipes.stream_dit, (x, x[:1]), {}, "velocity must have the shape"),
        (recipes.stream_dit, (x, x), {"mask": t}, "mask must be bool"),
        (recipes.stream_dit, (x, x), {"mask": mask[:1]}, "mask must be bool"),
        (recipes.stream_dit, (x, x), {"weight": leaf}, "weight takes no gradient"),
        (recipes.stream_dit, (x, x), {"weight": mask}, "weight must be float"),
    ]
    for function, arguments, options, message in wrong:
        with pytest.raises((ValueError, TypeError), match=message) as caught:
            function(*arguments, **options)
        assert str(caught.value).startswith(f"{function.__name__}: ")
