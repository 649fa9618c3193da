"""Python programs in processes forked off a server that has imported PyTorch and timm, which takes seconds, once.

A program finds its arguments, folder, variables, path and streams as ``python`` has them, and nothing of this package
is imported before it does so itself. What PyTorch, Triton, OpenMP and the Hub's client read from the environment when
they are imported is that of the tests: a program with other variables of theirs wants `subprocess`.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

__all__ = ["WarmPython"]


class WarmPython:
    """A server, which starts with the first program and ends with the block."""

    def __enter__(self) -> WarmPython:
        self._server: subprocess.Popen[str] | None = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.communicate(timeout=60)  # ends as its input does

    def __call__(
        self, arguments: Sequence[str], *, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, as `subprocess.run` does that captures text.

        Args:
            arguments: Those of ``python``: a script, ``-m`` and a module, or ``-c`` and code; then the program's own.
            cwd: Its working folder; that of the tests by default.
            env: Its variables; those of the tests by default.
        """
        if self._server is None:
            # Whose path a program gets is for its own PYTHONPATH to say.
            given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
            pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._server = subprocess.Popen([sys.executable, __file__], env=given, start_new_session=True, **pipes)
        with tempfile.TemporaryDirectory() as folder:
            streams = [str(Path(folder, name)) for name in ("stdout", "stderr")]
            request = {
                "arguments": list(arguments),
                "cwd": str(cwd or Path.cwd()),
                "env": dict(os.environ if env is None else env),
                "streams": streams,
            }
            status = self._answer(json.dumps(request))
            return subprocess.CompletedProcess(list(arguments), status, *(Path(file).read_text() for file in streams))

    def _answer(self, request: str) -> int:
        server = self._server
        assert server is not None and server.stdin is not None and server.stdout is not None
        try:
            server.stdin.write(request + "\n")
            server.stdin.flush()
            return int(server.stdout.readline())
        except BaseException:  # such as a timeout: the answer would be the next program's
            self._server = None
            os.killpg(server.pid, signal.SIGKILL)
            server.communicate()
            raise


def serve() -> None:
    """Answer each request by the exit status of a process of its own."""
    gc.disable()  # nothing that is made here is garbage
    import timm  # noqa: F401

    gc.freeze()  # a collection in a child would copy the memory that it shares
    gc.enable()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            end(json.loads(line))
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


def end(request: dict) -> None:
    """Run a program and leave as Python does, but for the seconds of taking PyTorch's modules to pieces."""
    status = 0
    try:
        run(**request)
    except SystemExit as leaving:
        if isinstance(leaving.code, int):
            status = leaving.code
        elif leaving.code is not None:
            status = 1
            sys.stderr.write(f"{leaving.code}\n")
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status & 0xFF)


def run(arguments: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Be the program."""
    for descriptor, file in enumerate([os.devnull, *streams]):
        opened = os.open(file, os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    interpret = {name: value for name, value in os.environ.items() if name == "TRITON_INTERPRET"}
    os.environ.clear()
    os.environ.update(env | interpret)  # Triton, which is imported, does either all in its interpreter or nothing
    os.chdir(cwd)
    sys.path[:1] = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]  # instead of this folder
    first, *rest = arguments
    if first == "-c":
        code, *rest = rest
        sys.argv, sys.path[:0] = ["-c", *rest], [""]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    elif first == "-m":
        module, *rest = rest
        sys.argv, sys.path[:0] = [module, *rest], [cwd]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = arguments, [str(Path(first).resolve().parent)]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve()
