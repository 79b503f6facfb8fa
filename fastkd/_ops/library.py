"""The compiled library: loading it, its instruction set, its errors as Python exceptions."""

import builtins
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import NoReturn

try:
    import torch
except ImportError as error:
    raise ImportError(
        "fastkd needs PyTorch 2.10 or newer: install it first (https://pytorch.org), then fastkd"
    ) from error

#: The package's folder, which also has the compiled libraries.
_FOLDER = Path(__file__).parent.parent


def _version() -> str:
    """The version, from pyproject.toml beside the sources or from the installed metadata."""
    project = _FOLDER.with_name("pyproject.toml")
    if project.exists():
        text = project.read_text(encoding="utf-8")
        found = re.search(r'^name = "fastkd"\nversion = "([^"]+)"', text, re.MULTILINE)
        if found:
            return found[1]
    try:
        return importlib.metadata.version("fastkd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


VERSION: str = _version()


def _find() -> tuple[Path, str]:
    """The path of _C.so, and a remark for the error message if it is missing.

    After `pip install .`, Python run in the source folder finds the folder's fastkd before the
    installed one, without compiled modules. The compiled modules of an installed fastkd of the same
    version are then used: its folder is added to the package's search path.
    """
    beside, others = _FOLDER / "_C.so", ""
    if beside.exists():
        return beside, ""
    for entry in dict.fromkeys(sys.path):
        folder = Path(entry).absolute() / "fastkd"
        if not (folder / "_C.so").exists():
            continue
        here = importlib.metadata.distributions(name="fastkd", path=[str(folder.parent)])
        versions = [distribution.version for distribution in here]
        if VERSION in versions:
            sys.modules["fastkd"].__path__.append(str(folder))
            return folder / "_C.so", ""
        found = ", ".join(versions) or "unknown"
        others = f" (the one in {folder} has version {found}, these sources have {VERSION})"
    return beside, others


_PATH, _OTHERS = _find()


def _load() -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise ImportError(
            f"fastkd needs PyTorch 2.10 or newer, found {torch.__version__}: "
            "`pip install --upgrade torch`"
        )
    if not _PATH.exists():
        raise ImportError(
            f"{_PATH} is missing: fastkd was not built{_OTHERS}. In its source folder run "
            "`pip install --no-build-isolation -e .`"
        )
    try:
        torch.ops.load_library(_PATH)
    except OSError as error:
        raise ImportError(
            f"{_PATH} does not load with PyTorch {torch.__version__} ({error}). Rebuild it: "
            "`pip install --no-build-isolation --force-reinstall --no-deps .`"
        ) from error


_load()

#: The CUDA architectures compiled in, "" if none.
CUDA_ARCHITECTURES: str = torch.ops.fastkd._cuda_architectures()

_KIND = re.compile(r"(ValueError|TypeError|IndexError): ([\w.]+: .*)", re.DOTALL)


def raise_as_python(error: RuntimeError) -> NoReturn:
    """Raise the error that an op's message begins with: ValueError, TypeError or IndexError."""
    found = _KIND.search(str(error))
    if found is None:
        raise error
    message = found[2].split("\nException raised from")[0].rstrip()
    raise getattr(builtins, found[1])(message) from None


def is_tracing(tensor: torch.Tensor) -> bool:
    """Whether values cannot be read: while compiling or exporting, for fake and meta tensors."""
    return (
        torch.compiler.is_compiling()
        or type(tensor) not in (torch.Tensor, torch.nn.Parameter)
        or tensor.is_meta
        or torch._C._len_torch_dispatch_stack() > 0  # make_fx, FakeTensorMode and similar modes
    )


def transforms_active() -> bool:
    """Whether torch.func transforms or forward-mode AD are active, which need plain PyTorch."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


@torch.compiler.assume_constant_result
def traced_transforms_active() -> bool:
    """The same in code that torch.compile traces."""
    return transforms_active()


def is_batched(*tensors: torch.Tensor | None) -> bool:
    """Whether one of the tensors is a batch of gradients: by vmap or `is_grads_batched=True`.

    The latter uses an older kind of batched tensors than torch.func.
    """
    legacy = torch._C._functorch.is_legacy_batchedtensor
    return transforms_active() or any([x is not None and legacy(x) for x in tensors])


def cpu_capability(use: str | None = None) -> str:
    """Return the name of the instruction set of the CPU kernels in use.

    Args:
        use: switch to this set first, for tests and benchmarks: ``"x86_64_v2"``, ``"x86_64_v3"``
            (AVX2), ``"x86_64_v4"`` (AVX-512), or ``"baseline"`` on other processors.

    Raises:
        ValueError: the set is not compiled in, or this machine cannot run it.

    >>> import fastkd
    >>> fastkd.cpu_capability() in ("x86_64_v2", "x86_64_v3", "x86_64_v4", "baseline")
    True
    """
    try:
        return torch.ops.fastkd._cpu_capability(use)
    except RuntimeError as error:
        raise_as_python(error)


def usable_instruction_sets() -> list[str]:
    """Return the instruction sets compiled in that this machine runs, best first."""
    chosen, found = cpu_capability(), []
    for name in ("x86_64_v4", "x86_64_v3", "x86_64_v2", "baseline"):
        try:
            found.append(cpu_capability(name))
        except ValueError:
            continue
    cpu_capability(chosen)
    return found
