"""Distillation of rankings: a row holds the scores of the passages of a query."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd._ops.arguments import check_no_gradient, to_integer
from fastkd._ops.checks import check_positive
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import readable, wide
from fastkd.recipes._features import check_like, check_rank, mean
from fastkd.recipes._rows import check_choice, check_share, label_log_probs

_MAIN = ("softmax_ce", "ranknet", "listnet", "lambda", "ranknet_softmax_ce")


def _lists(function: str, **lists: Tensor) -> list[Tensor]:
    """Scores ``[B, n]`` of one shape, checked; the second ones take no gradient."""
    (name, student), (other, teacher) = lists.items()
    check_rank(function, name, student, "B", "n")
    check_like(function, other, teacher, name, student)
    check_no_gradient(function, **{other: teacher})
    return [wide(student), wide(teacher)]


def _differences(scores: Tensor) -> Tensor:
    return scores.unsqueeze(2) - scores.unsqueeze(1)


def _over_pairs(losses: Tensor) -> Tensor:
    """The sum of ``[B, n, n]``, over the number of pairs of the passages of all lists."""
    batch, size, _ = losses.shape
    return losses.sum() / max(batch * size * (size - 1) // 2, 1)


def rank_net(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    r"""RankNet with the teacher's probabilities that one passage is better than the other.

    The mean over lists and pairs i < j of the binary cross-entropy of
    :math:`\sigma(s_i - s_j)` with :math:`\sigma(t_i - t_j)`.

    Args:
        student_scores: ``[B, n]``, finite.
        teacher_scores: ``[B, n]``, finite, or a relevance; gets no gradient.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong shape or type.

    Source: Burges et al. 2005; DeAR (arXiv 2508.16998; code DataScienceUIBK/DeAR-Reranking).

    >>> import torch, fastkd
    >>> round(fastkd.recipes.rank_net(torch.zeros(1, 3), torch.tensor([[2.0, 1.0, 0.0]])).item(), 4)
    0.6931
    """
    student, teacher = _lists(
        "rank_net", student_scores=student_scores, teacher_scores=teacher_scores
    )
    # A pair costs the same in either order.
    losses = F.binary_cross_entropy_with_logits(
        _differences(student), _differences(teacher).sigmoid(), reduction="none"
    )
    return _over_pairs(losses.triu(1))


def list_net(student_scores: Tensor, teacher_scores: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""ListNet: :math:`KL(\mathrm{softmax}\,t \| \mathrm{softmax}\,s)` of each list, averaged.

    Args:
        student_scores: ``[B, n]``; -inf for places without a passage, on both sides.
        teacher_scores: ``[B, n]``, or a relevance; gets no gradient.
        temperature: of both sides, positive.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Cao et al. 2007; DeAR (arXiv 2508.16998; code DataScienceUIBK/DeAR-Reranking).

    >>> import torch, fastkd
    >>> fastkd.recipes.list_net(torch.zeros(1, 3), torch.ones(1, 3)).item()
    0.0
    """
    check_positive("list_net", "temperature", temperature)
    _lists("list_net", student_scores=student_scores, teacher_scores=teacher_scores)
    return softmax_divergence(student_scores, teacher_scores, temperature=temperature)


def lambda_rank(student_scores: Tensor, relevance: Tensor, *, k: int | None = 5) -> Tensor:
    r"""LambdaRank: pairs in the wrong order, weighted by what swapping them changes in NDCG@k.

    With :math:`g = 2^r - 1` the gains, :math:`d = 1 / \log_2(\mathrm{rank} + 1)` the discounts at
    the student's ranks (0 beyond k), and the ideal DCG@k of the list,

    .. math:: \frac{1}{B\,n(n-1)/2} \sum_{r_i > r_j}
        \frac{|g_i - g_j| |d_i - d_j|}{\mathrm{DCG}} \log(1 + e^{s_j - s_i}).

    DeAR's own code differs: it takes pairs in the order of the list, whatever their relevance,
    which is the same for two passages and for sorted lists, and has other discounts above than
    in the ideal.

    Args:
        student_scores: ``[B, n]``, finite. No gradient flows through the ranks.
        relevance: ``[B, n]``, at least 0; gets no gradient. Map a teacher's scores to it first.
        k: 5 in DeAR; None: all ranks.

    Returns:
        a scalar, float32 (float64 if an argument is). A list with equal relevances adds 0.

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Burges 2010; DeAR (arXiv 2508.16998; code DataScienceUIBK/DeAR-Reranking).

    >>> import torch, fastkd
    >>> relevance = torch.tensor([[1.0, 0.0]])
    >>> round(fastkd.recipes.lambda_rank(torch.zeros(1, 2), relevance).item(), 4)
    0.2558
    """
    return _lambda_rank("lambda_rank", "relevance", student_scores, relevance, k)


