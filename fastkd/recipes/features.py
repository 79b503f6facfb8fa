"""Distances between hidden states: feature matching, with and without logits."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.checks import check_positive, check_tensors
from fastkd._ops.names import TextReduction
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import check_callable, check_mask, reduced, wide
from fastkd.recipes._features import (
    KINDS,
    check_classes,
    check_factors,
    check_floats,
    check_like,
    check_rank,
    cosine,
    count_over,
    distances,
    masked_pair,
    mean,
    mean_of_rows,
    only,
)
from fastkd.recipes._rows import (
    check_choice,
    check_share,
    kept_rows,
    label_log_probs,
    masked_mean,
)


def feature_distance(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    kind: str = "mse",
    projection: Callable[[Tensor], Tensor] | None = None,
    beta: float = 1.0,
    mask: Tensor | None = None,
    reduction: TextReduction = "mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    r"""Distance between each row of the student's features s and the teacher's t.

    ======================  ================================================================
    ``mse``                 :math:`\frac1D \sum_d (s_d - t_d)^2`
    ``l1``                  :math:`\frac1D \sum_d |s_d - t_d|`
    ``smooth_l1``           :math:`\frac1D \sum_d` of :math:`(s_d - t_d)^2 / 2\beta` where
                            :math:`|s_d - t_d| < \beta`, else :math:`|s_d - t_d| - \beta / 2`
    ``cosine``              :math:`1 - \cos(s, t)`
    ``log_sigmoid_cosine``  :math:`-\log \sigma(\cos(s, t))`; 0.3133 at equal features
    ``pkd``                 :math:`\| s / |s| - t / |t| \|^2`
    ======================  ================================================================

    The cosine with a zero vector is 0 and has no gradient.

    Args:
        student_hidden: ``[..., D]``.
        teacher_hidden: ``[..., D]``; gets a gradient if it requires one.
        kind: one of the table.
        projection: applied to the student's features first, for example a ``Linear`` from the
            student's width to the teacher's. Rows that do not count are zeros in its input.
        beta: of ``smooth_l1``, positive.
        mask: bool, one a row: rows with False add nothing, also where they hold NaN.
        reduction: over the rows: ``"none"``, ``"sum"``, ``"mean"``, ``"batchmean"``,
            ``"elementmean"`` or ``"sequence_mean"`` (over a text's rows, then over texts).
        normalizer: replaces the denominator.

    Returns:
        float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: the intermediate losses of Distiller (arXiv 2109.11105, code Cli212/Distiller), PKD
    (1908.09355) and DM-Codec (2410.15017).

    >>> import torch, fastkd
    >>> student, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> [fastkd.recipes.feature_distance(student, teacher, kind=k).item() for k in ("mse", "pkd")]
    [2.5, 2.0]
    """
    check_choice("feature_distance", "kind", kind, KINDS)
    check_positive("feature_distance", "beta", beta)
    check_callable("feature_distance", "projection", projection)
    check_floats("feature_distance", student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    check_mask("feature_distance", "mask", mask, student_hidden.shape[:-1], student_hidden.device)
    student_hidden = only(student_hidden, mask)
    if projection is not None:
        student_hidden = projection(student_hidden)
    student, teacher = masked_pair(
        "feature_distance", mask, student_hidden=student_hidden, teacher_hidden=teacher_hidden
    )
    losses = only(distances(kind, student, teacher, beta), mask)
    return reduced("feature_distance", losses, kept_rows(student, mask), reduction, normalizer)


def fspad(
    draft_logits: Tensor,
    teacher_logits: Tensor,
    draft_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    mask: Tensor | None = None,
    weights: tuple[float, float] = (0.1, 1.0),
    beta: float = 1.0,
) -> Tensor:
    r"""FSPAD's loss of a draft head, which all heads of the EAGLE family share. A term.

    :math:`w_0 \cdot H(p, q) + w_1 \cdot \mathrm{SmoothL1}(h_S, h_T)`: the cross-entropy of the
    draft's distribution with the teacher's, and the mean over channels of SmoothL1 between the
    draft's regressed features and the teacher's last hidden states, each a mean over the rows that
    count. FSPAD's draft has two outputs: one for the logits, one for the features.

    Args:
        draft_logits: ``[..., vocab]``; row t predicts what teacher_logits' row t does.
        teacher_logits: ``[..., vocab]``.
        draft_hidden: ``[..., D]``.
        teacher_hidden: ``[..., D]``.
        mask: bool, one a row.
        weights: of the two terms; (0.1, 1.0) in the authors' code. A term of weight 0 is not
            computed.
        beta: of SmoothL1.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: FSPAD (arXiv 2408.15562; code Luc4Gui/FSPAD, whose denominators have 1e-5 added).

    >>> import torch, fastkd
    >>> logits, hidden = torch.zeros(2, 4), torch.ones(2, 3)
    >>> round(fastkd.recipes.fspad(logits, logits, hidden, hidden + 1).item(), 4)
    0.6386
    """
    check_factors("fspad", "weights", weights, 2)
    check_like("fspad", "teacher_logits", teacher_logits, "draft_logits", draft_logits)
    check_positive("fspad", "beta", beta)
    student, teacher = masked_pair(
        "fspad", mask, draft_hidden=draft_hidden, teacher_hidden=teacher_hidden
    )
    if student.shape[:-1] != draft_logits.shape[:-1]:
        raise ValueError(
            f"fspad: draft_hidden must have draft_logits' rows {list(draft_logits.shape[:-1])}, "
            f"got {list(student.shape[:-1])}"
        )
    total = student.new_zeros(())
    if weights[0]:
        total = total + softmax_divergence(
            draft_logits,
            teacher_logits,
            divergence="cross_entropy",
            mask=mask,
            normalizer=count_over(kept_rows(student, mask), weights[0]),
        )
    if weights[1]:
        distance = distances("smooth_l1", student, teacher, beta)
        total = total + weights[1] * mean_of_rows("fspad", distance, mask)
    return total


def semantic_distillation(
    features: Tensor,
    targets: Tensor,
    *,
    axis: str = "channel",
    lambda_sim: float = 1.0,
) -> Tensor:
    r"""Semantic distillation of a speech codec's first quantiser. A term.

    ``axis="channel"``: the mean over texts and channels d of
    :math:`-\log \sigma(\cos(f_{:,d}, t_{:,d}))`, cosines along time. ``axis="time"``: the mean
    absolute difference, plus ``lambda_sim`` times the mean over texts and times of
    :math:`-\log \sigma(\cos(f_i, t_i))`, cosines along channels. Equal features give
    :math:`\log(1 + e^{-1}) = 0.3133`, not 0.

    This is the semantic loss of SpeechTokenizer and Mimi too, and the one that the survey of
    discrete audio tokens compares.

    Args:
        features: ``[B, T, D]``, the student's, projected to the targets' width.
        targets: ``[B, T', D]``. The longer one is cut to the shorter.
        axis: ``"channel"`` or ``"time"``.
        lambda_sim: of ``"time"``.

    Returns:
        a scalar, float32 (float64 if a side is). DM-Codec multiplies it by 120 in its total.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: DM-Codec (arXiv 2410.15017; code mubtasimahasan/DM-Codec); Discrete Audio Tokens
    (2506.10274).

    >>> import torch, fastkd
    >>> features = torch.randn(2, 5, 3)
    >>> round(fastkd.recipes.semantic_distillation(features, features).item(), 4)
    0.3133
    """
    name = "semantic_distillation"
    return _semantic(name, "targets", features, targets, axis, lambda_sim)


def _semantic(
    function: str, name: str, features: Tensor, targets: Tensor, axis: str, lambda_sim: float
) -> Tensor:
    check_choice(function, "axis", axis, ("channel", "time"))
    check_factors(function, "lambda_sim", (lambda_sim,), 1)
    check_rank(function, "features", features, "B", "T", "D")
    check_rank(function, name, targets, "B", "T", "D")
    length = min(features.size(1), targets.size(1))
    features, targets = features[:, :length], targets[:, :length]
    check_like(function, name, targets, "features", features)
    student, teacher = wide(features), wide(targets)
    if axis == "channel":
        return mean(-F.logsigmoid(cosine(student, teacher, 1)))
    similarity = mean(-F.logsigmoid(cosine(student, teacher)))
    return mean((student - teacher).abs()) + lambda_sim * similarity


def dm_codec(
    features: Tensor,
    lm_targets: Tensor,
    speech_targets: Tensor,
    *,
    weights: tuple[float, float] = (0.5, 0.5),
    axis: str = "channel",
    lambda_sim: float = 1.0,
) -> Tensor:
    r"""DM-Codec: :func:`semantic_distillation` from a language and a speech model. A term.

    Args:
        features: ``[B, T, D]``, the student's.
        lm_targets: ``[B, T', D]``, hidden states of a language model, aligned to time.
        speech_targets: ``[B, T'', D]``, hidden states of a self-supervised speech model.
        weights: of the language model's and the speech model's term.
        axis: see :func:`semantic_distillation`.
        lambda_sim: see :func:`semantic_distillation`.

    Returns:
        a scalar, float32 (float64 if a side is). The authors multiply it by 120 in their total.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: DM-Codec (arXiv 2410.15017; code mubtasimahasan/DM-Codec).

    >>> import torch, fastkd
    >>> features = torch.randn(2, 5, 3)
    >>> round(fastkd.recipes.dm_codec(features, features, -features).item(), 4)
    0.8133
    """
    check_factors("dm_codec", "weights", weights, 2)
    lm = _semantic("dm_codec", "lm_targets", features, lm_targets, axis, lambda_sim)
    speech = _semantic("dm_codec", "speech_targets", features, speech_targets, axis, lambda_sim)
    return weights[0] * lm + weights[1] * speech


def lm_spt(
    features: Tensor, targets: Tensor, *, mask: Tensor | None = None, weight: float = 100.0
) -> Tensor:
    r"""LM-SPT: features of speech and of speech that was rebuilt from tokens. A term.

    ``weight`` times the mean over rows and channels of :math:`(f - t)^2`. Both are features of one
    frozen speech recogniser's encoder (Whisper in the paper): of the waveform that is decoded from
    the semantic tokens alone, and of the original.

    Args:
        features: ``[..., D]``, of the rebuilt waveform.
        targets: ``[..., D]``, of the original.
        mask: bool, one a row.
        weight: 100 in the paper.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: LM-SPT (arXiv 2506.16738), from a detailed review; the authors' code was not found.

    >>> import torch, fastkd
    >>> fastkd.recipes.lm_spt(torch.zeros(2, 3), torch.full((2, 3), 0.5)).item()
    25.0
    """
    check_factors("lm_spt", "weight", (weight,), 1)
    student, teacher = masked_pair("lm_spt", mask, features=features, targets=targets)
    return weight * mean_of_rows("lm_spt", distances("mse", student, teacher), mask)


def had(
    student_logits: Tensor,
    labels: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    visible: Tensor,
    *,
    weight: float = 1.0,
) -> Tensor:
    r"""HAD: masked-token prediction, and the teacher's features on visible tokens. The total.

    The mean cross-entropy of the labels over the masked tokens, plus ``weight`` times the mean
    squared difference from the teacher's last layer over the visible ones. HAD masks whole 6-mers
    of DNA.

    Args:
        student_logits: ``[..., vocab]``; row t scores labels[t].
        labels: int64, one a row; -100 for rows without.
        student_hidden: ``[..., D]``, projected to the teacher's width.
        teacher_hidden: ``[..., D]``.
        visible: bool, one a row: True where the student sees the token.
        weight: of the second term. The authors' value was not found; 1 is ours.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value, shape or type.

    Source: HAD (arXiv 2505.20836), from its reviews; no code was found.

    >>> import torch, fastkd
    >>> logits, hidden = torch.zeros(2, 4), torch.ones(2, 3)
    >>> labels, visible = torch.tensor([-100, 2]), torch.tensor([True, False])
    >>> round(fastkd.recipes.had(logits, labels, hidden, hidden + 1, visible).item(), 4)
    2.3863
    """
    check_factors("had", "weight", (weight,), 1)
    check_floats("had", student_logits=student_logits)
    check_classes("had", labels, student_logits)
    check_like("had", "teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    check_tensors("had", {"student_hidden": student_hidden, "visible": visible})
    check_mask("had", "visible", visible, student_hidden.shape[:-1], student_hidden.device)
    check_mask("had", "visible", visible, student_logits.shape[:-1], student_logits.device)
    masked = ~visible & (labels != -100)
    label_loss = masked_mean(-label_log_probs(student_logits, labels, mask=masked), masked)
    student, teacher = wide(only(student_hidden, visible)), wide(only(teacher_hidden, visible))
    return label_loss + weight * mean_of_rows("had", distances("mse", student, teacher), visible)


def fair_latent(
    student_latent: Tensor,
    teacher_latent: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weights: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    r"""Latent distillation for fair synthetic data: quality and utility. The total.

    :math:`w_0 \mathrm{MSE}(z_S, z_T) + w_1 KL(p \| q)`. The teacher's latent is fair by a penalty
    on its distance covariance with the protected attribute: :func:`distance_covariance`. The
    student decodes with the teacher's decoder.

    Args:
        student_latent: ``[..., D]``.
        teacher_latent: ``[..., D]``.
        student_logits: ``[..., classes]``, of the downstream task.
        teacher_logits: ``[..., classes]``.
        weights: of quality and utility; the authors' were not found.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: arXiv 2408.10755, from reviews of it; no code was found.

    >>> import torch, fastkd
    >>> latent, logits = torch.zeros(2, 3), torch.zeros(2, 4)
    >>> fastkd.recipes.fair_latent(latent, latent + 2, logits, logits).item()
    4.0
    """
    check_factors("fair_latent", "weights", weights, 2)
    student, teacher = masked_pair(
        "fair_latent", None, student_latent=student_latent, teacher_latent=teacher_latent
    )
    check_like("fair_latent", "teacher_logits", teacher_logits, "student_logits", student_logits)
    quality = mean_of_rows("fair_latent", distances("mse", student, teacher), None)
    return weights[0] * quality + weights[1] * softmax_divergence(student_logits, teacher_logits)


def semcot(
    student_logits: Tensor,
    labels: Tensor,
    student_embedding: Tensor,
    teacher_embedding: Tensor,
    *,
    alpha: float,
) -> Tensor:
    r"""SemCoT's second stage: the meaning of the reasoning, and the answer. The total.

    :math:`\alpha \cdot \mathrm{mean}(1 - \cos(e_S, e_T)) + (1 - \alpha) \cdot CE`. The embeddings
    are those of a sentence encoder: of the implicit tokens and of the reasoning in words. The first
    stage trains that encoder with :func:`infonce` of the original and the condensed reasoning, at
    temperature 1.

    Args:
        student_logits: ``[..., vocab]``; row t scores labels[t].
        labels: int64, one a row, the answer; rows with -100 do not count.
        student_embedding: ``[B, D]``, of the implicit tokens.
        teacher_embedding: ``[B, D]``, of the reasoning.
        alpha: 0.25 to 0.75 in the authors' code, by data set and model: 0.25 for GSM8K. The 0 of
            its command line stands for that table.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value, shape or type.

    Source: SemCoT (arXiv 2510.24940; code YinhanHe123/SemCoT).

    >>> import torch, fastkd
    >>> logits, labels = torch.zeros(1, 3, 4), torch.tensor([[-100, 1, 2]])
    >>> implicit, reason = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> round(fastkd.recipes.semcot(logits, labels, implicit, reason, alpha=0.25).item(), 4)
    1.2897
    """
    check_share("semcot", "alpha", alpha)
    check_floats("semcot", student_logits=student_logits)
    check_classes("semcot", labels, student_logits)
    student, teacher = masked_pair(
        "semcot", None, student_embedding=student_embedding, teacher_embedding=teacher_embedding
    )
    meaning = mean_of_rows("semcot", distances("cosine", student, teacher), None)
    answer = masked_mean(-label_log_probs(student_logits, labels), labels != -100)
    return alpha * meaning + (1 - alpha) * answer
