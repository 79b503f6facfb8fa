"""How a test's process ends that is one of a process group."""

import os
import sys
from typing import NoReturn

import torch.distributed as dist


def leave() -> NoReturn:
    """End this process at once, when all of its group have come here.

    A process that has used gloo (torch 2.13) is aborted or hangs now and then where it ends in the
    usual way, with or without ``destroy_process_group``.
    """
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
