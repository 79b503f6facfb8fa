"""Calls to ops over rows of logits as data: transformations, results, and how results compare.

A `Problem` is an op's arguments, sorted by what a change of the vocabulary does to them. `shifted`
adds a constant to each row of logits and `widened` inserts masked columns: neither changes a result
except the places of columns.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cases import LOSS_ERROR, allowed_error
from torch import Tensor

import fastkd

# Significant bits of each format.
BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
OUTPUTS = {
    "token_stats": fastkd.token_stats.__globals__["TokenStats"]._fields,
    "token_log_probs": ("log_probs", "entropy"),
    "teacher_topk": ("log_probs", "indices"),
    "chunk_log_likelihood": ("log_likelihood", "boundary_log_prob", "token_count"),
}
# Columns of the vocabulary, which `widened` moves.
COLUMN_OUTPUTS = ("student_argmax", "teacher_argmax", "indices")


@dataclass(frozen=True)
class Problem:
    """The arguments of a call to `op`."""

    op: str
    logits: dict[str, Any]  # [..., vocab] by argument: a tensor, or a list of them
    columns: dict[str, Tensor] = field(default_factory=dict)  # numbers of columns; negative: none
    sets: dict[str, Tensor] = field(default_factory=dict)  # bool [..., vocab]
    options: dict[str, Any] = field(default_factory=dict)
    wanted: tuple[str, ...] = ()  # the arguments whose gradients are compared

    def __str__(self) -> str:
        """What is needed to see which case this is."""
        parts = [
            f"{name}: {list(first.shape)} {first.dtype}, {first.min():g} to {first.max():g}"
            for name, value in self.logits.items()
            for first in (value if isinstance(value, list) else [value])
            if first.numel()
        ]
        options = {
            name: f"tensor{list(value.shape)}" if isinstance(value, Tensor) else value
            for name, value in self.options.items()
            if name != "vocab"
        }
        return f"{self.op}({'; '.join([*parts, *self.columns, *self.sets])}; {options})"


def mapped(problem: Problem, function: Callable[[str, Tensor], Tensor]) -> Problem:
    """The problem with each tensor of logits replaced by function(name, tensor)."""
    logits = {
        name: [function(name, x) for x in value]
        if isinstance(value, list)
        else function(name, value)
        for name, value in problem.logits.items()
    }
    return replace(problem, logits=logits)


def in_float64(problem: Problem) -> Problem:
    """The same numbers in float64."""
    return mapped(problem, lambda _, x: x.double())


def centred(problem: Problem) -> Problem:
    """Relative to the rows' maxima: the reference's own sums are rounded at the logits' size."""
    return mapped(problem, lambda name, x: x - maxima(problem, x))


def maxima(problem: Problem, x: Tensor) -> Tensor:
    """The largest logit of each row among the columns that count; 0 where it is not finite."""
    if not x.numel():
        return x.new_zeros((*x.shape[:-1], 1))
    top = x[..., : problem.options.get("vocab_size")].amax(-1, keepdim=True)
    return torch.where(top.isfinite(), top, 0)


def shifted(problem: Problem, offset: Callable[[str, Tensor], Tensor]) -> Problem:
    """Each row of logits plus a constant: offset(name, logits) has one number a row, or is None."""

    def add(name: str, x: Tensor) -> Tensor:
        by = offset(name, x)
        if by is None:
            return x
        out = (x.double() + by.unsqueeze(-1)).to(x.dtype)
        assert torch.equal(out.double() - by.unsqueeze(-1), x.double()), "the sum is not exact"
        return out

    return mapped(problem, add)


def side_of(name: str) -> str:
    """Of alm_loss the two sides have vocabularies of their own."""
    return name.split("_")[0] if name.startswith(("student", "teacher")) else ""


