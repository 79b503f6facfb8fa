"""Methods of image classification."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_flag
from fastkd._ops.checks import check_positive
from fastkd._ops.names import Reduction, TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._token_stats import token_stats
from fastkd.losses._topk_divergence import topk_divergence
from fastkd.recipes._chunks import check_callable, check_integers, softmax, wide
from fastkd.recipes._features import (
    as_numbers,
    check_classes,
    check_factors,
    check_floats,
    check_like,
    check_reduction,
    mean,
)
from fastkd.recipes._rows import (
    check_choice,
    check_rows,
    check_share,
    label_log_probs,
    masked_mean,
    row_divergence,
)
from fastkd.teachers._teacher_topk import stored_entries

#: Added to the denominator of a correlation by DIST's authors.
_EPSILON = 1e-8


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    temperature: float | Tensor = 4.0,
    square_temperature: bool = True,
    mask: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Decoupled knowledge distillation (DKD). A term.

    :math:`\alpha\,TCKD + \beta\,NCKD`, times temperature²: TCKD is the divergence between "the
    label" and "another class" on both sides, NCKD that of the other classes among themselves.
    ``divergence="decoupled_kl"`` of :func:`fastkd.softmax_divergence`, in one op.

    Args:
        student_logits: ``[..., classes]``.
        teacher_logits: the same shape.
        labels: int64 or int32, one a row; rows with -100 drop out.
        alpha: of the label's part: a number, or one a row.
        beta: of the others' part: a number, or one a row. The published one depends on the task.
        temperature: of both sides.
        square_temperature: multiplies by temperature², as the authors do.
        mask: bool, one a row; rows with False drop out.
        weight: float, one a row.
        reduction: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"``, ``"elementmean"`` or
            ``"sequence_mean"``.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type.

    The authors add cross-entropy at temperature 1, and multiply this term by min(epoch / 20, 1).
    Their code replaces the label's logit by one that is 1,000 smaller; here it is left out, which
    is the same up to exp(-1000). Source: Zhao et al. 2022 (arXiv 2203.08679; code
    megvii-research/mdistiller).

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, 1.0]])
    >>> loss = fastkd.recipes.dkd(student, teacher, torch.tensor([0]), beta=0.0, temperature=1.0)
    >>> round(loss.item(), 4)
    0.112
    """
    return row_divergence(
        "dkd",
        student_logits,
        teacher_logits,
        divergence="decoupled_kl",
        labels=labels,
        label_weight=0.0,
        alpha=alpha,
        beta=beta,
        temperature=temperature,
        square_temperature=square_temperature,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
    )


def dist(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    square_temperature: bool = False,
) -> Tensor:
    r"""DIST: correlations of predictions, over the classes and over the batch. A term.

    With q and p the softmaxes ``[N, C]`` and :math:`\rho` Pearson's correlation,
    :math:`\beta (1 - \mathrm{mean}_i\,\rho(q_i, p_i)) + \gamma (1 - \mathrm{mean}_c\,\rho(q_{:c},
    p_{:c}))`. A row or column without variance has correlation 0.

    Args:
        student_logits: ``[..., C]``; the leading dimensions are examples, or pixels.
        teacher_logits: the same shape.
        beta: of the examples' correlations.
        gamma: of the classes' correlations.
        temperature: of both sides, positive; the released segmentation code has none.
        square_temperature: multiplies by temperature².

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Huang et al. (arXiv 2205.10536; code hunto/DIST_KD, also LAD's variant).

    >>> import torch, fastkd
    >>> logits = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0]])
    >>> fastkd.recipes.dist(logits, logits + 1).item() < 1e-4
    True
    """
    check_factors("dist", "beta", (beta,), 1)
    check_factors("dist", "gamma", (gamma,), 1)
    check_positive("dist", "temperature", temperature)
    check_like("dist", "teacher_logits", teacher_logits, "student_logits", student_logits)
    square_temperature = to_flag("dist", "square_temperature", square_temperature)
    q, p = (softmax(wide(x).flatten(0, -2) / temperature) for x in (student_logits, teacher_logits))
    factor = temperature**2 if square_temperature else 1
    rows, columns = (mean(1 - _correlation(q, p, dim)) for dim in (1, 0))
    return factor * (beta * rows + gamma * columns)


