"""A lock on the folder of a run, so that two trainers never write to the same one."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import threading
import time
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_logger = logging.getLogger(__name__)
NAME = ".lock"
_HELD: set[Path] = set()  # by this process, in which file locks exclude nobody
_GUARD = threading.Lock()


class RunLock:
    """Holds a folder until `release`, or until the process ends in whatever way.

    It is a POSIX record lock on a file: the system drops it with its process, so that the lock of a dead process is
    free, and processes that decode images do not inherit it. Where the file system has no locks, a warning says so.

    Args:
        folder: Folder of the run; created if missing, and then taken away by `release` if nothing was written to it.

    Raises:
        ValueError: Another run holds the folder, the message has its process; or it is a file.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(
                f"expected a folder for --out, got {str(folder)!r}, a file or below one: choose another"
            ) from None
        self.file = folder.resolve() / NAME
        self._made = [path.resolve() for path in missing]
        self._stream: BinaryIO | None = None
        with _GUARD:
            if self.file in _HELD:
                raise _held(folder, f"another run of this process ({os.getpid()})")
            if fcntl is None:
                _logger.warning("no file locks on this system: start no second run in %s", folder)
            else:
                self._stream = _locked(self.file, folder)
            _HELD.add(self.file)

    def release(self) -> None:
        """Free the folder; a second call does nothing."""
        with _GUARD:
            if self.file in _HELD:
                _HELD.discard(self.file)
                with contextlib.suppress(OSError):
                    self.file.unlink()
                if self._stream is not None:
                    self._stream.close()
                with contextlib.suppress(OSError):  # not empty
                    for path in self._made:
                        path.rmdir()


def _locked(file: Path, folder: Path) -> BinaryIO:
    while True:
        stream = file.open("a+b", buffering=0)
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _holder(stream)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _held(folder, holder) from error
            _logger.warning("no locks on this file system (%s): start no second run in %s", error.strerror, folder)
            return stream
        if file.exists() and file.stat().st_ino == os.fstat(stream.fileno()).st_ino:
            break
        stream.close()  # its holder has just deleted it: lock the new file
    stream.truncate(0)
    about = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    stream.write(json.dumps(about).encode())
    return stream


def _holder(stream: BinaryIO) -> str:
    """Who holds a lock, as its file says; closes the stream."""
    with stream:
        stream.seek(0)
        try:
            about = json.loads(stream.read(1000))
            return f"process {int(about['pid'])} on {str(about['host'])[:60]!r} since {str(about['since'])[:19]}"
        except (ValueError, KeyError, TypeError, RecursionError):  # not written yet
            return "another process"


def _held(folder: Path, holder: str) -> ValueError:
    return ValueError(
        f"expected a folder that no other run writes to, got {str(folder)!r}, held by {holder}: wait for it to end, "
        "stop it, or give another --out"
    )
