"""`python -m fastkd`: what is installed, compiled and usable here."""

import platform

import torch

import fastkd
from fastkd._library import _PATH, cpu_capability


def _runnable() -> list[str]:
    names = ["x86_64_v4", "x86_64_v3", "x86_64_v2", "baseline"]
    chosen, found = cpu_capability(), []
    for name in names:
        try:
            found.append(cpu_capability(name))
        except ValueError:
            continue
    cpu_capability(chosen)
    return found


def main() -> None:
    """Print the report."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none usable"
    for name, value in (
        ("fastkd", fastkd.__version__),
        ("library", _PATH),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("CPU kernels usable here", ", ".join(_runnable())),
        ("CPU kernels in use", cpu_capability()),
        ("threads", torch.get_num_threads()),
        ("CUDA kernels", "not built"),
        ("GPU", gpu),
    ):
        print(f"{name + ':':26}{value}")


if __name__ == "__main__":
    main()
