"""Log-probabilities of given tokens, and entropies, with gradients."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import reference
from fastkd._ops.differentiable import Differentiable
from fastkd._ops.dtensor import is_dtensor, rows_of_dtensors
from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.shards import shards_of
from fastkd.losses import _sharded_softmax


class TokenLogProbs(NamedTuple):
    """One number a row in each field. Logarithms are natural."""

    #: log q of the row's token.
    log_probs: Tensor
    #: Entropy of q in nats.
    entropy: Tensor


def token_log_probs(
    logits: Tensor | LinearLogits,
    token_ids: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    shift: int = 0,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    group: Any = None,
    vocab_start: int | None = None,
) -> Tensor | TokenLogProbs:
    r"""Log-probability of one token a row, and optionally the row's entropy, from one read.

    With :math:`q = \mathrm{softmax}(z / \tau)` and :math:`y` the row's token:

    .. math:: \log q_y \qquad \text{and} \qquad H = -\sum_v q_v \log q_v

    the terms of policy-gradient losses (REINFORCE, PPO, GRPO), of on-policy distillation by sampled
    tokens, and of preference losses. The logits are read once; the backward pass reads them again
    and writes the gradient

    .. math:: \frac{\partial \log q_y}{\partial z_v} = \frac{1[v = y] - q_v}{\tau}, \qquad
              \frac{\partial H}{\partial z_v} = -\frac{q_v (\log q_v + H)}{\tau}

    of both results together. No tensor of probabilities is stored.

    Rows with ``mask`` False or token -100 are not read, have 0 in every result, and get a zero
    gradient even where they hold NaN. ``-inf`` logits are probability 0: a token of probability 0
    has log-probability ``-inf``. A row with a NaN, ``+inf`` or no finite logit gives NaN.

    Args:
        logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides. Or a
            :class:`fastkd.LinearLogits`.
        token_ids: int64 or int32, one a row; -100 for none.
        mask: bool, one a row.
        temperature: positive: a number, or a tensor with one entry a row.
        entropy: whether to return the entropies, too.
        shift: with 1, row t of a sequence (the dimension before the vocabulary) scores the token of
            row t + 1, with the mask there: logits and ids as a model returns and takes them. The
            last row has no token.
        vocab_size: only the first ``vocab_size`` columns are used; the others get a zero gradient.
        logit_softcap: c: logits become c tanh(z / c), in the same read.
        group: the vocabulary is split across this process group, see
            :func:`fastkd.softmax_divergence`, as for DTensors. Tokens are those of the whole
            vocabulary. One all-gather.
        vocab_start: with ``group``, the first of this process's columns.

    Returns:
        The log-probabilities, float32 (float64 for float64 logits) in the leading dimensions'
        shape; with ``entropy=True`` a :class:`TokenLogProbs` of them and the entropies.

    Raises:
        IndexError: a token out of range (on CUDA its row is NaN instead).
        ValueError, TypeError: another argument has the wrong value or type.
        NotImplementedError: ``torch.func`` transforms and batches of gradients with ``group``.

    >>> import torch, fastkd
    >>> logits = torch.tensor([[0.0, 0.0], [0.0, 5.0]], requires_grad=True)
    >>> found = fastkd.token_log_probs(logits, torch.tensor([1, 1]), entropy=True)
    >>> [round(x, 4) for x in found.log_probs.tolist()], round(found.entropy[0].item(), 4)
    ([-0.6931, -0.0067], 0.6931)
    >>> found.log_probs[0].backward()
    >>> logits.grad.tolist()
    [[-0.5, 0.5], [0.0, 0.0]]
    """
    if is_dtensor(logits):
        options = {
            "mask": mask,
            "temperature": temperature,
            "entropy": entropy,
            "shift": shift,
            "vocab_size": vocab_size,
            "logit_softcap": logit_softcap,
            "group": group,
            "vocab_start": vocab_start,
        }
        return rows_of_dtensors(token_log_probs, logits, {"token_ids": token_ids}, options)
    check_logits("token_log_probs", "logits", logits)
    given = {
        "logits": logits,
        "token_ids": token_ids,
        "mask": mask,
        "temperature": temperature,
        "shift": shift,
        "vocab_size": vocab_size,
        "logit_softcap": logit_softcap,
        "entropy": entropy,
    }
    shards = shards_of("token_log_probs", logits, group, vocab_start, vocab_size)
    log_probs, entropies = OP(logits, given, shards=shards)
    return TokenLogProbs(log_probs, entropies) if entropy else log_probs


def _fake(logits: Tensor, entropy: bool, **_: Any) -> tuple[Tensor, ...]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    leading = logits.shape[:-1]
    return (
        logits.new_empty(leading, dtype=dtype),
        logits.new_empty(leading if entropy else 0, dtype=dtype),
        logits.new_empty((3, math.prod(leading)), dtype=torch.float64),
    )


OP = Differentiable(
    "token_log_probs",
    "logits",
    reference.token_log_probs_op,
    fake=_fake,
    absent={"logit_softcap": math.inf},
)
OP.sharded = _sharded_softmax.token_log_probs