def widened(
    problem: Problem,
    places: Callable[[str], tuple[int, Tensor]],
    fill: Callable[[str, Tensor], float],
) -> Problem:
    """The problem with masked columns put between its own.

    places(name): the new width, and where each old column stands; fill(name, logits): the mask.
    """

    def widen(name: str, x: Tensor) -> Tensor:
        width, at = places(name)
        out = x.new_full((*x.shape[:-1], width), fill(name, x))
        out[..., at] = x
        return out

    def move(name: str, x: Tensor) -> Tensor:
        at = places(name)[1]
        return torch.where(x < 0, x, at[x.clamp(min=0).long()].to(x.dtype))

    def widen_set(name: str, x: Tensor) -> Tensor:
        width, at = places(name)
        out = torch.rand(*x.shape[:-1], width) < 0.5
        out[..., at] = x
        return out

    options = dict(problem.options)
    if "vocab" in options:
        width, at = places("logits")
        tokens = options["vocab"].tokens
        wide = [
            bytes(b"ab \xff"[i] for i in row) for row in torch.randint(0, 4, (width, 3)).tolist()
        ]
        for place, token in zip(at.tolist(), tokens, strict=True):
            wide[place] = token
        options["vocab"] = fastkd.ByteVocab(wide, special={"eos": [int(at[0])]})
    return replace(
        mapped(problem, widen),
        columns={name: move(name, x) for name, x in problem.columns.items()},
        sets={name: widen_set(name, x) for name, x in problem.sets.items()},
        options=options,
    )


