"""What every op is tested on, and how far from float64 it may be.

`cases(op)` gives the option sets of an op, each with a builder of its tensors for a given shape.
Tolerances are the formats' own rounding: a float32 gradient is a few float32 operations away from
the truth, a bfloat16 or float16 one is that, rounded once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

import fastkd
from fastkd._ops.arguments import choices
from fastkd._ops.library import usable_instruction_sets

#: Of softmax_divergence, as the library lists them. One without a definition fails every test.
ALL_DIVERGENCES = choices("softmax_divergence", "divergence")
#: Those that need labels are tested with the option sets that have some.
NEED_LABELS = ("decoupled_kl",)
DIVERGENCES = tuple(name for name in ALL_DIVERGENCES if name not in NEED_LABELS)
#: Numbers of all losses over rows, with two values of each.
ROW_NUMBERS = {
    "temperature": (1.5, 2.5),
    "label_weight": (0.3, 0.7),
    "normalizer": (3.0, 7.0),
    "logit_softcap": (4.0, 9.0),
}
SHAPES = ((0, 5), (1, 1), (3, 1), (4, 7), (2, 3, 33), (5, 1031), (2, 20011), (7,), (0, 3, 4))
GRADIENT_ERROR = {
    torch.float64: 1e-11,
    torch.float32: 2e-6,
    torch.bfloat16: 6e-3,
    torch.float16: 2e-3,
}
# A handful of entries: one may hold nearly all the mass on both sides, and the gradient is then a
# small difference of probabilities that are themselves rounded.
FEW_ENTRIES, FEW_ENTRIES_ERROR = 1000, 2e-5
# Where one side's mass hardly meets the other's, the log of a mixture is nearly constant, and the
# gradient is what is left of it.
MIXTURES = ("jsd", "skew_kl", "skew_reverse_kl", "skew_reverse_kl_detached")
MIXTURE_ERROR = 4e-6
LOSS_ERROR = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}


@dataclass(frozen=True)
class Case:
    """An option set: `options` fixed ones, `rows` those made from the leading shape and vocab."""

    name: str
    options: dict = field(default_factory=dict)
    rows: Callable[[tuple[int, ...], int], dict] = lambda leading, vocab: {}
    teachers: int = 0  # 0: a tensor, else a list of so many

    def build(self, leading: tuple[int, ...], vocab: int) -> dict:
        return {**self.options, **self.rows(leading, vocab)}


def _labels(leading, vocab):
    labels = torch.randint(0, vocab, leading)
    return {"labels": torch.where(torch.rand(leading) < 0.2, -100, labels)}


def _weighted_labels(leading, vocab):
    return {**_labels(leading, vocab), "label_weight": label_weights(leading)}


def label_weights(leading: tuple[int, ...], generator: torch.Generator | None = None):
    """One a row, some of them 0."""
    weights, kind = (torch.rand(leading, generator=generator) for _ in range(2))
    return torch.where(kind < 0.25, 0.0, weights)


def _row_options(teacher_logits: bool = True) -> Iterator[Case]:
    """Options of all losses over rows that need no value of their own for each."""
    yield Case("softcap", {"logit_softcap": 3.0, "reduction": "none"})
    yield Case("softcap-large", {"logit_softcap": 1e4, "temperature": 1.5})
    labelled = {"logit_softcap": (4.0, None), "label_weight": 0.3, "reduction": "sum"}
    yield Case("softcap-labels", labelled, _labels)
    yield Case("softcap-labels-temperature", {**labelled, "temperature": 2.0}, _labels)
    if teacher_logits:
        yield Case("softcap-teacher", {"logit_softcap": (None, 2.5)})
        yield Case("softcaps", {"logit_softcap": (7.0, 2.5), "teacher_temperature": 0.7})
    yield Case("labels-same-temperature", {"label_weight": 2.0}, _labels)
    yield Case("row-label-weights", {"reduction": "none"}, _weighted_labels)
    yield Case("row-label-weights-temperature", {"temperature": 1.7}, _weighted_labels)
    yield Case("elementmean", {"reduction": "elementmean"})
    yield Case("normalizer-tensor", {}, lambda leading, vocab: {"normalizer": torch.tensor(9)})


def _betas(leading, vocab):
    """One a row, some of them 0 and 1, where jsd and its like are other divergences."""
    return {"beta": betas(leading)}


def depends_on_beta(divergence: str) -> bool:
    student, teacher = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5])
    values = [
        fastkd.reference.softmax_divergence(student, teacher, divergence=divergence, beta=beta)
        for beta in (0.3, 0.6)
    ]
    return values[0] != values[1]


def betas(leading: tuple[int, ...], generator: torch.Generator | None = None) -> torch.Tensor:
    beta, kind = (torch.rand(leading, generator=generator) for _ in range(2))
    return torch.where(kind < 0.25, 0.0, torch.where(kind > 0.75, 1.0, beta))


def _softmax_divergence() -> Iterator[Case]:
    for name in DIVERGENCES:
        yield Case(name, {"divergence": name, "reduction": "none"})
        yield Case(f"{name}-mean", {"divergence": name, "beta": 0.1})
        yield Case(
            f"{name}-temperatures",
            {"divergence": name, "temperature": 2.0, "teacher_temperature": 0.7},
        )
        yield Case(
            f"{name}-labels",
            {"divergence": name, "temperature": 3.0, "label_weight": 0.3, "reduction": "sum"},
            _labels,
        )
    for name in NEED_LABELS:
        labelled = {"divergence": name, "beta": 3.0, "alpha": 0.7, "label_weight": 0.3}
        yield Case(name, {**labelled, "reduction": "none", "label_weight": 0.0}, _labels)
        yield Case(f"{name}-labels", labelled, _labels)
        yield Case(f"{name}-temperature", {**labelled, "temperature": 3.0}, _labels)
        yield Case(
            f"{name}-teachers-probs",
            {**labelled, "teacher_mix": "probs", "teacher_temperature": 2.0},
            _labels,
            teachers=2,
        )
        yield Case(f"{name}-softcap", {**labelled, "logit_softcap": 5.0}, _labels)
        yield Case(
            f"{name}-rows",
            {"divergence": name, "reduction": "none"},
            lambda leading, vocab: {
                **_weighted_labels(leading, vocab),
                "alpha": betas(leading),
                "beta": 5 * betas(leading),
            },
        )
    yield Case("jsd-beta-0", {"divergence": "jsd", "beta": 0.0})
    yield Case("jsd-beta-1", {"divergence": "jsd", "beta": 1.0})
    yield Case("skew-beta-0", {"divergence": "skew_kl", "beta": 0.0})
    yield Case("skew-reverse-beta-0", {"divergence": "skew_reverse_kl", "beta": 0.0})
    for name in filter(depends_on_beta, DIVERGENCES):
        yield Case(f"{name}-row-betas", {"divergence": name, "reduction": "none"}, _betas)
        yield Case(
            f"{name}-row-betas-mask",
            {"divergence": name, "temperature": 1.5},
            lambda leading, vocab: {
                **_betas(leading, vocab),
                "mask": torch.rand(leading) < 0.7,
                **_labels(leading, vocab),
            },
        )
    yield Case("forward_kl-row-betas", {"reduction": "none"}, _betas)
    for alpha, beta in ((0.2, 0.7), (0.7, 0.2), (0.5, -0.5), (0.0, 0.0), (2.0, -0.5)):
        options = {"divergence": "alpha_beta", "alpha": alpha, "beta": beta}
        yield Case(f"alpha-beta-{alpha}-{beta}", options)
    yield Case(
        "alpha-beta-rows",
        {"divergence": "alpha_beta", "reduction": "none"},
        lambda leading, vocab: {"alpha": betas(leading), "beta": betas(leading).bfloat16()},
    )
    yield Case("square", {"temperature": 2.0, "square_temperature": True, "reduction": "batchmean"})
    yield from _row_options()
    yield Case("normalizer", {"normalizer": 17.0})
    yield Case(
        "weight-and-mask",
        {"reduction": "mean"},
        lambda leading, vocab: {
            "weight": torch.rand(leading) * (torch.rand(leading) < 0.8),
            "mask": torch.rand(leading) < 0.7,
        },
    )
    yield Case(
        "row-temperatures",
        {"square_temperature": True, "divergence": "jsd"},
        lambda leading, vocab: {
            "temperature": torch.rand(leading) + 0.5,
            "teacher_temperature": torch.rand(leading).double() + 0.5,
        },
    )
    for name in DIVERGENCES:
        yield Case(f"{name}-softcap", {"divergence": name, "logit_softcap": 5.0})
    for mix in ("logits", "probs"):
        capped = {"logit_softcap": (5.0, 3.0), "teacher_mix": mix, "temperature": 1.5}
        yield Case(f"softcap-teachers-{mix}", capped, teachers=3)
    for name in ("forward_kl", "jsd"):
        yield Case(f"{name}-teachers-logits", {"divergence": name, "temperature": 1.5}, teachers=3)
        yield Case(
            f"{name}-teachers-contrast",
            {"divergence": name, "teacher_weights": [1.7, -0.7]},
            teachers=2,
        )
        yield Case(
            f"{name}-teachers-probs",
            {"divergence": name, "teacher_mix": "probs", "teacher_temperature": 2.0},
            teachers=3,
        )
        yield Case(
            f"{name}-teachers-row-weights",
            {"divergence": name, "teacher_mix": "probs"},
            lambda leading, vocab: {
                "teacher_weights": torch.softmax(torch.randn(*leading, 2), -1),
                "temperature": torch.rand(leading) + 0.5,
            },
            teachers=2,
        )
    for mix in ("contrast", "share"):
        options = {"divergence": "reverse_kl", "teacher_mix": mix}
        yield Case(
            f"teachers-{mix}",
            {**options, "teacher_weights": [0.8, 0.1], "teacher_temperature": 2.0},
            lambda leading, vocab: {**_labels(leading, vocab), "mask": torch.rand(leading) < 0.7},
            teachers=2,
        )
        yield Case(
            f"teachers-{mix}-rows",
            {**options, "reduction": "none", "logit_softcap": (5.0, 3.0)},
            lambda leading, vocab: {"teacher_weights": torch.rand(*leading, 2) + 0.1},
            teachers=2,
        )
    yield Case("one-teacher-in-a-list", {"divergence": "reverse_kl"}, teachers=1)
    yield Case("vocab-size", {}, lambda leading, vocab: {"vocab_size": max(1, vocab - 3)})


def _topk_divergence() -> Iterator[Case]:
    yield Case("softcap-uniform", {"logit_softcap": 3.0, "tail": "uniform"})
    yield Case("softcap-renormalize", {"logit_softcap": 3.0, "tail": "renormalize"})
    yield Case("softcap-uniform-labels", {"logit_softcap": 3.0, "tail": "uniform"}, _labels)
    divergences, tails = (
        ("forward_kl", "reverse_kl", "jsd", "cross_entropy"),
        ("lump", "uniform", "renormalize", "drop"),
    )
    for name in divergences:
        for tail in tails:
            options = {"divergence": name, "tail": tail}
            yield Case(f"{name}-{tail}", {**options, "reduction": "none"})
            yield Case(
                f"{name}-{tail}-temperatures",
                {**options, "temperature": 2.0, "stored_temperature": 1.5, "beta": 0.2},
            )
            yield Case(f"{name}-{tail}-floor", {**options, "min_log_prob": -4.0})
    for tail in tails:
        options = {"tail": tail, "temperature": 3.0, "teacher_temperature": 1.0}
        yield Case(f"{tail}-labels", {**options, "label_weight": 0.3, "reduction": "sum"}, _labels)
        yield Case(f"{tail}-cap", {"tail": tail, "max_token_loss": 0.5, "reduction": "none"})
    for tail in tails:
        yield Case(f"row-betas-{tail}", {"divergence": "jsd", "tail": tail}, _betas)
    yield Case("forward_kl-row-betas", {"reduction": "none"}, _betas)
    yield Case("jsd-beta-0", {"divergence": "jsd", "beta": 0.0, "tail": "drop"})
    yield Case("jsd-beta-1", {"divergence": "jsd", "beta": 1.0, "tail": "drop"})
    yield Case(
        "square", {"temperature": 2.0, "stored_temperature": 2.0, "square_temperature": True}
    )
    yield Case(
        "square-cap", {"temperature": 2.0, "square_temperature": True, "max_token_loss": 3.0}
    )
    yield from _row_options(teacher_logits=False)
    yield Case(
        "weight-and-mask",
        {"reduction": "batchmean"},
        lambda leading, vocab: {
            "weight": torch.rand(leading) * (torch.rand(leading) < 0.8),
            "mask": torch.rand(leading) < 0.7,
        },
    )
    yield Case(
        "row-temperatures",
        {"square_temperature": True, "divergence": "jsd", "stored_temperature": 0.8},
        lambda leading, vocab: {
            "temperature": torch.rand(leading) + 0.5,
            "teacher_temperature": torch.rand(leading).double() + 0.5,
        },
    )


def _clipped_divergence() -> Iterator[Case]:
    capped = {"logit_softcap": 5.0, "tail": "lump"}
    yield Case("softcap-soft", {**capped, "softness": 0.02}, _labels)
    # Soft: which of two nearly equal capped logits a hard edge keeps is up to their rounding.
    yield Case("softcap-quantile", {**capped, "quantile": True, "softness": 0.05})
    yield Case("softcap-renormalized", {**capped, "renormalize": "both"})
    for renormalize in ("none", "teacher", "both"):
        for tail in ("drop", "lump"):
            options = {"renormalize": renormalize, "tail": tail}
            name = f"{renormalize}-{tail}"
            yield Case(name, {**options, "reduction": "none"})
            yield Case(f"{name}-soft", {**options, "softness": 0.02, "temperature": 1.5})
            yield Case(f"{name}-quantile", {**options, "quantile": True, "reduction": "sum"})
            yield Case(f"{name}-soft-quantile", {**options, "quantile": True, "softness": 0.05})
            yield Case(f"{name}-label", options, _labels)
    yield Case("label-not-kept", {"keep_label": False}, _labels)
    yield Case("label-soft", {"softness": 0.01, "renormalize": "both"}, _labels)
    yield Case("label-term", {"label_weight": 0.7, "reduction": "sum"}, _labels)
    yield Case("label-term-temperature", {"label_weight": 0.7, "temperature": 2.0}, _labels)
    yield Case("square", {"temperature": 2.0, "square_temperature": True, "tail": "lump"})
    yield from _row_options()
    yield Case(
        "weight-and-mask",
        {"reduction": "batchmean", "tail": "lump"},
        lambda leading, vocab: {
            "weight": torch.rand(leading) * (torch.rand(leading) < 0.8),
            "mask": torch.rand(leading) < 0.7,
        },
    )
    yield Case(
        "row-temperatures",
        {"square_temperature": True, "softness": 0.03, "tail": "lump"},
        lambda leading, vocab: {
            "temperature": torch.rand(leading) + 0.5,
            "teacher_temperature": torch.rand(leading).double() + 0.5,
        },
    )


def cases(op: str) -> list[Case]:
    return list(
        {
            "softmax_divergence": _softmax_divergence,
            "topk_divergence": _topk_divergence,
            "clipped_divergence": _clipped_divergence,
        }[op]()
    )


def spread(cases: list[Case]) -> list[Case]:
    """Each divergence with one of the option sets that all of them have, and all other cases.

    For what does not depend on the pair: every divergence and every option set is still there.
    """
    of = {d: [c for c in cases if c.name == d or c.name.startswith(f"{d}-")] for d in DIVERGENCES}
    names = [{c.name[len(d) :] for c in mine} for d, mine in of.items()]
    common = sorted(set.intersection(*names))
    dropped = {
        f"{divergence}{suffix}"
        for i, divergence in enumerate(DIVERGENCES)
        for j, suffix in enumerate(common)
        if (i - j) % len(common)
    }
    return [case for case in cases if case.name not in dropped]


def top_k(
    shape: tuple[int, ...], k: int, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A teacher's k best log-probabilities and their indices, in an order of no meaning."""
    log_probs = (logits(shape, torch.float64) / temperature).log_softmax(-1)
    values, indices = log_probs.topk(min(k, shape[-1]), -1)
    order = torch.randperm(values.size(-1))
    return values[..., order].float(), indices[..., order].int()


