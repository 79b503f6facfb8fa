"""Cross-entropy of hard labels, with label smoothing, an entropy term and a z-loss."""

from typing import Any

from torch import Tensor

from fastkd import reference
from fastkd._ops.arguments import check_tensor
from fastkd._ops.dtensor import is_dtensor, loss_of_dtensors
from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.loss import Loss
from fastkd._ops.names import Reduction
from fastkd._ops.shards import shards_of
from fastkd.losses import _sharded_softmax


def cross_entropy(
    logits: Tensor | LinearLogits,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    label_smoothing: float = 0.0,
    entropy_weight: float = 0.0,
    entropy_temperature: float = 1.0,
    entropy_mask: Tensor | str | None = None,
    z_loss_weight: float = 0.0,
    ignore_index: int = -100,
    shift: int = 0,
    vocab_size: int | None = None,
    logit_softcap: float | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    inplace: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> Tensor:
    r"""Cross-entropy of one label a row, its gradient in the same call: one read and one write.

    With :math:`q = \mathrm{softmax}(z / \tau)`, :math:`a = \mathrm{softmax}(z / \tau_H)`, label
    smoothing s and V columns, the loss of a row is

    .. math:: -(1 - s) \log q_y - \frac{s}{V} \sum_v \log q_v + c_H H(a)
              + c_Z \Big(\log \sum_v e^{z_v / \tau}\Big)^2

    With the defaults it is :func:`torch.nn.functional.cross_entropy` of class indices. The entropy
    H is that of dParallel's certainty-forcing term, of entropy minimisation and, with a negative
    weight, of confidence penalties; the last term is PaLM's z-loss.

    ``-inf`` logits are probability 0: a label of probability 0 has an infinite loss and a finite
    gradient, and label smoothing over such columns an infinite loss. A row with a NaN, ``+inf`` or
    no finite logit gives NaN.

    Args:
        logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides. Or a
            :class:`fastkd.LinearLogits`.
        labels: int64 or int32, one a row.
        weight: float, one a row. Rows with 0 are not read.
        mask: bool, one a row. Rows with False are not read, add nothing and get a zero gradient.
        temperature: positive: a number, or a tensor with one entry a row.
        label_smoothing: s, in [0, 1].
        entropy_weight: :math:`c_H`, of either sign.
        entropy_temperature: :math:`\tau_H`, positive.
        entropy_mask: the rows that get the entropy's term, of those that are read: bool, one a row;
            ``"correct"``: where the label is the likeliest token (of equal ones the lowest);
            None: all.
        z_loss_weight: :math:`c_Z`.
        ignore_index: rows with this label are not read.
        shift: with 1, row t of a sequence (the dimension before the vocabulary) takes the label,
            weight and masks of row t + 1, and the last row drops out.
        vocab_size: only the first ``vocab_size`` columns are used; the others get a zero gradient.
        logit_softcap: c: logits become c tanh(z / c), in the same read.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` (over the rows kept by ``mask`` and
            ``ignore_index``, whatever their weights), ``"batchmean"`` or ``"elementmean"``.
        normalizer: replaces the reduction's denominator: a number or a 0-d tensor.
        inplace: the gradient overwrites ``logits``, see :func:`fastkd.softmax_divergence`.
        group: the vocabulary is split across this process group, see
            :func:`fastkd.softmax_divergence`, as for DTensors. Labels are those of the whole
            vocabulary. One all-gather.
        vocab_start: with ``group``, the first of this process's columns.

    Returns:
        float32 (float64 for float64 logits): a scalar, or with ``reduction="none"`` the leading
        dimensions' shape.

    Raises:
        IndexError: a label out of range (on CUDA its row is NaN instead).
        ValueError, TypeError: another argument has the wrong value or type.
        NotImplementedError: ``torch.func`` transforms and batches of gradients with ``group``.

    Sources: Szegedy et al. 2015 (arXiv 1512.00567, label smoothing); Chowdhery et al. 2022
    (2204.02311, z-loss); dParallel (2509.26488, entropy of correct tokens).

    >>> import torch, fastkd
    >>> logits = torch.tensor([[0.0, 1.0], [3.0, 0.0]], requires_grad=True)
    >>> loss = fastkd.cross_entropy(logits, torch.tensor([1, -100]))
    >>> round(loss.item(), 4)
    0.3133
    >>> loss.backward()
    >>> [[round(x, 4) for x in row] for row in logits.grad.tolist()]
    [[0.2689, -0.2689], [0.0, 0.0]]
    """
    options = {
        "weight": weight,
        "mask": mask,
        "temperature": temperature,
        "label_smoothing": label_smoothing,
        "entropy_weight": entropy_weight,
        "entropy_temperature": entropy_temperature,
        "entropy_mask": entropy_mask,
        "z_loss_weight": z_loss_weight,
        "ignore_index": ignore_index,
        "shift": shift,
        "vocab_size": vocab_size,
        "logit_softcap": logit_softcap,
        "reduction": reduction,
        "normalizer": normalizer,
    }
    if is_dtensor(logits):
        others = {"labels": labels}
        place = {"group": group, "vocab_start": vocab_start, "inplace": inplace}
        return loss_of_dtensors(cross_entropy, logits, others, {**options, **place})
    shards = shards_of("cross_entropy", logits, group, vocab_start, vocab_size)
    arguments = given(logits, labels, options)
    return OP(logits, arguments, inplace=inplace, shards=shards)


def given(logits: Tensor | LinearLogits, labels: Tensor, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, as the op takes them."""
    check_logits("cross_entropy", "logits", logits)
    check_tensor("cross_entropy", "labels", labels)
    options["logits"], options["labels"] = logits, labels
    options["label_weight"], options["square_temperature"] = 1.0, False
    entropy_mask = options["entropy_mask"]
    options["entropy_correct"] = isinstance(entropy_mask, str)
    if isinstance(entropy_mask, str):
        if entropy_mask != "correct":
            raise ValueError(
                "cross_entropy: entropy_mask must be a bool tensor, 'correct' or None, got "
                f"{entropy_mask!r}"
            )
        options["entropy_mask"] = None
    return options


OP = Loss(
    "cross_entropy",
    ("logits",),
    reference.cross_entropy_op,
    precision=("logits",),
    overwrites=True,
)
OP.serves(cross_entropy, given)
OP.sharded = _sharded_softmax.cross_entropy
