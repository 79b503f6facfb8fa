"""Divergences between the softmaxes of two sets of logits, and their gradients, in one op."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import reference
from fastkd._ops.arguments import can_be_read, check_tensor, numbers_tensor, to_integer
from fastkd._ops.dtensor import is_dtensor, loss_of_dtensors
from fastkd._ops.linear.logits import LinearLogits, check_logits
from fastkd._ops.loss import Loss
from fastkd._ops.names import Divergence, Reduction, TeacherMix
from fastkd._ops.shards import shards_of
from fastkd.losses import _sharded_divergence


def softmax_divergence(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits | Sequence[Tensor | LinearLogits],
    *,
    divergence: Divergence = "forward_kl",
    beta: float | Tensor = 0.5,
    alpha: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    teacher_temperature: float | Tensor | None = None,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    teacher_weights: Sequence[float] | Tensor | None = None,
    teacher_mix: TeacherMix = "logits",
    teacher_rows: Tensor | None = None,
    labels: Tensor | None = None,
    label_weight: float | Tensor = 1.0,
    ignore_index: int = -100,
    shift: int = 0,
    vocab_size: int | None = None,
    logit_softcap: float | tuple[float | None, float | None] | None = None,
    reduction: Reduction = "mean",
    normalizer: float | Tensor | None = None,
    square_temperature: bool = False,
    inplace: bool = False,
    group: Any = None,
    vocab_start: int | None = None,
) -> Tensor:
    r"""Divergence between a teacher's and a student's next-token distributions.

    With :math:`p = \mathrm{softmax}(z_T / \tau_T)` and :math:`q = \mathrm{softmax}(z_S / \tau)`
    over the last dimension (the vocabulary), a row's value in nats is

    ============================  ==========================================================
    ``forward_kl``                :math:`KL(p \| q)`
    ``reverse_kl``                :math:`KL(q \| p)`
    ``jsd``                       :math:`\beta KL(p \| m) + (1-\beta) KL(q \| m)`,
                                  :math:`m = \beta p + (1-\beta) q`; ``beta`` 0 and 1 stand
                                  for forward and reverse KL
    ``skew_kl``                   :math:`KL(p \| \beta p + (1-\beta) q)`, ``beta`` usually 0.1
    ``skew_reverse_kl``           :math:`KL(q \| \beta q + (1-\beta) p)`, ``beta`` usually 0.1
    ``skew_reverse_kl_detached``  the value of ``skew_reverse_kl``; the gradient takes the
                                  mixture for a constant, see below
    ``tvd``                       :math:`\frac12 \sum_v |p_v - q_v|`; a speculative decoder
                                  accepts with probability 1 - tvd
    ``cross_entropy``             :math:`-\sum_v p_v \log q_v`
    ``mixed_kl``                  :math:`\beta KL(p \| q) + (1-\beta) KL(q \| p)`
    ``alpha_beta``                the Alpha-Beta divergence, see below; usually ``alpha`` 0.2,
                                  ``beta`` 0.7
    ``decoupled_kl``              :math:`\alpha\,TCKD + \beta\,NCKD`, see below; usually
                                  ``alpha`` 1, ``beta`` 8; needs ``labels``
    ============================  ==========================================================

    ``skew_reverse_kl_detached``: the student's gradient is
    :math:`q (\log q - \log m - KL(q \| m)) / \tau`. Nothing but the mixture contains the teacher:
    its gradient is 0 (zeros, if it requires one), for every ``beta``. Second derivatives take the
    mixture for a constant, too.

    ``alpha_beta``, with :math:`\alpha + \beta \ge 0`:

    .. math::
        \frac{-1}{\alpha\beta} \sum_v \Big[p_v^\alpha q_v^\beta
            - \frac{\alpha}{\alpha+\beta} p_v^{\alpha+\beta}
            - \frac{\beta}{\alpha+\beta} q_v^{\alpha+\beta}\Big]

    and its limits where a denominator is 0; with :math:`\alpha + \beta = 0` that is
    :math:`\alpha^{-2} \sum_v [(p_v / q_v)^\alpha - 1 - \alpha \log (p_v / q_v)]`. ``alpha`` 1 and
    ``beta`` 0 give forward KL, 0 and 1 reverse KL, 1/2 and 1/2 four times the squared Hellinger
    distance, 1 and 1 half the squared distance. A token that is impossible on both sides adds
    nothing.

    ``decoupled_kl`` (DKD), with t the row's label and :math:`p'`, :math:`q'` the distributions of
    the other tokens: :math:`TCKD = KL((p_t, 1 - p_t) \| (q_t, 1 - q_t))` and
    :math:`NCKD = KL(p' \| q')`, so that :math:`KL(p \| q) = TCKD + (1 - p_t) NCKD`. Both stay
    accurate where the label is nearly certain. NCKD is 0 where a side has no other token.
    ``label_weight`` times the cross-entropy is added as everywhere.

    Each input is read from memory once and each gradient written once, in the forward call.
    Backward only scales the gradients, and does nothing where the incoming gradient is 1. No
    [rows, vocab] tensor of probabilities is stored. Under ``torch.no_grad()`` no gradient is
    computed. Kept until backward: the gradients and, for second derivatives, the arguments; with
    ``inplace`` only the gradients.

    Pass logits, not probabilities. Row t uses label t. The labels of a causal language model
    belong to the row before: see ``shift``.

    ``-inf`` logits are probability 0. Mass where the other side's probability is 0 gives ``inf``
    and a finite gradient, as if that probability were 2^-126. A column masked with the smallest
    finite number of its dtype adds nothing where its probability is 0; mass of the other side
    there gives the true value, which is huge, and the same finite gradient. A row with a NaN,
    ``+inf`` or no finite logit gives NaN; other rows are not affected. KL-type values are never
    negative. They and their gradients stay relatively accurate as the student approaches the
    teacher, also if a constant is added to a row's logits. Where the teacher is nearly certain of
    a token to which the student gives little probability, the gradients of ``skew_kl`` are within
    1e-5; those of ``jsd`` and ``skew_reverse_kl``, which are small there, lose digits, fewer than
    eager float32.

    Split vocabularies: with ``group`` each process reads its columns and sends 16 bytes a row (20
    with labels, 24 also at another temperature; ``decoupled_kl`` 24 and 28), and then 4 bytes for
    the value and 4 for each gradient: two all-gathers a call, whatever the divergence, and none in
    the backward pass, which reads the columns again and writes the gradient of this process's
    columns. Second derivatives differentiate the definition over these columns; what they send
    and keep is in ``docs/splitting.md``. Several teachers
    are first mixed, and their mixture is stored: one or two more all-gathers. Logits that are
    DTensors mean the same without ``group``: at most one dimension of the mesh shards the
    vocabulary, the others shard leading dimensions or replicate. Then ``teacher_logits`` and
    tensors with one entry a row are DTensors, or plain tensors of whole size. The result is a
    DTensor: placed as the rows with ``reduction="none"``, else ``Partial("sum")`` over the
    dimensions that shard rows; the denominator is that of all rows (one more all-reduce where rows
    are counted). It is the same inside
    :func:`torch.distributed.tensor.parallel.loss_parallel`, where
    :func:`torch.nn.functional.kl_div` gives a wrong gradient.

    Args:
        student_logits: ``[..., vocab]`` float32, bfloat16, float16 or float64, any strides. The
            leading dimensions are rows (tokens). Or a :class:`fastkd.LinearLogits`.
        teacher_logits: the same shape, its own dtype, or a list of such tensors. A single tensor
            gets a gradient if it requires one; tensors in a list do not. Each may be a
            :class:`fastkd.LinearLogits`.
        divergence: one of the table.
        beta: share of the mixture, in [0, 1]: a number, or a float tensor with one entry a row. No
            gradient flows to it. Divergences without beta in the table do not use it. For
            ``alpha_beta`` and ``decoupled_kl`` any number.
        alpha: of ``alpha_beta`` and ``decoupled_kl``: a number, or a float tensor with one entry a
            row. No gradient flows to it.
        temperature: of the student, positive: a number, or a tensor with one entry a row.
        teacher_temperature: of the teacher; None: the same as ``temperature``.
        weight: float, one a row, multiplies the row's loss (also with ``reduction="none"``). No
            gradient flows to it.
        mask: bool, one a row. A row with mask False or weight 0 is not read, adds nothing and
            gets a zero gradient even where its logits are NaN.
        teacher_weights: one for each of the K teachers (K may be 1): K finite numbers or a
            ``[..., K]`` tensor, of which a row that is not finite gives NaN. None: 1/K each.
        teacher_mix: ``"logits"``: the teacher is softmax of :math:`\sum_k w_k z_k`, weights of any
            sign; a token with logit -inf for a teacher of nonzero weight has probability 0.
            ``"probs"``: :math:`\sum_k w_k \mathrm{softmax}(z_k / \tau_T)`, weights not negative
            and divided by their sum. ``"contrast"`` and ``"share"``, of two teachers
            (AlignDistil): softmax of :math:`(z_1 + a (z_1 - z_2)) / \tau_T` and of
            :math:`(a z_1 + (1 - a) z_2) / \tau_T`, with
            :math:`a = w_1 \sum_v |\mathrm{softmax}(z_1) - \mathrm{softmax}(z_2)| + 10^{-3}` of
            each row, at temperature 1 and without the 1/2 of ``tvd``. The row's divergence, not its
            label term, is multiplied by :math:`w_2 / a`. Here the weights are no shares but these
            two positive numbers; None gives 1/2 for both, so that a is tvd + 10^-3 and the factor
            1 / (2 a). :func:`fastkd.recipes.align_distil` has
            :math:`w_1 = \beta_2, w_2 = \beta`: 10 and 0.1. No mixture is stored, except with
            ``group``.
        teacher_rows: int64 or int32, one a row of the student: which row of the teachers' flattened
            leading dimensions teaches it, for sequences that differ in their tokens or for teachers
            stored once. A row with -1 drops out, also of a mean's denominator. The teachers then
            have any leading dimensions, and take no gradient. Nothing is copied, except with
            ``group``. Of a :class:`fastkd.LinearLogits` the chosen rows' hidden states are copied,
            and gradients flow to it.
        labels: int64 or int32, one a row: adds ``label_weight`` x the cross-entropy of the
            student at temperature 1. Rows with ``ignore_index`` drop out of both terms.
        label_weight: see ``labels``: a finite number, or a float tensor with one entry a row. No
            gradient flows to it. With 0 even a label of probability 0 adds nothing.
        ignore_index: see ``labels``.
        shift: with 1, row t of each sequence (the dimension before the vocabulary) uses the label,
            label weight, mask and weight of row t + 1, and the last row is ignored: for the logits
            and labels of a causal model, without slicing either. With n: those of row t + n.
        vocab_size: only the first ``vocab_size`` columns are used, on both sides (padded
            vocabularies); the others get a zero gradient.
        logit_softcap: logits become :math:`c \tanh(z / c)` where they are read, before anything
            else: a number c for both sides, or a pair (student, teacher) of which None leaves its
            side as it is. Positive and finite. The label term uses the capped logits, a list's
            teachers are capped one by one, and gradients flow to the logits as given. ``-inf``
            stays probability 0. Any other number is capped, also the smallest finite one:
            mask columns with ``-inf``, or after the cap as such models do. The capped logits are
            accurate to 2 or 3 roundings of float32, however large c is; what is said above of a
            student near its teacher holds of the logits so rounded. The gradient of a logit far
            beyond c is relatively accurate to about (1 + 2 |z| / c) roundings. On CUDA the rows
            are read one element at a time, and again in each pass, as those of several teachers are
            (reverse KL from the logits of two teachers is faster where the rows fit into shared
            memory).
        reduction: ``"none"`` (one loss a row), ``"sum"``, ``"mean"`` (over rows kept by ``mask``
            and ``ignore_index``), ``"batchmean"`` (over ``student_logits.size(0)``) or
            ``"elementmean"`` (over rows x vocabulary, as ``nn.KLDivLoss`` by default). A
            denominator of 0 gives 0 with a zero gradient.
        normalizer: replaces the reduction's denominator: a number or a 0-d tensor, for example
            the Trainer's ``num_items_in_batch``.
        square_temperature: multiplies the divergence (not the label term) by temperature².
        inplace: the gradient overwrites ``student_logits``, whose version counter is incremented.
            The step then needs no second [rows, vocab] tensor, and the teacher's logits are not
            kept until backward. Do not read the logits after the call. Second derivatives are not
            available. Without grad mode nothing is overwritten. Use ``shift`` instead of
            ``logits[:, :-1]``, whose gradient autograd copies into one of the whole tensor.
        group: a torch.distributed process group across which the vocabulary is split: process r
            has the columns from r x width on, of both logits, or from ``vocab_start`` on.
            ``labels`` and ``vocab_size`` count the whole vocabulary; everything else is the same on
            all processes, and so is the result, bit for bit. See above.
        vocab_start: with ``group``, the first of this process's columns, where they are not of
            equal widths; ``vocab_size`` must then be given. A process may have none.

    Returns:
        float32 (float64 where an input is): a scalar, or with ``reduction="none"`` the leading
        dimensions' shape.

    Raises:
        ValueError, TypeError, IndexError: an argument has the wrong value or type, or a label is
            out of range; the message names it, the expected and the actual value.
        NotImplementedError: with ``group``: ``torch.func`` transforms, batches of gradients, a
            gradient of a single teacher with ``teacher_weights``. With ``teacher_rows``: a list of
            tensors and ``LinearLogits``.

    Sources: Hinton et al. 2015 (arXiv 1503.02531); GKD (2306.13649) for ``jsd``; DistiLLM
    (2402.03898) for the skewed divergences; DistiLLM-2 (2503.07067) for the constant mixture;
    DistillSpec (2310.08461) for ``tvd``; ABKD (2505.04560) for ``alpha_beta``;
    DKD (2203.08679) for ``decoupled_kl``; AlignDistil (2503.02832) for ``contrast``.

    >>> import torch, fastkd
    >>> student = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 1.0]], requires_grad=True)
    >>> teacher = torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.0, 1.0]])
    >>> loss = fastkd.softmax_divergence(student, teacher, reduction="none")
    >>> [round(x, 4) for x in loss.tolist()]
    [0.0816, 0.0]
    >>> loss.sum().backward()
    >>> [round(x, 4) for x in student.grad[0].tolist()]
    [0.048, 0.1305, -0.1786]
    """
    options = {
        "divergence": divergence,
        "beta": beta,
        "alpha": alpha,
        "teacher_temperature": teacher_temperature,
        "teacher_weights": teacher_weights,
        "teacher_mix": teacher_mix,
        "teacher_rows": teacher_rows,
        "temperature": temperature,
        "weight": weight,
        "mask": mask,
        "labels": labels,
        "label_weight": label_weight,
        "ignore_index": ignore_index,
        "shift": shift,
        "vocab_size": vocab_size,
        "logit_softcap": logit_softcap,
        "square_temperature": square_temperature,
        "reduction": reduction,
        "normalizer": normalizer,
    }
    if is_dtensor(student_logits):
        others = {"teacher_logits": teacher_logits}
        place = {"group": group, "vocab_start": vocab_start, "inplace": inplace}
        return loss_of_dtensors(softmax_divergence, student_logits, others, {**options, **place})
    shards = shards_of("softmax_divergence", student_logits, group, vocab_start, vocab_size)
    arguments = given(student_logits, teacher_logits, options)
    return OP(student_logits, arguments, inplace=inplace, shards=shards)


def given(
    student_logits: Tensor | LinearLogits,
    teacher_logits: Tensor | LinearLogits | Sequence[Tensor | LinearLogits],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The arguments by name, as the op takes them."""
    check_logits("softmax_divergence", "student_logits", student_logits)
    options["student_logits"] = student_logits
    options["teacher_logits"] = _teachers(teacher_logits)
    if options["teacher_rows"] is not None:
        check_tensor("softmax_divergence", "teacher_rows", options["teacher_rows"])
        for teacher in options["teacher_logits"]:
            if torch.is_grad_enabled() and isinstance(teacher, Tensor) and teacher.requires_grad:
                raise ValueError(
                    "softmax_divergence: teacher_logits take no gradient with teacher_rows, but "
                    "one requires it; detach it"
                )
        _choose_hidden(student_logits, options)
    options["teacher_weights"] = _weights(options["teacher_weights"], student_logits)
    return options


