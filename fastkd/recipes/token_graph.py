"""Distillation of the graph of nearest tokens of a batch of images."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastkd._ops.arguments import to_integer
from fastkd._ops.checks import check_positive
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.recipes._chunks import check_callable, wide
from fastkd.recipes._features import check_factors, check_floats, check_rank, mean, product
from fastkd.recipes.mutual_information import infonce


def trg(
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    *,
    k: int,
    sigma: float,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
    temperature: float = 0.1,
    projection: Callable[[Tensor], Tensor] | None = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Token relationship graphs: local, global and inner-image relations. A term.

    The weighted sum of three terms, to which the paper adds cross-entropy and distillation of the
    logits.

    - Local, over all tokens of the batch: :math:`\sum_i KL(\mathrm{softmax}\,A^S_i \|
      \mathrm{softmax}\,A^T_i)`, with :math:`A_{ij} = \exp(-\|t_i - t_j\|^2 / 2 \sigma)` for the k
      nearest tokens j of i and i itself, else 0, in each model's own features.
    - Global: :func:`infonce` of each student's token with its teacher's among all tokens.
    - Inner: the mean squared difference of :math:`\mathrm{softmax}(F F^T / \sqrt D)` inside each
      image.

    The local term has no second derivatives.

    Args:
        student_hidden: ``[B, P, D_S]``, P patches an image.
        teacher_hidden: ``[B, P, D]``.
        k: neighbours of a token, at least 1 and fewer than the tokens; the paper's was not found.
        sigma: width of the kernel, positive; the paper's was not found.
        weights: of the three terms; the paper's were not found. A term of weight 0 is not computed.
        temperature: of the global term; in the paper it falls during training.
        projection: of the student's tokens ``[N, D_S]`` to the teacher's width, in the global term.
        samples: use so many random patches of each image, the same in both models, for the first
            two terms: their memory grows with the square of the number of tokens. None: all.
        generator: of these patches.

    Returns:
        a scalar, float32 (float64 if a side is).

    Raises:
        ValueError, TypeError: an argument has the wrong value, shape or type.

    Source: TRG (arXiv 2306.12442), from a detailed review; no code was found.

    >>> import torch, fastkd
    >>> hidden = torch.randn(2, 5, 4)
    >>> fastkd.recipes.trg(hidden, hidden, k=3, sigma=1.0, weights=(1.0, 0.0, 1.0)).item()
    0.0
    """
    check_factors("trg", "weights", weights, 3)
    check_positive("trg", "sigma", sigma)
    check_positive("trg", "temperature", temperature)
    check_callable("trg", "projection", projection)
    check_floats("trg", student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    check_rank("trg", "student_hidden", student_hidden, "B", "P", "D")
    check_rank("trg", "teacher_hidden", teacher_hidden, "B", "P", "D")
    if student_hidden.shape[:2] != teacher_hidden.shape[:2]:
        raise ValueError(
            f"trg: teacher_hidden must have student_hidden's images and patches "
            f"{list(student_hidden.shape[:2])}, got {list(teacher_hidden.shape[:2])}"
        )
    sides = [wide(student_hidden), wide(teacher_hidden)]
    patches = sides[0].size(1)
    if samples is None:
        tokens = [x.flatten(0, 1) for x in sides]
    else:
        samples = to_integer("trg", "samples", samples)
        if not 1 <= samples <= patches:
            raise ValueError(f"trg: samples must be in [1, {patches}], got {samples}")
        order = torch.rand(sides[0].shape[:2], generator=generator, device=sides[0].device).argsort(
            -1
        )
        chosen = order[:, :samples].unsqueeze(-1)
        tokens = [x.take_along_dim(chosen, 1).flatten(0, 1) for x in sides]
    count = tokens[0].size(0)
    k = to_integer("trg", "k", k)
    if not 1 <= k < count:
        raise ValueError(f"trg: k must be in [1, {count}), the number of tokens, got {k}")
    total = sides[0].new_zeros(())
    if weights[0]:
        student, teacher = (_nearest(x, k, sigma) for x in tokens)
        # The op's teacher is the student's graph: KL(A_S || A_T), with a gradient for A_S.
        local = softmax_divergence(teacher, student, reduction="sum", normalizer=1 / weights[0])
        total = total + local
    if weights[1]:
        own = tokens[0] if projection is None else projection(tokens[0])
        if own.shape != tokens[1].shape:
            raise ValueError(
                f"trg: student_hidden must have teacher_hidden's {tokens[1].size(-1)} channels, or "
                f"a projection that gives them, got {own.size(-1)}"
            )
        total = total + weights[1] * infonce(own, tokens[1], temperature=temperature)
    if weights[2]:
        inner = [(product(x, x.mT) / math.sqrt(x.size(-1))).softmax(-1) for x in sides]
        total = total + weights[2] * mean((inner[0] - inner[1]).square())
    return total


def _nearest(tokens: Tensor, k: int, sigma: float) -> Tensor:
    """Kernel values ``[N, N]`` of each token with itself and its k nearest, else 0."""
    distances = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist").square()
    itself = torch.eye(len(tokens), dtype=torch.bool, device=tokens.device)
    near = distances.detach().masked_fill(itself, -1).topk(k + 1, largest=False).indices
    kernel = torch.exp(-distances / (2 * sigma))
    return torch.zeros_like(kernel).scatter(1, near, kernel.gather(1, near))