def _correlation(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    x, y = (values - values.mean(dim, keepdim=True) for values in (student, teacher))
    sizes = [torch.linalg.vector_norm(values, dim=dim) for values in (x, y)]
    return (x * y).sum(dim) / (sizes[0] * sizes[1] + _EPSILON)


def class_balanced_weights(counts: Tensor | Sequence[int], *, beta: float = 0.9999) -> Tensor:
    r"""Class weights by the effective number of examples.

    :math:`w_c \propto (1 - \beta) / (1 - \beta^{n_c})`, scaled to a mean of 1. DeiT-LT uses them
    from a late epoch on (deferred reweighting), and None before.

    Args:
        counts: the number of training examples of each class, all positive.
        beta: in [0, 1); 0 weights all classes alike. 0.9999 is that of the code that introduced
            deferred reweighting, LDAM's.

    Returns:
        float32 ``[C]``.

    Raises:
        ValueError, TypeError: an argument has the wrong value or type.

    Source: Cui et al. (arXiv 1901.05555); DeiT-LT (2404.02900; code val-iisc/DeiT-LT).

    >>> import torch, fastkd
    >>> weights = fastkd.recipes.class_balanced_weights([100, 10], beta=0.9)
    >>> [round(x, 4) for x in weights.tolist()]
    [0.7889, 1.2111]
    """
    check_share("class_balanced_weights", "beta", beta)
    like = counts if isinstance(counts, Tensor) else torch.empty(0)
    found = as_numbers("class_balanced_weights", "counts", counts, like).double()
    if found.dim() != 1 or not found.numel() or not bool((found > 0).all()) or beta == 1:
        raise ValueError(
            "class_balanced_weights: counts must be a list of positive numbers and beta below 1, "
            f"got {counts!r} and {beta}"
        )
    share = torch.as_tensor(beta, dtype=torch.float64, device=found.device).log()
    weights = -1 / torch.expm1(found * share)
    return (weights / weights.mean()).float()


def deit_lt(
    class_logits: Tensor,
    distillation_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 0.5,
    class_weights: Tensor | None = None,
) -> Tensor:
    r"""DeiT-LT: the label on the class token, the teacher's class on the other. The total.

    :math:`(1 - \alpha) CE(z_{cls}, y) + \alpha CE_w(z_{dist}, \arg\max z_T)`, where the weighted
    cross-entropy is divided by the sum of its examples' weights, as torch's is. With mixed images
    replace the first term by a soft-target cross-entropy: pass alpha 1 and add it.

    Args:
        class_logits: ``[N, C]``, the student's class token.
        distillation_logits: ``[N, C]``, its distillation token.
        teacher_logits: ``[N, C]``, gets no gradient.
        labels: int64 ``[N]``; -100: the example has no first term.
        alpha: in [0, 1].
        class_weights: ``[C]`` or None, see :func:`class_balanced_weights`.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value, shape or type.

    Source: DeiT-LT (arXiv 2404.02900; code val-iisc/DeiT-LT).

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(2, 4), torch.tensor([[9.0, 0, 0, 0], [0, 9.0, 0, 0]])
    >>> round(fastkd.recipes.deit_lt(student, student, teacher, torch.tensor([0, 3])).item(), 4)
    1.3863
    """
    check_share("deit_lt", "alpha", alpha)
    for name, logits in (
        ("distillation_logits", distillation_logits),
        ("teacher_logits", teacher_logits),
    ):
        check_like("deit_lt", name, logits, "class_logits", class_logits)
    check_classes("deit_lt", labels, class_logits)
    check_no_gradient("deit_lt", teacher_logits=teacher_logits)
    target = token_stats(teacher_logits).student_argmax.long()
    weights = torch.ones_like(target, dtype=torch.float32)
    if class_weights is not None:
        check_floats("deit_lt", class_logits=class_logits, class_weights=class_weights)
        if class_weights.shape != class_logits.shape[-1:]:
            raise ValueError(
                f"deit_lt: class_weights must be [{class_logits.size(-1)}], got "
                f"{list(class_weights.shape)}"
            )
        check_no_gradient("deit_lt", class_weights=class_weights)
        weights = class_weights[target]
    hard = -label_log_probs(class_logits, labels)
    taught = -label_log_probs(distillation_logits, target)
    weights = weights.to(taught.dtype)
    taught, size = weights * taught, weights.sum()
    taught = taught.sum() / torch.where(size == 0, 1, size)
    return (1 - alpha) * masked_mean(hard, labels != -100) + alpha * taught


def meal_v2(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    *,
    teacher_weights: Sequence[float] | Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""MEAL V2: cross-entropy with the mean of several teachers' distributions. A term.

    :math:`-\sum_v \bar p_v \log q_v` with :math:`\bar p = \sum_k w_k \mathrm{softmax}(z_k)`, at
    temperature 1 and without labels. The mean is not stored. The authors add a discriminator's
    loss: :func:`meal_v2_discrimination`.

    Args:
        student_logits: ``[..., C]``.
        teacher_logits: a list of K tensors of the same shape; they get no gradient.
        teacher_weights: K numbers or ``[..., K]``, not negative, divided by their sum; None: equal.
        reduction: see :func:`fastkd.softmax_divergence`.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: MEAL V2 (arXiv 2009.08453; code szq0214/MEAL-V2).

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[3.0, 0.0]])
    >>> round(fastkd.recipes.meal_v2(student, [teacher, -teacher]).item(), 4)  # log 2
    0.6931
    """
    check_reduction("meal_v2", reduction, normalizer)
    teachers = _teachers("meal_v2", student_logits, teacher_logits)
    return softmax_divergence(
        student_logits,
        teachers,
        divergence="cross_entropy",
        teacher_mix="probs",
        teacher_weights=teacher_weights,
        reduction=reduction,
        normalizer=normalizer,
    )


def _teachers(function: str, student: Tensor, teachers: Sequence[Tensor]) -> list[Tensor]:
    if not isinstance(teachers, (list, tuple)) or not teachers:
        raise TypeError(
            f"{function}: teacher_logits must be a list of tensors, got {type(teachers).__name__}"
        )
    for number, teacher in enumerate(teachers):
        check_like(function, f"teacher_logits[{number}]", teacher, "student_logits", student)
        check_no_gradient(function, teacher_logits=teacher)
    return list(teachers)


def meal_v2_discrimination(
    discriminator: Callable[[Tensor], Tensor],
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
) -> Tensor:
    r"""MEAL V2's discriminator: which logits are the student's.

    Binary cross-entropy of the discriminator's two outputs for the student's logits, with targets
    [1, 0], and for the mean of the teachers' logits, with targets [0, 1]. In the authors' code no
    gradient is reversed: the student minimises this loss too, and helps the discriminator. For an
    adversarial one reverse the gradient of student_logits.

    Args:
        discriminator: maps ``[2 N, C]`` to ``[2 N, 2]``.
        student_logits: ``[N, C]``, get a gradient.
        teacher_logits: a list of tensors ``[N, C]``, without gradient.

    Returns:
        a scalar.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: MEAL V2 (arXiv 2009.08453; code szq0214/MEAL-V2, a network of three layers).

    >>> import torch, fastkd
    >>> logits = torch.randn(3, 5)
    >>> loss = fastkd.recipes.meal_v2_discrimination(lambda x: 0 * x[:, :2], logits, [logits])
    >>> round(loss.item(), 4)
    0.6931
    """
    name = "meal_v2_discrimination"
    check_callable(name, "discriminator", discriminator, needed=True)
    teachers = _teachers(name, student_logits, teacher_logits)
    average = torch.stack([wide(teacher) for teacher in teachers]).mean(0)
    found = discriminator(torch.cat([student_logits, average.to(student_logits.dtype)]))
    count = student_logits.size(0)
    if found.shape != (2 * count, 2):
        raise ValueError(
            f"{name}: discriminator must return [{2 * count}, 2], got {list(found.shape)}"
        )
    sides = torch.arange(2 * count, device=found.device) < count
    target = torch.stack([sides, ~sides], -1)
    losses = F.binary_cross_entropy_with_logits(
        wide(found), target.to(wide(found).dtype), reduction="none"
    )
    return mean(losses)


def fkd(
    student_logits: Tensor,
    stored_log_probs: Tensor,
    stored_indices: Tensor,
    *,
    kind: str,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""FKD: cross-entropy with soft labels stored as the teacher's k best classes. A term.

    ========================  ==============================================================
    ``marginal_smoothing``    the mass outside the k spread evenly over the other classes
    ``smoothing``             the same with k = 1
    ``marginal_renorm``       the teacher's k masses divided by their sum; the student's
                              log-probabilities are those over all classes
    ========================  ==============================================================

    Hard labels are :func:`fastkd.recipes.sequence_kd`'s.

    Args:
        student_logits: ``[..., C]``.
        stored_log_probs: ``[..., k]``, log-probabilities over all classes, as
            :func:`fastkd.teacher_topk` gives them; the authors store k = 5 and 10.
        stored_indices: int32 or int64 ``[..., k]``; -1 pads a short row.
        kind: one of the table.
        mask: bool, one a row.
        reduction: see :func:`fastkd.topk_divergence`.
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if the student's logits are).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value, shape or type.

    Source: FKD, Shen and Xing (arXiv 2112.01528; code szq0214/MEAL-V2).

    >>> import torch, fastkd
    >>> student, teacher = torch.zeros(2, 10), torch.randn(2, 10)
    >>> stored = fastkd.teacher_topk(teacher, 5)
    >>> loss = fastkd.recipes.fkd(student, *stored, kind="marginal_smoothing")
    >>> round(loss.item(), 4)  # log 10
    2.3026
    """
    check_choice("fkd", "kind", kind, ("marginal_smoothing", "smoothing", "marginal_renorm"))
    check_reduction("fkd", reduction, normalizer)
    stored = {"student_logits": student_logits, "stored_log_probs": stored_log_probs}
    check_rows("fkd", stored, mask=mask)
    check_integers(
        "fkd", "stored_indices", stored_indices, stored_log_probs.shape, student_logits.device
    )
    if kind == "smoothing" and stored_indices.size(-1) != 1:
        raise ValueError(
            f"fkd: kind smoothing needs one stored class a row, got {stored_indices.size(-1)}"
        )
    if kind == "marginal_renorm":
        used = stored_log_probs.masked_fill(
            ~stored_entries(stored_log_probs, stored_indices), -torch.inf
        )
        mass = used.logsumexp(-1, keepdim=True)
        # A row of padding alone has none.
        stored_log_probs = stored_log_probs - torch.where(mass == -torch.inf, 0, mass)
    return topk_divergence(
        student_logits,
        stored_log_probs,
        stored_indices,
        divergence="cross_entropy",
        tail="drop" if kind == "marginal_renorm" else "uniform",
        mask=mask,
        reduction=reduction,
        normalizer=normalizer,
    )
