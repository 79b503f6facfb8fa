"""Who is compared: fastkd, PyTorch as training loops spell it, and other packages where installed.

Everybody gets the same ready logits (or log-probabilities) and returns the same scalar, reduced as
"batchmean". 16-bit logits are widened to float32 first, as careful loops do: without that the
gradients are off by percents.
"""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks.harness import OURS, Contestant, Exact, Loss
from benchmarks.shapes import BETAS, divergence_options

LIGER = "liger-kernel==0.8.5"
TRITON = "triton"
TORCHTUNE = "torchtune==0.6.1"


def exact_divergence(divergence: str) -> Exact:
    """Return the definition in float64, one value a row."""

    def exact(student: Tensor, teacher: Tensor) -> Tensor:
        options = divergence_options(divergence, student)
        return fastkd.reference.softmax_divergence(student, teacher, reduction="none", **options)

    return exact


def exact_kl_div(log_probs: Tensor, target: Tensor) -> Tensor:
    """Return kl_div's definition in float64, one value a row."""
    return fastkd.reference.kl_div(log_probs, target, reduction="none").sum(-1)


def softmax_divergence_contestants(
    divergence: str, *, peers: bool = True, packages: bool = True
) -> list[Contestant]:
    """Everybody who computes this divergence from logits."""

    def ours(student: Tensor, teacher: Tensor) -> Tensor:
        return fastkd.softmax_divergence(
            student, teacher, **divergence_options(divergence, student), reduction="batchmean"
        )

    # It keeps the last gradient's memory for the next step; nobody else keeps any.
    contestants = [Contestant(OURS, ours, release=fastkd.release_memory)]
    if peers and divergence in _EAGER:
        eager = _EAGER[divergence]
        copies = _EAGER_COPIES[divergence]
        contestants += [
            Contestant("eager", eager, copies=copies),
            Contestant("torch.compile", torch.compile(eager, dynamic=False), copies=copies),
        ]
    if peers and packages:
        contestants += _liger(divergence) + _torchtune(divergence)
        contestants += _liger_kernels(divergence) + _triton(divergence)
    return contestants