def _choose_hidden(student_logits: Tensor | LinearLogits, options: dict[str, Any]) -> None:
    """Replace heads of teachers by those of the chosen rows' hidden states."""
    teachers = options["teacher_logits"]
    heads = [isinstance(x, LinearLogits) for x in teachers]
    if not any(heads):
        return
    if not all(heads):
        raise NotImplementedError(
            "softmax_divergence: teacher_rows needs a list of teachers that are all LinearLogits, "
            "or all tensors"
        )
    rows = options["teacher_rows"]
    if rows.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"softmax_divergence: teacher_rows must be int64 or int32, got {rows.dtype}"
        )
    leading = student_logits.shape[:-1]
    if rows.shape != leading:
        raise ValueError(
            "softmax_divergence: teacher_rows must have one entry a row, shape "
            f"{list(leading)}, got shape {list(rows.shape)}"
        )
    if any(x.shape[:-1] != teachers[0].shape[:-1] for x in teachers):
        raise ValueError(
            "softmax_divergence: teacher_logits must all have the same number of rows with "
            f"teacher_rows, got shapes {', '.join(str(list(x.shape)) for x in teachers)}"
        )
    options["teacher_logits"] = [x.chosen(rows, "softmax_divergence") for x in teachers]
    # A row without a teacher drops out, also where the mask is that of a later row.
    taught, mask, shift = rows >= 0, options["mask"], options["shift"]
    if not (isinstance(shift, int) and shift == 0) and taught.dim():
        taught = taught.roll(to_integer("softmax_divergence", "shift", shift), -1)
    if mask is not None:
        check_tensor("softmax_divergence", "mask", mask)
    if mask is None:
        options["mask"] = taught
    elif mask.shape == leading:  # else the op says what is wrong with it
        options["mask"] = mask & taught
    options["teacher_rows"] = None


