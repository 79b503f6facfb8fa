"""A top-k divergence as one of verl's distillation losses (written for verl 0.9.1).

verl computes top-k losses in its logits processor, by the function of the training strategy:
`compute_forward_kl_topk` of `verl.trainer.distillation.fsdp.losses`, of FSDP and VeOmni. `register`
puts a function in its place that serves the new name, and passes every other name on.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import check_tensor, choices, to_number
from fastkd._ops.names import Tail, TopKDivergence
from fastkd.losses._topk_divergence import topk_divergence
from fastkd.losses._topk_stats import topk_stats
from fastkd.teachers._teacher_topk import teacher_topk

VERSION = "0.9.1"
_SIGNATURE = [
    "student_logits",
    "teacher_topk_log_probs",
    "teacher_topk_ids",
    "config",
    "data_format",
]


def register(
    name: str = "fastkd_topk",
    *,
    divergence: TopKDivergence = "forward_kl",
    beta: float = 0.5,
    tail: Tail = "lump",
) -> Callable[[], None]:
    """Add a distillation loss to verl: its name is a ``loss_mode`` of ``distillation_loss``.

    The loss of a token is :func:`fastkd.topk_divergence` to the teacher's k tokens. With
    ``tail="lump"`` all other tokens are one more outcome, so that it is a divergence: never
    negative, and 0 only where both sides agree. Call this in every worker, before training.
    It is for the strategies fsdp, fsdp2 and veomni; under megatron verl's own loss runs.

    Args:
        name: the new name.
        divergence, beta, tail: see :func:`fastkd.topk_divergence`.

    Returns:
        a function that undoes the registration.

    Raises:
        ImportError: verl is not installed.
        TypeError: verl's function has another signature than that of the version above.
        ValueError: the name is taken, or an option has the wrong value.
    """
    for option, value in (("divergence", divergence), ("tail", tail)):
        allowed = choices("topk_divergence", option)
        if value not in allowed:
            raise ValueError(
                f"register: {option} must be one of {', '.join(allowed)}, got {value!r}"
            )
    to_number("register", "beta", beta)
    if not isinstance(name, str):
        raise TypeError(f"register: name must be a string, got {type(name).__name__}")
    from verl.trainer.distillation import losses
    from verl.trainer.distillation.fsdp import losses as strategy
    from verl.utils import ulysses

    theirs = strategy.compute_forward_kl_topk
    found = list(inspect.signature(theirs).parameters)
    if found != _SIGNATURE:
        raise TypeError(
            f"register: verl's compute_forward_kl_topk must take {', '.join(_SIGNATURE)} (verl "
            f"{VERSION}), got {', '.join(found)}"
        )
    if name in losses.DISTILLATION_LOSS_REGISTRY:
        raise ValueError(f"register: verl has a distillation loss {name!r} already")
    aggregate = losses.DISTILLATION_LOSS_REGISTRY["forward_kl_topk"]
    settings = losses.DistillationLossSettings(names=[name], use_topk=True)
    losses.register_distillation_loss(settings)(aggregate)

    def ours(
        student_logits: Tensor,
        teacher_topk_log_probs: Tensor,
        teacher_topk_ids: Tensor,
        config: Any,
        data_format: str,
    ) -> Any:
        if config.distillation_loss.loss_mode != name:
            return theirs(
                student_logits=student_logits,
                teacher_topk_log_probs=teacher_topk_log_probs,
                teacher_topk_ids=teacher_topk_ids,
                config=config,
                data_format=data_format,
            )
        log_probs, ids = (
            x.values().unsqueeze(0) for x in (teacher_topk_log_probs, teacher_topk_ids)
        )
        if ulysses.get_ulysses_sequence_parallel_world_size() > 1:
            log_probs, ids = (ulysses.slice_input_tensor(x, dim=1) for x in (log_probs, ids))
        return token_losses(
            student_logits,
            log_probs,
            ids,
            divergence=divergence,
            beta=beta,
            tail=tail,
            min_log_prob=config.distillation_loss.log_prob_min_clamp,
        )

    strategy.compute_forward_kl_topk = ours

    def undo() -> None:
        if strategy.compute_forward_kl_topk is ours:
            strategy.compute_forward_kl_topk = theirs
        losses.DISTILLATION_LOSS_REGISTRY.pop(name, None)
        losses.DISTILLATION_SETTINGS_REGISTRY.pop(name, None)

    return undo


def token_losses(
    student_logits: Tensor,
    teacher_log_probs: Tensor,
    teacher_ids: Tensor,
    **options: Any,
) -> dict[str, Tensor]:
    """What verl's logits processor returns, a value a token.

    verl fills the last row of a text, which scores nothing, with k times the id 0 of
    log-probability 0: such rows are 0 here.

    Args:
        student_logits: ``[B, T, vocab]``: row t scores token t + 1.
        teacher_log_probs: ``[B, T, k]``.
        teacher_ids: ``[B, T, k]``.
        options: of :func:`fastkd.topk_divergence`.

    Returns:
        ``distillation_losses``, ``student_mass``, ``teacher_mass``, ``overlap_count`` and
        ``overlap_token_advantage``, each ``[B, T]``.

    >>> import torch
    >>> from fastkd.integrations.verl import token_losses
    >>> log_probs = torch.tensor([[[0.5, 0.25], [1.0, 1.0]]]).log()
    >>> found = token_losses(torch.zeros(1, 2, 4), log_probs, torch.tensor([[[1, 2], [0, 0]]]))
    >>> [round(x, 4) for x in found["distillation_losses"][0].tolist()]
    [0.1733, 0.0]
    >>> found["teacher_mass"].tolist()
    [[0.75, 0.0]]
    """
    for name, value in (
        ("student_logits", student_logits),
        ("teacher_log_probs", teacher_log_probs),
        ("teacher_ids", teacher_ids),
    ):
        check_tensor("token_losses", name, value)
    shape = teacher_ids.shape
    if teacher_log_probs.shape != shape or shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            "token_losses: teacher_log_probs and teacher_ids must be [*, k] with student_logits' "
            f"rows {list(student_logits.shape[:-1])}, got {list(teacher_log_probs.shape)} and "
            f"{list(shape)}"
        )
    k = shape[-1]
    filled = (teacher_ids == 0).all(-1) & (teacher_log_probs == 0).all(-1)
    kept = ~filled if k > 1 else torch.ones_like(filled)
    # Ids of rows that are not read are checked, too: let them be different ones.
    places = torch.arange(k, device=teacher_ids.device, dtype=teacher_ids.dtype)
    ids = torch.where(kept.unsqueeze(-1), teacher_ids, places)
    log_probs = teacher_log_probs.float()
    losses = topk_divergence(student_logits, log_probs, ids, mask=kept, reduction="none", **options)
    masses = topk_stats(student_logits.detach(), log_probs, ids, mask=kept)
    # Of the student's own best, with their log-probabilities, those that are the teacher's.
    best = teacher_topk(student_logits.detach(), min(k, student_logits.size(-1)))
    same = (ids.unsqueeze(-1) == best.indices.unsqueeze(-2)) & kept[..., None, None]
    shared = same.any(-1)
    log_q = torch.where(same, best.log_probs.unsqueeze(-2), 0).sum(-1)
    gain = torch.where(shared, log_probs.exp() * (log_q - log_probs), 0).sum(-1)
    count = shared.sum(-1)
    return {
        "distillation_losses": losses,
        "student_mass": masses.student_mass,
        "teacher_mass": masses.teacher_mass,
        "overlap_count": count,
        "overlap_token_advantage": gain / count.clamp(min=1),
    }
