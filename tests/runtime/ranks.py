"""``python ranks.py [-m] PROGRAM ARGUMENTS``: a program as two processes of one job, with the variables of torchrun.

One is forked off the other once this package is imported, which takes torchrun's own two and itself seconds each.
`run_ranks` starts a test's program so, on GPUs by torchrun; the program joins its job with `joined`.
"""

from __future__ import annotations

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from warm import WarmPython

TESTS = Path(__file__).parents[1]


def run_ranks(warm_python: WarmPython, program: Path, where: str) -> None:
    """Run a program as two processes, on ``cpu`` or ``gpus``; each has to write ``same``."""
    folders = [str(TESTS / "runtime"), str(TESTS / "ops"), os.environ.get("PYTHONPATH", "")]
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, folders)))
    if where == "cpu":
        done = warm_python([__file__, str(program), where], env=environment)
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        arguments = [*launcher, str(program), where]
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same") == 2


@contextmanager
def joined() -> Iterator[torch.device]:
    """This process in the job's group, and its device: NCCL and a GPU each, or gloo and the CPU, as `run_ranks` says.

    A block that ends well writes ``same``.
    """
    import torch
    import torch.distributed as dist

    on_gpus = sys.argv[1] == "gpus"
    dist.init_process_group("nccl" if on_gpus else "gloo")
    device = torch.device("cuda", dist.get_rank()) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True
    yield device
    sys.stdout.write("same\n")
    if on_gpus:
        torch.cuda.synchronize()
    dist.destroy_process_group()


def main() -> int:
    """Run the program as rank 0 and wait for rank 1, or as rank 1."""
    import accelerate  # noqa: F401

    import timm_gac.train.loop  # noqa: F401

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    other = os.fork()
    rank = str(int(other == 0))
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    del sys.argv[0]
    status = 0
    try:
        if sys.argv[0] == "-m":
            runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        status = int(leaving.code or 0)
    return status or (os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0)


if __name__ == "__main__":
    sys.exit(main())