def _teachers(
    teacher_logits: Tensor | LinearLogits | Sequence[Tensor | LinearLogits],
) -> list[Tensor | LinearLogits]:
    if isinstance(teacher_logits, (Tensor, LinearLogits)):
        return [teacher_logits]
    if not isinstance(teacher_logits, (list, tuple)):
        raise TypeError(
            "softmax_divergence: teacher_logits must be a tensor or a list of tensors, got "
            f"{type(teacher_logits).__name__}"
        )
    if torch.is_grad_enabled():
        for teacher in teacher_logits:
            if isinstance(teacher, (Tensor, LinearLogits)) and teacher.requires_grad:
                raise ValueError(
                    "softmax_divergence: teacher_logits in a list take no gradient, but one "
                    "requires it; detach it, or pass a single teacher as a tensor"
                )
    return list(teacher_logits)


def _weights(weights: Sequence[float] | Tensor | None, like: Any) -> Tensor | None:
    if weights is None:
        return None
    if isinstance(weights, Tensor):
        check_tensor("softmax_divergence", "teacher_weights", weights)
        # Of one entry a row each: a row whose weights are not finite is NaN.
        if weights.dim() == 1 and weights.is_floating_point() and can_be_read(weights):
            for number in weights.tolist():
                if not math.isfinite(number):
                    raise ValueError(
                        f"softmax_divergence: teacher_weights must be finite, got {number}"
                    )
        return weights
    return numbers_tensor("softmax_divergence", "teacher_weights", weights, like)


OP = Loss(
    "softmax_divergence",
    ("student_logits", "teacher_logits"),
    reference.softmax_divergence_op,
    precision=("student_logits", "teacher_logits"),
    absent={"teacher_temperature": "temperature"},
    overwrites=True,
)
OP.serves(softmax_divergence, given)
OP.sharded = _sharded_divergence.softmax_divergence