def logits(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, spread: float = 3.0
) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * spread).to(dtype)


def allowed_error(exact: torch.Tensor, dtype: torch.dtype, divergence: str = "") -> float:
    """How far, in norm, a gradient of `dtype` may be from the exact one."""
    error = GRADIENT_ERROR[dtype]
    if dtype != torch.float64:
        if divergence in MIXTURES:
            error = max(error, MIXTURE_ERROR)
        if exact.size(-1) < FEW_ENTRIES:
            error = max(error, FEW_ENTRIES_ERROR)
    # float16 has no numbers between 0 and 2^-24.
    floor = 2**-25 * exact.numel() ** 0.5 if dtype == torch.float16 else 5e-7
    return error * exact.norm().item() + floor


def assert_derivatives(function: Callable, inputs) -> None:
    """gradcheck, and gradgradcheck on one instruction set.

    Second derivatives are the definition's, in plain PyTorch: no kernel takes part in them.
    """
    assert torch.autograd.gradcheck(function, inputs)
    if fastkd.cpu_capability() == usable_instruction_sets()[0]:
        assert torch.autograd.gradgradcheck(function, inputs)


def relative_error(found: torch.Tensor, true: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    size = true.double().norm().item()
    error = (found.double() - true.double()).norm().item()
    return error / size if size else error