def evaluate(
    module: Any, problem: Problem, keep: dict[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs by name, and gradients of a weighted sum of the entries that are finite in `keep`.

    keep: the outputs that decide; None: these.
    """
    leaves: dict[str, Any] = {}
    options = dict(problem.options)
    for name, value in problem.logits.items():
        leaves[name] = (
            value
            if isinstance(value, list)
            else value.detach().requires_grad_(name in problem.wanted)
        )
    for name in problem.wanted:
        if name in options:
            options[name] = leaves[name] = options[name].detach().requires_grad_()
    with torch.set_grad_enabled(bool(problem.wanted)):
        found = getattr(module, problem.op)(
            **{**leaves, **problem.columns, **problem.sets, **options}
        )
    if isinstance(found, Tensor):
        outputs = {"loss": found}
    else:
        names = OUTPUTS[problem.op]
        outputs = {n: x for n, x in zip(names, found, strict=True) if x is not None}
    if not problem.wanted:
        return outputs, {}
    total: Any = 0
    for number, (name, x) in enumerate(outputs.items()):
        if not x.requires_grad:
            continue
        generator = torch.Generator().manual_seed(7 + number)
        weights = torch.rand(x.shape, generator=generator, dtype=torch.float64) + 0.5
        if problem.op in ("chunk_log_likelihood", "byte_log_probs", "token_log_probs"):
            weights = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        kept = x.isfinite() if keep is None else keep[name].isfinite()
        total = total + (torch.where(kept, x, 0) * weights.to(x.dtype)).sum()
    wanted = [leaves[name] for name in problem.wanted]
    # The definition of a loss without a row or chunk is a constant.
    constant = not isinstance(total, Tensor)
    gradients = (
        [0 * x for x in wanted]
        if constant
        else torch.autograd.grad(total, wanted, materialize_grads=True)
    )
    return (
        {name: x.detach() for name, x in outputs.items()},
        dict(zip(problem.wanted, gradients, strict=True)),
    )


def tolerance(problem: Problem, dtype: torch.dtype) -> tuple[float, float]:
    """rtol and atol of values whose logits have that dtype."""
    if dtype == torch.float64:
        return LOSS_ERROR[dtype], LOSS_ERROR[dtype]
    if problem.op in (
        *("chunk_log_likelihood", "byte_log_probs", "token_log_probs"),
        *("teacher_topk", "token_stats"),
    ):
        return 2e-6, 4e-6
    if problem.op == "alm_loss":
        return 2e-5, 1e-6
    return LOSS_ERROR[dtype], LOSS_ERROR[dtype]


def dtype_of(problem: Problem) -> torch.dtype:
    """The least accurate of the logits' types."""
    flat = [x for v in problem.logits.values() for x in (v if isinstance(v, list) else [v])]
    return min((x.dtype for x in flat), key=lambda d: BITS[d])


def gradient_room(problem: Problem, exact: Tensor, dtype: torch.dtype, name: str = "") -> float:
    """How far, in norm, a gradient (of `name`) may be: rounded, scaled and rounded again."""
    divergence = problem.options.get("divergence", "forward_kl")
    kind = divergence if problem.op == "softmax_divergence" else "jsd"
    room = (4 / 3) * allowed_error(exact, dtype, kind)
    if problem.op != "alm_loss":
        # Its floor is a rounding of probabilities, which are divided by their temperature.
        low, high = extremes(problem.options.get("temperature", 1.0))
        square = high**2 if problem.options.get("square_temperature") else 1.0
        own = problem.options.get("teacher_temperature") if name == "teacher_logits" else None
        if own is not None:
            low, high = extremes(own)
        room += 5e-7 * max(1 / low, square / (high if own is None else low))
    if problem.op == "alm_loss" and dtype != torch.float64:
        room = max(room, 2e-5 * exact.norm().item())
    if problem.op == "clipped_divergence":
        # p (h - mean of h) with h and its mean rounded: what is left of it may be much smaller.
        size = log_ratio(problem)
        if name == "teacher_logits":
            size = max(size, teacher_terms(problem))
        if name == "student_logits":
            size += student_terms(problem)
        room += 4 * (2.0**-52 if dtype == torch.float64 else 2.0**-24) * size
    return room


def column(number: float | Tensor) -> float | Tensor:
    """A number, or one a row beside the columns of the vocabulary."""
    return number.unsqueeze(-1) if isinstance(number, Tensor) and number.dim() else number


def extremes(temperature: float | Tensor) -> tuple[float, float]:
    """The least and the greatest of the rows' temperatures."""
    if not isinstance(temperature, Tensor):
        return temperature, temperature
    if not temperature.numel():
        return 1.0, 1.0
    return float(temperature.min()), float(temperature.max())


def log_probabilities(problem: Problem) -> tuple[Tensor, Tensor]:
    """Of the student and of the teacher."""
    options = problem.options
    student_temperature = options.get("temperature", 1.0)
    teacher_temperature = options.get("teacher_temperature", student_temperature)
    log_q, log_p = (
        (problem.logits[name][..., : options.get("vocab_size")].double() / column(t)).log_softmax(
            -1
        )
        for name, t in (
            ("student_logits", student_temperature),
            ("teacher_logits", teacher_temperature),
        )
    )
    return log_q, log_p


def log_ratio(problem: Problem) -> float:
    """The largest row's sum of p |log p - log q|: the terms of a divergence without their signs."""
    log_q, log_p = log_probabilities(problem)
    terms = log_p.exp() * (log_p - log_q).abs()
    return terms.nan_to_num(0, 0, 0).sum(-1).max().item() if terms.numel() else 0.0


def teacher_terms(problem: Problem) -> float:
    """The largest row's sum of what roundings in clipped_divergence's teacher gradient multiply.

    With shares s(p) of the part, r = s p, or r = s p / P where the part is renormalised,
    h = log p - log q + 1 and t = p dlog s/dp, the gradient is a sum of r (1 + t) h over the
    temperature. A rounding of h moves a term by r (1 + t) |h|, one of p before the edge is
    subtracted by r ((1 + |t|) |t| + p^2 |d^2 log s/dp^2|) |h|. Where both sides are
    renormalised the student's share s q / Q is another such r, with h = 1.
    """
    options, (log_q, log_p) = problem.options, log_probabilities(problem)
    if not log_p.numel():
        return 0.0
    log_share, slope = part(problem, log_p.exp())
    renormalize, weight = options.get("renormalize", "none"), log_share + log_p
    if renormalize != "none":
        weight = weight.log_softmax(-1)
    terms = weight.exp() * (1 + (log_p - log_q).abs())
    if renormalize == "both":
        terms = terms + (log_share + log_q).log_softmax(-1).exp()
    terms = (slope * terms).nan_to_num(0, 0, 0).sum(-1)
    temperature = options.get("temperature", 1.0)
    terms = terms / torch.as_tensor(options.get("teacher_temperature", temperature))
    if options.get("square_temperature"):
        terms = terms * torch.as_tensor(temperature) ** 2
    return terms.max().item()


def student_terms(problem: Problem) -> float:
    """The same of clipped_divergence's student where both sides are renormalised.

    Its share r = s q / Q is exp(log q - log Q), over the temperature: a part of little mass has
    large logarithms, and r their roundings.
    """
    options, (log_q, log_p) = problem.options, log_probabilities(problem)
    if not log_p.numel() or options.get("renormalize") != "both":
        return 0.0
    log_share, _ = part(problem, log_p.exp())
    terms = (log_share + log_q).log_softmax(-1).exp() * log_q.abs()
    terms = terms.nan_to_num(0, 0, 0).sum(-1)
    temperature = torch.as_tensor(options.get("temperature", 1.0))
    terms = terms * temperature if options.get("square_temperature") else terms / temperature
    return terms.max().item()


def part(problem: Problem, p: Tensor) -> tuple[Tensor, Tensor | float]:
    """Of clipped_divergence log s(p), and what roundings of p before an edge are multiplied by."""
    options, edges = problem.options, []
    for name in ("lower", "upper"):
        edge = torch.as_tensor(options[name], dtype=torch.float64).expand(p.shape[:-1])
        if options.get("quantile"):
            ordered, place = p.sort(-1).values, edge * (p.size(-1) - 1)
            at = place.long()
            ends = (
                ordered.gather(-1, i.unsqueeze(-1)).squeeze(-1) for i in (at, place.ceil().long())
            )
            edge = torch.lerp(*ends, place - at)
        edges.append(edge.unsqueeze(-1))
    if softness := options.get("softness"):
        above, below = (p - edges[0]) / softness, (edges[1] - p) / softness
        log_share = torch.nn.functional.logsigmoid(above) + torch.nn.functional.logsigmoid(below)
        a, b, steep = above.sigmoid(), below.sigmoid(), p / softness
        slope = (1 + steep * (b - a).abs()) ** 2 + steep**2 * (a * (1 - a) + b * (1 - b))
    else:
        inside = (p >= edges[0] * (1 - 1e-6)) & (p <= edges[1] * (1 + 1e-6))
        log_share, slope = torch.where(inside, 0.0, -torch.inf), 1.0
    labels = options.get("labels", problem.columns.get("labels"))
    if labels is not None and options.get("keep_label", True) and not options.get("shift"):
        kept = labels.clamp(0, p.size(-1) - 1).long().unsqueeze(-1)
        log_share = log_share.scatter(-1, kept, 0.0)
    return log_share, slope


def edge_room(problem: Problem, exact: Tensor) -> float:
    """How far the gradient of a soft edge may be: a sum of ds/dedge p log(p / q) in both signs.

    ds/dedge is up to 1/4 of sharp = 1 / softness, and changes by up to a tenth of its square with
    p, which is rounded. All of it is multiplied as the loss is.
    """
    sharp = 1 / problem.options["softness"]
    eps = (
        2.0**-52 if exact.dtype == torch.float64 and dtype_of(problem) == exact.dtype else 2.0**-24
    )
    _, high = extremes(problem.options.get("temperature", 1.0))
    scale = high**2 if problem.options.get("square_temperature") else 1.0
    return 4 * eps * scale * sharp * (1 + 0.1 * sharp) * (1 + log_ratio(problem))
