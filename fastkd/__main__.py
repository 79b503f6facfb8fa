"""`python -m fastkd`: a report of what is installed, compiled and usable here."""

import platform

import torch

import fastkd
from fastkd._ops.library import _PATH, CUDA_ARCHITECTURES, cpu_capability, usable_instruction_sets


def main() -> None:
    """Print the report."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none usable"
    for name, value in (
        ("fastkd", fastkd.__version__),
        ("library", _PATH),
        ("torch", torch.__version__),
        ("python", platform.python_version()),
        ("CPU kernels usable here", ", ".join(usable_instruction_sets())),
        ("CPU kernels in use", cpu_capability()),
        ("products of bfloat16", torch.ops.fastkd._bfloat16_capability(None)),
        ("threads", torch.get_num_threads()),
        (
            "CUDA kernels",
            CUDA_ARCHITECTURES or "not built",
        ),
        ("GPU", gpu),
    ):
        print(f"{name + ':':26}{value}")


if __name__ == "__main__":
    main()
