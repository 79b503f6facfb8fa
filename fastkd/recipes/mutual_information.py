"""Bounds on the mutual information of two models' features, from scores of all pairs."""

import math

import torch
from torch import Tensor, nn

from fastkd._ops.checks import check_positive
from fastkd.acm._arguments import check_count
from fastkd.recipes._chunks import wide
from fastkd.recipes._features import check_floats, check_like, check_rank, mean, product, unit
from fastkd.recipes._rows import check_share


def infonce(student_hidden: Tensor, teacher_hidden: Tensor, *, temperature: float = 1.0) -> Tensor:
    r"""Contrastive loss: each student's row finds its teacher's row among all of the batch.

    The mean over i of :math:`-\log (e^{c_{ii}} / \sum_j e^{c_{ij}})` with :math:`c_{ij}` the cosine
    of the student's row i and the teacher's row j, over the temperature. One direction; swap the
    arguments for the other. Cosines with a zero row are 0.

    It trains SemCoT's sentence encoder: the original reasoning first, the condensed one second, at
    temperature 1.

    Args:
        student_hidden: ``[N, D]``.
        teacher_hidden: ``[N, D]``.
        temperature: positive.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: SemCoT (arXiv 2510.24940; code YinhanHe123/SemCoT); van den Oord et al. (1807.03748).

    >>> import torch, fastkd
    >>> round(fastkd.recipes.infonce(torch.eye(3), torch.eye(3)).item(), 4)  # log(1 + 2 / e)
    0.5514
    """
    check_rank("infonce", "student_hidden", student_hidden, "N", "D")
    check_like("infonce", "teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    check_positive("infonce", "temperature", temperature)
    cosines = product(unit(wide(student_hidden)), unit(wide(teacher_hidden)).mT)
    return mean(-(cosines / temperature).log_softmax(-1).diagonal())


def mi_alpha(scores: Tensor, log_baseline: Tensor, *, alpha: float = 0.5) -> Tensor:
    r"""Minus a lower bound on the mutual information of two models (MI-alpha). A term.

    With f the scores, b the baseline's logarithm and
    :math:`m_{ij} = \alpha \frac1{n-1} \sum_{k \ne j} e^{f_{ik}} + (1-\alpha) e^{b_i}`, the bound is

    .. math:: I = 1 + \frac1{n(n-1)} \sum_{i \ne j} (f_{ii} - \log m_{ij})
              - \frac1{n(n-1)} \sum_{i \ne j} e^{f_{ij}} / m_{ii}.

    With alpha 1 the baseline is the batch's, as in InfoNCE, and with 0 the learned one, as in TUBA;
    the authors' documentation says the reverse of their code. The distillation term of Distiller
    beside it is the cross-entropy form of KL at temperature 1, weight 1.

    Args:
        scores: ``[n, n]``, row i, column j: of the student's example i and the teacher's j, as
            :class:`MiCritic` gives them. n is at least 2.
        log_baseline: ``[n]``.
        alpha: in [0, 1].

    Returns:
        a scalar to minimise, float32 (float64 if an argument is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: Distiller (arXiv 2109.11105; code Cli212/Distiller); Poole et al. (1905.06922).

    >>> import torch, fastkd
    >>> round(fastkd.recipes.mi_alpha(torch.zeros(4, 4), torch.zeros(4)).item(), 6)
    0.0
    >>> fastkd.recipes.mi_alpha(5 * torch.eye(4), torch.zeros(4)).item() < -0.5
    True
    """
    check_rank("mi_alpha", "scores", scores, "n", "n")
    check_floats("mi_alpha", scores=scores, log_baseline=log_baseline)
    n = scores.size(0)
    if n < 2 or scores.size(1) != n:
        raise ValueError(
            f"mi_alpha: scores must be [n, n] with n at least 2, got {list(scores.shape)}"
        )
    if log_baseline.shape != (n,):
        raise ValueError(f"mi_alpha: log_baseline must be [{n}], got {list(log_baseline.shape)}")
    check_share("mi_alpha", "alpha", alpha)
    scores, log_baseline = wide(scores), wide(log_baseline)
    parts = []
    # Products: a logarithm of the number would make it a constant of a compiled graph.
    one = torch.ones((), dtype=scores.dtype, device=scores.device)
    if alpha > 0:
        parts.append(_log_sum_of_others(scores) + (one * alpha / (n - 1)).log())
    if alpha < 1:
        parts.append((log_baseline + (one * (1 - alpha)).log()).unsqueeze(-1).expand_as(scores))
    log_m = parts[0] if len(parts) == 1 else torch.logaddexp(parts[0], parts[1])
    others = ~torch.eye(n, dtype=torch.bool, device=scores.device)
    joint = torch.where(others, scores.diagonal().unsqueeze(-1) - log_m, 0).sum()
    # exp(-inf) for the diagonal: a score there may be large.
    marginal = torch.where(others, scores - log_m.diagonal().unsqueeze(-1), -math.inf).exp().sum()
    return (marginal - joint) / (n * (n - 1)) - 1


def _log_sum_of_others(scores: Tensor) -> Tensor:
    r""":math:`\log \sum_{k \ne j} e^{f_{ik}}` for all i and j, in O(n²).

    Subtracting :math:`e^{f_{ij}}` from a row's sum loses digits only if j is the row's maximum:
    there the others are summed again.
    """
    places = torch.arange(scores.size(1), device=scores.device)
    largest = places == scores.detach().argmax(-1, keepdim=True)
    total = scores.logsumexp(-1, keepdim=True)
    share = torch.where(largest, 0, (scores - total).exp())  # at most 1/2
    rest = torch.where(largest, -math.inf, scores).logsumexp(-1, keepdim=True)
    return torch.where(largest, rest, total + torch.log1p(-share))


class MiCritic(nn.Module):
    """Critic and baseline for :func:`mi_alpha`.

    Two networks of two hidden layers with ReLU map the student's and the teacher's features to
    ``dim`` channels; a score is a dot product of these. A third one gives the logarithm of the
    baseline of each of the teacher's examples. Distiller uses 512 hidden channels and 16 to 64 for
    ``dim``.

    >>> import torch, fastkd
    >>> critic = fastkd.recipes.MiCritic(8, 12)
    >>> scores, log_baseline = critic(torch.randn(5, 8), torch.randn(5, 12))
    >>> list(scores.shape), list(log_baseline.shape)
    ([5, 5], [5])
    >>> loss = fastkd.recipes.mi_alpha(scores, log_baseline)
    """

    def __init__(self, student_width: int, teacher_width: int, *, hidden: int = 512, dim: int = 32):
        super().__init__()
        student_width = check_count("MiCritic", "student_width", student_width)
        teacher_width = check_count("MiCritic", "teacher_width", teacher_width)
        hidden, dim = check_count("MiCritic", "hidden", hidden), check_count("MiCritic", "dim", dim)
        self.student = _mlp(student_width, hidden, dim)
        self.teacher = _mlp(teacher_width, hidden, dim)
        self.baseline = _mlp(teacher_width, hidden, 1)

    def forward(self, student_hidden: Tensor, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Scores ``[n, n]`` and baselines ``[n]`` of features ``[n, width]``."""
        scores = self.student(student_hidden) @ self.teacher(teacher_hidden).mT
        return scores, self.baseline(teacher_hidden).squeeze(-1)


def _mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, out),
    )
