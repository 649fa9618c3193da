"""``python ranks.py [-m] PROGRAM ARGUMENTS``: a program as two processes of one job, with the variables of torchrun.

One is forked off the other once this package is imported, which takes torchrun's own two and itself seconds each.
"""

from __future__ import annotations

import os
import runpy
import socket
import sys


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
