"""What is measured: vocabularies, rows, dtypes, and the bytes each op cannot avoid moving."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd._ops.arguments import choices

LLAMA_2, GPT_2, LLAMA_3, QWEN, GEMMA_3 = 32_000, 50_257, 128_256, 151_936, 262_144
VOCABULARIES = (LLAMA_2, GPT_2, LLAMA_3, QWEN, GEMMA_3)
ROWS = (1, 4, 16, 64, 256, 1024)
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
DIVERGENCES = choices("softmax_divergence", "divergence")
#: `beta` of the divergences that take one, as their papers use it.
BETAS = {
    "jsd": 0.5,
    "skew_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "skew_reverse_kl_detached": 0.1,
    "alpha_beta": 0.7,
    "decoupled_kl": 8.0,
}


def divergence_options(divergence: str, student: Tensor) -> dict[str, Any]:
    """What a call of softmax_divergence takes for this divergence."""
    options: dict[str, Any] = {"divergence": divergence, "beta": BETAS.get(divergence, 0.5)}
    if divergence == "decoupled_kl":
        # One label: a benchmark checks its rows by the few distinct ones among them.
        label, rows = 7919 % student.size(-1), student.shape[:-1]
        labels = torch.full(rows, label, device=student.device)
        options |= {"labels": labels, "label_weight": 0.0}
    return options


@dataclass(frozen=True)
class Traffic:
    """Passes over a [rows, vocab] tensor that an op needs at the least."""

    reads: int
    writes: int


@dataclass(frozen=True)
class Shape:
    """Logits or log-probabilities [rows, vocab] of one dtype, the same on both sides."""

    rows: int
    vocab: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of one tensor of this shape."""
        return self.rows * self.vocab * self.dtype.itemsize

    def traffic_bytes(self, traffic: Traffic) -> int:
        """Bytes moved if nothing is read or written twice."""
        return (traffic.reads + traffic.writes) * self.bytes

    def __str__(self) -> str:
        """Rows x vocab and dtype, as the tables print it."""
        return f"{self.rows:,} x {self.vocab:,} {str(self.dtype).removeprefix('torch.')}"


def correlated_logits(rows: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits in float64 that agree about as well as a trained pair does."""
    random = torch.Generator().manual_seed(seed)
    teacher = 3 * torch.randn(rows, vocab, dtype=torch.float64, generator=random)
    noise = torch.randn(rows, vocab, dtype=torch.float64, generator=random)
    return 0.9 * teacher + noise, teacher