def kl_div_contestants(*, peers: bool = True) -> list[Contestant]:
    """fastkd.kl_div, PyTorch's, PyTorch's compiled, and Liger's on a GPU."""

    def ours(log_probs: Tensor, target: Tensor) -> Tensor:
        return fastkd.kl_div(log_probs, target, reduction="batchmean")

    def eager(log_probs: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(log_probs, target, reduction="batchmean")

    # It keeps the last gradient's memory for the next step; nobody else keeps any.
    contestants = [Contestant(OURS, ours, release=fastkd.release_memory)]
    if peers:
        contestants += [
            Contestant("F.kl_div", eager, copies=5),
            Contestant("torch.compile", torch.compile(eager, dynamic=False), copies=5),
        ]
    function = _liger_kernel("kl_div", "LigerKLDivLossFunction") if peers else None
    if function is not None:

        def liger(log_probs: Tensor, target: Tensor) -> Tensor:
            return function(log_probs, target, "batchmean")

        contestants.append(Contestant("liger", liger, copies=4, cuda_only=True))
    return contestants


#: Training loops divide by a temperature, whatever it is; a compiler may drop the division by 1.
TEMPERATURE = 1.0


def beside_eager(ours: Loss, eager: Loss, peers: bool, copies: float) -> list[Contestant]:
    """Ours and, as `peers`, the same in PyTorch, eager and compiled."""
    found = [Contestant(OURS, ours, release=fastkd.release_memory)]
    if peers:
        found += [
            Contestant("eager", eager, copies=copies),
            Contestant("torch.compile", torch.compile(eager, dynamic=False), copies=copies),
        ]
    return found


def wide(logits: Tensor) -> Tensor:
    """In float32 at least, as careful code computes losses."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _scaled(logits: Tensor) -> Tensor:
    return wide(logits) / TEMPERATURE


def _log_probs(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return F.log_softmax(_scaled(student), dim=-1), F.log_softmax(_scaled(teacher), dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _mix(first: Tensor, second: Tensor, share: float) -> Tensor:
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def _forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, p = F.log_softmax(_scaled(student), dim=-1), F.softmax(_scaled(teacher), dim=-1)
    return F.kl_div(log_q, p, reduction="batchmean")


def _reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_probs(student, teacher)
    return _kl(log_q, log_p)


def _jsd(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_probs(student, teacher)
    log_m = _mix(log_p, log_q, BETAS["jsd"])
    return BETAS["jsd"] * _kl(log_p, log_m) + (1 - BETAS["jsd"]) * _kl(log_q, log_m)


def _skew_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_probs(student, teacher)
    return _kl(log_p, _mix(log_p, log_q, BETAS["skew_kl"]))


def _skew_reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_q, log_p = _log_probs(student, teacher)
    return _kl(log_q, _mix(log_q, log_p, BETAS["skew_reverse_kl"]))


def _tvd(student: Tensor, teacher: Tensor) -> Tensor:
    q, p = F.softmax(_scaled(student), dim=-1), F.softmax(_scaled(teacher), dim=-1)
    return 0.5 * (p - q).abs().sum(dim=-1).mean()


def _cross_entropy(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(_scaled(student), F.softmax(_scaled(teacher), dim=-1))


#: Divergences that training loops spell in PyTorch; the others are compared with nobody.
_EAGER: dict[str, Loss] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "cross_entropy": _cross_entropy,
}
_EAGER_COPIES = {name: 7 for name in _EAGER} | {"jsd": 13, "skew_kl": 10, "skew_reverse_kl": 14}


def _liger(divergence: str) -> list[Contestant]:
    """Liger's loss on a chunk of logits, compiled as its fused loss compiles it.

    The fused loss itself takes hidden states and multiplies them by the weights: that product is
    in nobody else's time, so what is called here is the part behind it. It works on chunks of
    1,024 rows; no case has more.
    """
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETAS["jsd"]}.get(divergence)
    function = _liger_function()
    if beta is None or function is None:
        return []

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        return function(student, teacher, beta=beta) / student.size(0)

    return [Contestant("liger", torch.compile(loss, dynamic=False), copies=6)]


def _liger_kernels(divergence: str) -> list[Contestant]:
    """Liger's unfused losses: Triton kernels on log-probabilities, which torch computes."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": BETAS["jsd"]}.get(divergence)
    function = _liger_kernel("jsd", "LigerJSDFunction") if beta is not None else None
    if function is None:
        return []

    def jsd(student: Tensor, teacher: Tensor) -> Tensor:
        return function(*_log_probs(student, teacher), None, beta, -100)

    return [Contestant("liger, unfused", jsd, copies=8, cuda_only=True)]


def _triton(divergence: str) -> list[Contestant]:
    """The Triton kernel of benchmarks/triton_kl.py."""
    if divergence != "forward_kl" or not torch.cuda.is_available():
        return []
    try:
        from benchmarks.triton_kl import forward_kl
    except ImportError as error:
        _say_missing("triton", TRITON, error)
        return []
    return [Contestant("triton", forward_kl, copies=2, cuda_only=True)]


def _torchtune(divergence: str) -> list[Contestant]:
    """torchtune's losses on logits, with no label ignored.

    Its "forward KL" leaves out the teacher's entropy: the value is cross-entropy's, the gradient
    that of forward KL.
    """
    module = _torchtune_module()
    kinds = {"forward_kl": "ForwardKLLoss", "cross_entropy": "ForwardKLLoss"}
    kind = (kinds | {"reverse_kl": "ReverseKLLoss"}).get(divergence)
    if kind is None or module is None:
        return []
    function = getattr(module, kind)()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        labels = torch.zeros(student.size(0), dtype=torch.long, device=student.device)
        return function(student, teacher, labels)

    exact = exact_divergence("cross_entropy") if divergence == "forward_kl" else None
    return [Contestant("torchtune", loss, copies=10, exact=exact)]


@cache
def _liger_function() -> Callable[..., Tensor] | None:
    try:
        from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDFunction
    except ImportError as error:
        _say_missing("liger", f"--no-deps {LIGER} triton", error)
        return None
    return LigerFusedLinearJSDFunction.distillation_loss_fn


@cache
def _liger_kernel(module: str, name: str) -> Callable[..., Tensor] | None:
    """Return a Triton kernel of Liger as a function, where a GPU can run it."""
    if not torch.cuda.is_available():
        return None
    try:
        found = importlib.import_module(f"liger_kernel.ops.{module}")
    except ImportError as error:
        _say_missing("liger", f"--no-deps {LIGER} triton", error)
        return None
    return getattr(found, name).apply


@cache
def _torchtune_module() -> ModuleType | None:
    """Load the one file: importing the package would ask for torchao and more."""
    found = importlib.util.find_spec("torchtune")
    if found is None or not found.submodule_search_locations:
        _say_missing("torchtune", f"--no-deps {TORCHTUNE}", "not installed")
        return None
    path = Path(found.submodule_search_locations[0]) / "modules" / "loss" / "kd_losses.py"
    try:
        spec = importlib.util.spec_from_file_location("benchmarks_torchtune_losses", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"cannot load {path}")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, OSError) as error:
        _say_missing("torchtune", f"--no-deps {TORCHTUNE}", error)
        return None
    return module


def _say_missing(name: str, install: str, reason: object) -> None:
    print(f"!!! {name} is not compared ({reason}): pip install {install}", file=sys.stderr)
