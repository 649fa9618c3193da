"""Trainers in processes of their own, which a server that has imported PyTorch once forks off within milliseconds.

What runs in them is ``python -m timm_gac.train``'s own main function, and they are killed like any process. That the
command itself starts is seen in test_processes.py.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from timm_gac.train import checkpoints

__all__ = ["MOMENTS", "Child", "die_writing", "limit_file_size"]

MOMENTS = ("in the tensors", "before the state", "before the rename", "after the rename")

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["timm_gac.train.__main__", "timm_gac.train.loop", "matplotlib.figure", __name__])


class Child:
    """A trainer that is running.

    Args:
        arguments: Of the command line.
        errors: File for its stderr.
        before: Called in the process first, with ``given``: a function of a module, not of a test file.
        given: Its arguments.
    """

    def __init__(
        self, arguments: Sequence[str], errors: Path, before: Callable[..., None] | None = None, given: tuple = ()
    ) -> None:
        self.errors = errors
        self.process = _SERVER.Process(target=_train, args=(tuple(arguments), str(errors), before, given), daemon=True)
        self.process.start()

    def wait(self, seconds: float = 240) -> int:
        """Its exit status, minus the number of the signal where one ended it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running: {self.stderr()}"
        return self.process.exitcode

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.is_alive()

    def stderr(self) -> str:
        """What it has written there so far."""
        return self.errors.read_text() if self.errors.exists() else ""


def _train(arguments: tuple[str, ...], errors: str, before: Callable[..., None] | None, given: tuple) -> None:
    for file, descriptor in ((errors, 2), (os.devnull, 1)):
        with Path(file).open("w") as stream:
            os.dup2(stream.fileno(), descriptor)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    from timm_gac.train.__main__ import main

    if before is not None:
        before(*given)
    sys.exit(main(arguments))


def limit_file_size(size: int) -> None:
    """No file can grow beyond this many bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def die_writing(moment: str, checkpoint: int) -> None:
    """Kill this process at one of the `MOMENTS` of its n-th checkpoint."""
    write_bytes, write_json, rename, left = checkpoints.write_bytes, checkpoints.write_json, Path.rename, checkpoint

    def at(place: str) -> None:
        nonlocal left
        if place == moment:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def half_written(file: Path, content: bytes) -> None:
        assert file.name == checkpoints.TENSORS
        if moment == "in the tensors" and left == 1:
            file.write_bytes(content[: len(content) // 2])
        at("in the tensors")
        write_bytes(file, content)

    def state_written(file: Path, content: object) -> None:
        assert file.name == checkpoints.STATE
        at("before the state")
        write_json(file, content)

    def renamed(self: Path, target: Path) -> Path:
        ours = self.name.startswith(".partial_")
        if ours:
            at("before the rename")
        result = rename(self, target)
        if ours:
            at("after the rename")
        return result

    checkpoints.write_bytes, checkpoints.write_json, Path.rename = half_written, state_written, renamed
