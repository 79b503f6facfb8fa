"""Distillation in transformers' Trainer (checked with transformers 5.24 and accelerate 1.15)."""

from typing import Any

import torch
from torch import Tensor, nn

from fastkd._ops.linear.logits import LinearLogits
from fastkd._ops.shift import IGNORED, following
from fastkd.integrations._modules import (
    LinearHead,
    base_of,
    call_through,
    lm_head,
    reads_backbone,
    unwrapped,
    without_cache,
)
from fastkd.integrations._options import KDOptions
from fastkd.losses._softmax_divergence import softmax_divergence
from fastkd.losses._topk_divergence import topk_divergence
from fastkd.teachers._collate import COLUMNS
from fastkd.teachers._teacher_topk import stored_entries

__all__ = ["DistillationMixin", "DistillationTrainer"]  # noqa: F822


class DistillationMixin:
    """Gives a Trainer a teacher: ``class MyTrainer(DistillationMixin, SFTTrainer)``.

    The loss is :func:`fastkd.softmax_divergence` to a live teacher, or
    :func:`fastkd.topk_divergence` to a stored one: batches then have the columns
    ``teacher_log_probs`` and ``teacher_indices``, ``[B, T, k]``, whose row t scores token t + 1 as
    :func:`fastkd.teacher_topk` of the teacher's logits gives them (-1, or a log-probability of -1e4
    or less, where there is nothing).
    :func:`fastkd.teachers.collate` reads them from a store. A batch with these columns uses them,
    also where there is a live teacher.

    Rows count whose next label is not -100. The mean is over the tokens of the whole step: of all
    accumulated batches, and of all processes as ``average_tokens_across_devices`` says. A row
    without a stored token adds nothing, nor does its label, but is counted in the denominator.

    With ``head="fused"`` the logits of neither side are stored: the backbone runs, and then the
    loss on its hidden states, both through the forward of the wrapped model and of its output
    layer, so that DDP, FSDP and DeepSpeed see an ordinary forward. Where the output layer is not a
    plain linear layer on the backbone's output (it has an adapter, is quantised, or comes after
    another layer, as in BERT), or ``compute_metrics`` needs logits, it is ``head="logits"``.
    ``predict`` returns logits only with ``head="logits"``.

    Args:
        args: of the Trainer.
        teacher: a causal language model over the same tokens; None with a stored teacher. It is
            set to ``eval`` and takes no gradient.
        kd: :class:`fastkd.integrations.KDOptions`.
        kwargs: of the Trainer.

    Raises:
        TypeError: ``teacher`` is no module, ``kd`` no KDOptions, or a model is a masked language
            model or an encoder-decoder.
        ValueError: a batch has no labels, or there is neither a teacher nor a batch's columns of
            one; the Trainer was given a ``compute_loss_func`` or ``label_smoothing_factor``, which
            the loss would ignore.
        NotImplementedError: several GPUs in one process (DataParallel): start one process each.
    """

    #: The Trainer's flag, set with each loss: whether it is divided by the tokens of the whole
    #: step, so that the Trainer does not divide it by the number of accumulated batches.
    loss_is_scaled_for_ga: bool | None = None

    def __init__(
        self,
        *args: Any,
        teacher: nn.Module | None = None,
        kd: KDOptions | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher is not None and not isinstance(teacher, nn.Module):
            kind = type(teacher).__name__
            raise TypeError(f"DistillationMixin: teacher must be a torch.nn.Module, got {kind}")
        if kd is not None and not isinstance(kd, KDOptions):
            raise TypeError(f"DistillationMixin: kd must be KDOptions, got {type(kd).__name__}")
        super().__init__(*args, **kwargs)
        ignored = {
            "compute_loss_func": self.compute_loss_func,  # type: ignore[attr-defined]
            "label_smoothing_factor": self.args.label_smoothing_factor,  # type: ignore[attr-defined]
        }
        for name, value in ignored.items():
            if value:
                raise ValueError(
                    f"DistillationMixin: {name} must not be given, as the loss is that of kd, got "
                    f"{value}"
                )
        self.kd = KDOptions() if kd is None else kd
        _check_causal(model=self.model, teacher=teacher)  # type: ignore[attr-defined]
        # Before they are wrapped: FSDP may replace parameters by parts of one.
        models = [x for x in (self.model, teacher) if x is not None]  # type: ignore[attr-defined]
        self._fuses = self.kd.head == "fused" and all(map(reads_backbone, models))
        self.teacher = None
        if teacher is not None:
            teacher.requires_grad_(False)
            accelerator = self.accelerator  # type: ignore[attr-defined]
            # With a cache, models do not find the texts of a packed row by their position ids.
            self._teacher_options = without_cache(teacher)
            self.teacher = accelerator.prepare_model(teacher, evaluation_mode=True).eval()

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the columns of a stored teacher in the batches."""
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        self._signature_columns = [*columns, *(c for c in COLUMNS if c not in columns)]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The Trainer's own method, with the distillation loss."""
        inputs = dict(inputs)
        labels, shifted = inputs.pop("labels", None), inputs.pop("shift_labels", None)
        stored = [inputs.pop(name, None) for name in COLUMNS]
        if labels is None and shifted is None:
            raise ValueError("DistillationMixin: a batch must have labels, got none")
        if self.teacher is None and (stored[0] is None or stored[1] is None):
            raise ValueError(
                f"DistillationMixin: without a teacher a batch must have {' and '.join(COLUMNS)}"
            )
        # Row t scores the label of t + 1; the last row nothing.
        targets = following(labels, IGNORED) if shifted is None else shifted
        found = None if stored[0] is None else (stored[0], stored[1])
        normalizer = self._normalizer(num_items_in_batch)
        self.loss_is_scaled_for_ga = normalizer is not None
        metrics = return_outputs and getattr(self, "compute_metrics", None) is not None
        head = None if metrics else self._fused_head(model)
        if head is None:
            outputs = model(**inputs)
            logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
            if _learns_prompts(model):  # rows of virtual tokens, before the text
                logits = logits[:, -targets.size(-1) :]
            teacher = None if found else self._teacher_logits(inputs)
            loss = self._loss(logits, teacher, found, targets, normalizer)
        else:

            def whole(**inputs: Any) -> Tensor:
                # Not among the arguments, which FSDP casts to the dtype of its parameters.
                return self._whole(model, head, found, targets, normalizer, inputs)

            loss = call_through(model, whole, **inputs)
            outputs = {"loss": loss}
        return (loss, outputs) if return_outputs else loss

    def _normalizer(self, items: Tensor | int | None) -> Tensor | float | None:
        args, accelerator = self.args, self.accelerator  # type: ignore[attr-defined]
        if args.n_gpu > 1:
            raise NotImplementedError(
                "DistillationMixin: several GPUs in one process are not supported: start a process "
                "for each (torchrun, accelerate launch)"
            )
        if items is None or not args.average_tokens_across_devices:
            return items
        # Of all processes, over which gradients are averaged.
        return items / (accelerator.num_processes // self.get_tp_size())  # type: ignore[attr-defined]

    def _fused_head(self, model: nn.Module) -> LinearHead | None:
        if not self._fuses or _learns_prompts(model):
            return None
        heads = [lm_head(m) for m in (model, self.teacher) if m is not None]
        return heads[0] if all(head.is_plain for head in heads) else None

    @torch.no_grad()
    def _teacher_logits(self, inputs: dict[str, Any]) -> Tensor:
        assert self.teacher is not None
        outputs = self.teacher(**{**inputs, **self._teacher_options})
        return outputs["logits"] if isinstance(outputs, dict) else outputs[0]

    def _whole(
        self,
        model: nn.Module,
        head: LinearHead,
        stored: tuple[Tensor, Tensor] | None,
        targets: Tensor,
        normalizer: Tensor | float | None,
        inputs: dict[str, Any],
    ) -> Tensor:
        """What runs as the model's forward: the backbone, then the loss as the head's forward."""
        # accelerate puts autocast around the forward that this replaces.
        with self.accelerator.autocast():  # type: ignore[attr-defined]
            hidden = _backbone(model)(**inputs)[0]
            if stored is not None:
                return call_through(
                    head.module,
                    lambda x: self._loss(
                        _linear(x, head, self.kd), None, stored, targets, normalizer
                    ),
                    hidden,
                )
            assert self.teacher is not None
            teacher_head = lm_head(self.teacher)
            options = {**inputs, **self._teacher_options}
            with torch.no_grad():
                theirs = call_through(self.teacher, lambda: _backbone(self.teacher)(**options)[0])

            def loss(x: Tensor) -> Tensor:
                return call_through(
                    teacher_head.module,
                    lambda mine: self._loss(
                        _linear(mine, head, self.kd),
                        _linear(theirs, teacher_head, self.kd),
                        None,
                        targets,
                        normalizer,
                    ),
                    x,
                )

            return call_through(head.module, loss, hidden)

    def _loss(
        self,
        student: Tensor | LinearLogits,
        teacher: Tensor | LinearLogits | None,
        stored: tuple[Tensor, Tensor] | None,
        targets: Tensor,
        normalizer: Tensor | float | None,
    ) -> Tensor:
        kd = self.kd
        options: dict[str, Any] = {
            "divergence": kd.divergence,
            "beta": kd.beta,
            "temperature": kd.temperature,
            "square_temperature": kd.square_temperature,
            "labels": targets,
            "label_weight": kd.label_weight,
            "ignore_index": IGNORED,
            "normalizer": normalizer,
        }
        if stored is not None:
            log_probs, indices = stored
            return topk_divergence(
                student,
                log_probs,
                indices,
                tail=kd.tail,
                stored_temperature=kd.stored_temperature,
                mask=stored_entries(log_probs, indices).any(-1),
                **options,
            )
        assert teacher is not None
        widths = _vocabulary(student), _vocabulary(teacher)
        if widths[0] != widths[1]:
            options["vocab_size"] = min(widths)  # one side is padded
        return softmax_divergence(student, teacher, **options)


def _linear(hidden: Tensor, head: LinearHead, kd: KDOptions) -> LinearLogits:
    bias = None if head.bias is None else head.logit_scale * head.bias
    return LinearLogits(
        hidden,
        head.weight,
        bias,
        scale=head.logit_scale,
        softcap=head.logit_softcap,
        chunk_size=kd.chunk_size,
    )


def _check_causal(**models: nn.Module | None) -> None:
    """Raise for models whose row t does not score token t + 1."""
    from transformers.models.auto import modeling_auto as auto

    causal = set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    masked = set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()) - causal
    for name, model in models.items():
        inner: Any = None if model is None else base_of(model)
        kind = type(inner).__name__
        both = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
        if kind in masked or both:
            raise TypeError(
                f"DistillationMixin: {name} must be a causal language model, got {kind}, "
                f"{'an encoder-decoder' if both else 'a masked language model'}"
            )


def _learns_prompts(model: nn.Module) -> bool:
    config = getattr(unwrapped(model), "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def _vocabulary(logits: Tensor | LinearLogits) -> int:
    return logits.weight.size(0) if isinstance(logits, LinearLogits) else logits.size(-1)


def _backbone(model: Any) -> nn.Module:
    """The model without its output layer."""
    return base_of(model).base_model  # type: ignore[return-value]


class _Lazy:
    """DistillationTrainer is made at its first use: transformers is imported then."""

    made: type | None = None


def __getattr__(name: str) -> Any:
    if name != "DistillationTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _Lazy.made is None:
        from transformers import Trainer

        _Lazy.made = type(
            "DistillationTrainer",
            (DistillationMixin, Trainer),
            {
                "__doc__": "transformers' Trainer with a teacher: see :class:`DistillationMixin`.",
                "__module__": __name__,
            },
        )
    return _Lazy.made
