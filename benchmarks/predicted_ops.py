"""The calls whose time is predicted: which kernels run, in which passes, and how to make the call.

This table is all that is written by hand about an op. Instructions come from the kernels' SASS,
launches from the launch log. To follow a change of a kernel's passes, change its line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastkd
from benchmarks.shapes import DIVERGENCES, divergence_options
from benchmarks.time_model import Serial


class Dtype(NamedTuple):
    """The dtypes of the logits: bytes of an element, and how a kernel's mangled name ends."""

    student: int
    teacher: int
    source: str
    flat: str = ""  # of a kernel over elements

    @property
    def pack(self) -> int:
        """The bytes of an entry in registers."""
        return max(self.student, self.teacher)

    @property
    def unit(self) -> int:
        """What counts as one access: a pack of the dtype with the smaller elements."""
        return 16 * min(self.student, self.teacher) // self.pack

    def bytes(self, reads: int, writes: int) -> float:
        """Return the bytes of an entry in so many tensors: both sides', and the student's."""
        return reads * (self.student + self.teacher) / 2 + writes * self.student

    def accesses(self, reads: int, writes: int) -> tuple[int, ...]:
        """Return the accesses of a pack in so many tensors."""
        entries = 16 // self.pack
        parts = (self.bytes(reads, 0), self.bytes(0, writes))
        return tuple(int(entries * x / self.unit) for x in parts)


MIXED = "float32+bfloat16"  # student and teacher
DTYPES = {
    "bfloat16": Dtype(
        *(2, 2), r".*PackedSourceI(N\w*?)?8BFloat16E", r"(N\w*?)?8BFloat16E?Lb1ELb1E"
    ),
    "float32": Dtype(*(4, 4), r".*PackedSourceIf(Lb[01])?E", r"fLb1ELb1E"),
    MIXED: Dtype(*(4, 2), r".*PackedSourceI(N\w*?)?5MixedE"),
}


@dataclass(frozen=True)
class Over:
    """One pass over the rows, as the kernel's source has it."""

    reads: int  # tensors, from memory or where an earlier pass stored them
    writes: int = 0
    again: bool = True  # reads what an earlier pass stored, if the rows stay in shared memory
    mufu: int = 1  # at least so many MUFU operations an entry: tells passes of equal accesses apart
    item: int = 0  # bytes of an entry in the packs, 0: the dtype's
    rows: bool = True  # reads rows at all, not a list in shared memory


NOTHING = Serial()
FIRST_PAIR, FIRST = Over(2, again=False), Over(1, again=False)


@dataclass(frozen=True)
class Part:
    """One kernel of a call."""

    kernel: str  # pattern of the mangled name, before the dtype's
    role: str  # pattern of its role in the launch log
    passes: tuple[Over, ...]
    serial: Serial = NOTHING
    flat: bool = False  # a kernel over elements, not rows
    kept: bool = False  # rows are in shared memory on every device

    def pattern(self, dtype: str) -> str:
        """Return the pattern of the kernel's mangled name."""
        return self.kernel + (DTYPES[dtype].flat if self.flat else DTYPES[dtype].source)


@dataclass(frozen=True)
class Op:
    """A call."""

    name: str
    reads: int  # tensors that it reads and writes at least
    writes: int
    parts: tuple[Part, ...]
    call: Callable[[Tensor, Tensor], Any]  # student, teacher: [rows, vocab]
    gradient: bool = False  # of the student, with the call
    k: int = 0
    mixed: bool = False  # student and teacher may differ in dtype

    @property
    def dtypes(self) -> list[str]:
        """Names of DTYPES."""
        return [x for x in DTYPES if x != MIXED or self.mixed]

    @property
    def group(self) -> str:
        """The name of the op without its variant."""
        return self.name.split()[0]


def _softmax_divergence(divergence: str, mangled: str, sums: bool) -> Op:
    passes = (FIRST_PAIR, *([Over(2)] if sums else []), Over(2, 1))
    kernel = f"softmax_divergence_kernelIN.*?{len(mangled)}{mangled}E"
    # Instructions of the leading thread between the passes, counted in the SASS:
    # after the first pass, the block's sums 300, the logarithms 80, begin() 160, loading what it
    # publishes 90; after the write, until the next row's copies start, 170 (they run while it reads
    # the row's task); after a pass over the terms, its sum 250, its means 100.
    # merge: sums over the cluster's blocks.
    serial = Serial(leader=800 + 350 * sums, merge=150 + 50 * sums, cluster_barriers=1 + sums)

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        options = divergence_options(divergence, student)
        return fastkd.softmax_divergence(student, teacher, **options)

    part = Part(kernel, "rows", passes, serial)
    # alpha_beta has no short formula: with two dtypes its loops have too many paths to read.
    mixed = divergence != "alpha_beta"
    return Op(f"softmax_divergence {divergence}", 2, 1, (part,), call, gradient=True, mixed=mixed)


#: Divergences whose value comes from the first pass.
ONE_SUM = ("forward_kl", "reverse_kl", "cross_entropy", "decoupled_kl")


def _topk(k: int) -> Op:
    # The k entries are gathered while the row is copied.
    serial = Serial(leader=1500, merge=250, cluster_barriers=1)
    part = Part("topk_divergence_kernel", "rows", (FIRST, Over(1, 1)), serial)

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        best = teacher.float().log_softmax(-1).topk(k)
        return fastkd.topk_divergence(student, best.values, best.indices)

    return Op(f"topk_divergence k={k}", 1, 1, (part,), call, gradient=True, k=k)