def _lambda_rank(
    function: str, name: str, scores: Tensor, relevance: Tensor, k: int | None
) -> Tensor:
    student, graded = _lists(function, student_scores=scores, **{name: relevance})
    if readable(graded) and graded.numel() and graded.min() < 0:
        raise ValueError(
            f"{function}: {name} must not be negative for lambda_rank, got {graded.min():g}; map "
            "a teacher's scores to grades"
        )
    size = student.size(1)
    k = size if k is None else to_integer(function, "k", k)
    if k < 1:
        raise ValueError(f"{function}: k must be positive, got {k}")
    places = torch.arange(1, size + 1, device=student.device, dtype=student.dtype)
    by_place = torch.where(places <= k, 1 / torch.log2(places + 1), 0).expand(student.shape)
    order = student.detach().argsort(stable=True, dim=-1, descending=True)
    discounts = torch.zeros_like(by_place).scatter(1, order, by_place)
    gains = torch.exp2(graded) - 1
    ideal = (gains.sort(-1, descending=True).values * by_place).sum(-1)[:, None, None]
    change = _differences(gains).abs() * _differences(discounts).abs()
    weight = torch.where(_differences(graded) > 0, change / torch.where(ideal > 0, ideal, 1), 0)
    return _over_pairs(weight * F.softplus(-_differences(student)))


def dear(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    main: str = "softmax_ce",
    relevance: str | Tensor | None = None,
    alpha: float = 0.3,
    temperature: float = 2.0,
) -> Tensor:
    r"""DeAR's first stage: a ranking loss and the teacher's distribution. The total.

    :math:`(1 - \alpha) L + \alpha T^2 KL(p \| q)`, with p and q the softmaxes over the passages of
    a query at temperature T, averaged over queries. The first passage of a list is the positive.

    ========================  ==============================================================
    ``softmax_ce``            cross-entropy of the positive
    ``ranknet``               :func:`rank_net` with the relevance
    ``listnet``               :func:`list_net` with the relevance
    ``lambda``                :func:`lambda_rank` with the relevance, k = 5
    ``ranknet_softmax_ce``    half ``ranknet``, half ``softmax_ce``
    ========================  ==============================================================

    Args:
        student_scores: ``[B, n]``.
        teacher_scores: ``[B, n]``, gets no gradient.
        main: L, one of the table.
        relevance: ``"teacher"``: the teacher's scores; ``"binary"``: 1 for the positive, else 0; or
            a tensor ``[B, n]``. None: binary for ``lambda`` and ``ranknet_softmax_ce``, else the
            teacher's. ``lambda`` takes no negative numbers.
        alpha: 0.3 in the authors' code, 0.1 in their training script.
        temperature: of the second term, positive.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: DeAR (arXiv 2508.16998; code DataScienceUIBK/DeAR-Reranking).

    >>> import torch, fastkd
    >>> round(fastkd.recipes.dear(torch.zeros(1, 2), torch.zeros(1, 2)).item(), 4)  # 0.7 log 2
    0.4852
    """
    check_choice("dear", "main", main, _MAIN)
    check_share("dear", "alpha", alpha)
    check_no_gradient("dear", alpha=alpha)
    check_positive("dear", "temperature", temperature)
    _lists("dear", student_scores=student_scores, teacher_scores=teacher_scores)
    if relevance is None:
        relevance = "binary" if main in ("lambda", "ranknet_softmax_ce") else "teacher"
    if isinstance(relevance, Tensor):
        grades = relevance
        check_like("dear", "relevance", grades, "student_scores", student_scores)
    else:
        check_choice("dear", "relevance", relevance, ("teacher", "binary"))
        grades = teacher_scores
        if relevance == "binary":
            first = torch.arange(grades.size(1), device=grades.device) == 0
            grades = first.to(grades.dtype).expand(grades.shape)
    positive = torch.zeros(student_scores.shape[:1], dtype=torch.int64, device=grades.device)
    if main == "listnet":
        loss = list_net(student_scores, grades)
    elif main == "lambda":
        loss = _lambda_rank("dear", "relevance", student_scores, grades, 5)
    elif main == "ranknet":
        loss = rank_net(student_scores, grades)
    else:
        loss = mean(-label_log_probs(student_scores, positive))
        if main == "ranknet_softmax_ce":
            loss = (rank_net(student_scores, grades) + loss) / 2
    if alpha == 0:
        return loss
    return (1 - alpha) * loss + softmax_divergence(
        student_scores,
        teacher_scores,
        temperature=temperature,
        square_temperature=True,
        normalizer=student_scores.size(0) / alpha,
    )