def _chunks(student: Tensor, _: Tensor) -> Tensor:
    rows, vocab = student.shape
    ids = torch.arange(rows) % vocab
    boundary = torch.arange(vocab) % 3 == 0
    found = fastkd.chunk_log_likelihood(
        student, ids, torch.arange(rows) // 2, -(-rows // 2), boundary=boundary
    )
    return found[0].sum()


def _bytes(student: Tensor, _: Tensor) -> Tensor:
    from benchmarks.byte_level import vocabulary

    return fastkd.byte_log_probs(student, vocabulary(student.size(-1)))


def _kl_div(student: Tensor, teacher: Tensor) -> Tensor:
    return fastkd.kl_div(student, teacher.abs(), reduction="batchmean")


def _cross_entropy(name: str, sums: int, **options: Any) -> Op:
    serial = Serial(leader=900, merge=350, cluster_barriers=1)
    kernel = f"cross_entropy_kernelILNS0_11EntropySumsE{sums}E"
    part = Part(kernel, "rows", (FIRST, Over(1, 1)), serial)

    def call(student: Tensor, _: Tensor) -> Tensor:
        labels = torch.arange(student.size(0)) % student.size(-1)
        return fastkd.cross_entropy(student, labels, **options)

    return Op(name, 1, 1, (part,), call, gradient=True)


def _tokens(entropy: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def call(student: Tensor, _: Tensor) -> Tensor:
        ids = torch.arange(student.size(0)) % student.size(-1)
        found = fastkd.token_log_probs(student, ids, entropy=entropy)
        return found[0].sum() + found[1].sum() if entropy else found.sum()

    return call


def _token_ops(entropy: bool) -> tuple[Op, Op]:
    flag = f"ILb{int(entropy)}E"
    serial = Serial(leader=500, merge=200, cluster_barriers=1)
    forward = Part(f"token_log_probs_kernel{flag}", "rows", (FIRST,), serial)
    backward = Part(
        *(f"token_gradient_kernel{flag}", "gradient"),
        *((Over(1, 1, again=False),), Serial(leader=300)),
    )
    name, call = "token_log_probs" + (" entropy" if entropy else ""), _tokens(entropy)
    return (
        Op(f"{name} forward", 1, 0, (forward,), call),
        Op(f"{name} backward", 2, 1, (forward, backward), call, gradient=True),
    )


_CHUNK_SUM = Part("chunk_log_likelihood_kernel", "rows", (FIRST,), Serial(leader=500))
_CHUNK_GRADIENT = Part(
    "chunk_gradient_kernel", "gradient", (Over(1, 1, again=False),), Serial(leader=300)
)

OPS = {
    op.name: op
    for op in (
        *(
            _softmax_divergence(d, d.title().replace("_", ""), d not in ONE_SUM)
            for d in DIVERGENCES
        ),
        Op(
            "token_stats pair",
            *(2, 0),
            (
                Part(
                    "token_stats_kernelILb1E",
                    "rows",
                    (FIRST_PAIR, Over(2)),
                    Serial(leader=1000, merge=900, cluster_barriers=2),
                ),
            ),
            fastkd.token_stats,
            mixed=True,
        ),
        Op(
            "teacher_topk k=64",
            *(1, 0),
            (
                Part(
                    "teacher_topk_kernel",
                    "rows",
                    (FIRST, Over(1, mufu=0)),
                    # To add the sums, the counts of a digit, and for the keys collected.
                    Serial(leader=1500, merge=150, cluster_barriers=3),
                ),
            ),
            lambda student, teacher: fastkd.teacher_topk(teacher, 64),
            k=64,
        ),
        _topk(64),
        _topk(512),
        Op(
            "clipped_divergence fixed bounds",
            *(2, 1),
            (
                Part(
                    "clipped_divergence_kernel",
                    "rows",
                    (FIRST_PAIR, Over(2), Over(2, 1)),
                    Serial(leader=1200, merge=500, cluster_barriers=2),
                ),
            ),
            lambda student, teacher: fastkd.clipped_divergence(student, teacher, 1e-6, 0.5),
            gradient=True,
            mixed=True,
        ),
        _cross_entropy("cross_entropy", 0),
        _cross_entropy("cross_entropy entropy", 1, entropy_weight=0.5),
        *_token_ops(entropy=False),
        *_token_ops(entropy=True),
        Op("chunk_log_likelihood forward", 1, 0, (_CHUNK_SUM,), _chunks),
        Op(
            "chunk_log_likelihood backward",
            *(2, 1),
            (_CHUNK_SUM, _CHUNK_GRADIENT),
            _chunks,
            gradient=True,
        ),
        Op(
            "byte_log_probs forward",
            *(1, 0),
            (
                Part(
                    "byte_log_probs_kernel",
                    "rows|slices",
                    (Over(1, again=False, mufu=0), Over(1, item=2, rows=False)),
                    # The largest logit, a piece's ends, the slices' sums, two logarithms in double.
                    Serial(leader=950, cluster_barriers=1),
                    kept=True,
                ),
            ),
            _bytes,
        ),
        Op(
            "kl_div",
            *(2, 1),
            (
                Part(
                    "kl_div_kernelILb0E",
                    "terms",
                    (Over(2, 1, again=False, mufu=0),),
                    flat=True,
                ),
            ),
            _kl_div,
            gradient=True,
        ),
    )
}
