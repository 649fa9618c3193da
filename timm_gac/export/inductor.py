"""AOTInductor: what it needs, what of it can run side by side, and its packages in a process of their own."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_logger = logging.getLogger(__name__)


class Phases:
    """Says in the log what a long piece of work does now, and how long each part of it took."""

    def __init__(self) -> None:
        self._began: float | None = None

    def begin(self, what: str) -> None:
        """The last part is over, and another begins."""
        self._say(f"{what} ...")
        self._began = time.monotonic()

    def end(self, what: str) -> None:
        """The last part is over, and all is done."""
        self._say(what)
        self._began = None

    def _say(self, what: str) -> None:
        took = "" if self._began is None else f"{time.monotonic() - self._began:.0f} s; "
        _logger.warning("%s%s", took, what)


def check_compiler() -> None:
    """Raise a ValueError unless Inductor finds a C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "expected a C++ compiler such as g++ to compile a package, got none: install one, or write an exported "
            "program, which needs none"
        ) from error


@contextmanager
def writers_kept() -> Iterator[None]:
    """Let AOTInductor of PyTorch before 2.14 tell its writers of code apart, within ``with``.

    It remembers which writer declared an array by the id of a bound method, which Python gives to another one as soon
    as that is gone, and then uses the array before its declaration, so that the C++ does not compile. Kept, ids differ.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14):
        yield
        return
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    original: Any = CppWrapperCpu.codegen_int_array_var
    kept: dict[int, Any] = {}

    def declare(self: Any, int_array: str, writeline: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(writeline, "__self__", writeline)
        return original(self, int_array, kept.setdefault(id(owner), writeline), *args, **kwargs)

    patched: Any = CppWrapperCpu
    patched.codegen_int_array_var = declare
    try:
        yield
    finally:
        patched.codegen_int_array_var = original


@contextmanager
def libraries_that_load() -> Iterator[None]:
    """Link packages so that the process that loads one need not change for it, within ``with``.

    AOTInductor writes weights as assembly that does not say whether it wants code on the stack, and GNU's linker (2.40,
    Debian 12's) takes that for a yes. glibc from 2.41 on refuses to load such a package; before, all stacks change.

    A compiler that has the C++ standard library as an archive only puts a copy of it into the package. Beside the
    process's own the copy's locales have not been set up, and `std::regex`, with which a package reads the name of its
    device, ends in a segmentation fault or an error: even one of a single linear layer, on an H200 with Ubuntu 24.04
    and PyTorch 2.11. So the shared library comes first in the link; where it is the default anyway nothing changes.
    """
    if sys.platform != "linux":
        yield
        return
    from torch._inductor import cpp_builder

    original: Any = cpp_builder.get_cpp_torch_device_options

    def options(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        found[3].extend(("Wl,-z,noexecstack", "l:libstdc++.so.6"))  # without the first hyphen, as all flags there
        return found

    patched: Any = cpp_builder
    patched.get_cpp_torch_device_options = options
    try:
        yield
    finally:
        patched.get_cpp_torch_device_options = original


@contextmanager
def vector_units_probed() -> Iterator[None]:
    """Try out the processor's vector units on a thread, while within ``with`` AOTInductor compiles kernels for a GPU.

    It compiles a few lines of C++ for each kind of unit and loads them in a new Python process, one after the other,
    before it compiles a package's C++: 45 s of 125 for a small network on two busy cores. For a CPU it asks earlier.
    """
    from torch._inductor import codecache, cpu_vec_isa

    probe = threading.Thread(target=cpu_vec_isa.pick_vec_isa, name="vector-units", daemon=True)
    original: Any = codecache.pick_vec_isa

    def pick() -> Any:
        probe.join()
        return original()

    patched: Any = codecache
    probe.start()
    patched.pick_vec_isa = pick
    try:
        yield
    finally:
        patched.pick_vec_isa = original
        probe.join()


def compile_program(program: torch.export.ExportedProgram, path: Path) -> None:
    """Compile an exported program into a package with AOTInductor.

    Args:
        program: The program, where it is to run.
        path: The file, .pt2.
    """
    # A precompiled header pays from the second package on, and the first waits for it.
    settings = {"aot_inductor.precompile_headers": False}
    on_gpu = any(tensor.is_cuda for tensor in program.state_dict.values())
    with writers_kept(), libraries_that_load(), vector_units_probed() if on_gpu else nullcontext():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)


# Runs a package on the images in files that are named on the standard input, one a line.
_CHILD = """
import faulthandler, json, sys
faulthandler.enable()
import torch
import torch._inductor.codecache
torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in the network that it is compared with
package = None
for line in sys.stdin:
    order = json.loads(line)
    if package is None:
        # Known from the process that compiled it; trying them out anew takes half a minute.
        torch._inductor.cpu_vec_isa.pick_vec_isa = lambda: order["vector_units"]
        if order["device"] is not None:
            torch.cuda.set_device(order["device"])
        package = torch._inductor.aoti_load_package(order["package"])
    with torch.no_grad():
        logits = package(torch.load(order["images"], weights_only=True, map_location=order["map"]))
    torch.save(logits.cpu(), order["logits"])
    print("done", flush=True)
"""


class PackageProcess:
    """A package that runs in a Python process of its own, without this package: a crash there leaves this one alive.

    The process starts at once, so that it has imported PyTorch when the package is ready.

    Args:
        device: Where the images are.

    Attributes:
        package: The file, to be set before the first call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.package: Path | None = None
        self._stack = ExitStack()

    def __enter__(self) -> PackageProcess:
        with ExitStack() as stack:
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            self._errors = stack.enter_context((self._folder / "errors").open("w+"))
            pipe: Any = subprocess.PIPE
            self._child = subprocess.Popen(
                [sys.executable, "-c", _CHILD], stdin=pipe, stdout=pipe, stderr=self._errors, text=True
            )
            stack.callback(self._stop)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _stop(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # it died with an order unread
                pipe.close()
        try:
            self._child.wait(30)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def __call__(self, images: Tensor) -> Tensor:
        """The package's answers to images.

        Raises:
            RuntimeError: The process that loads and runs the package ended.
        """
        from torch._inductor import cpu_vec_isa

        torch.save(images.cpu(), self._folder / "images")
        order = {
            "package": str(self.package),
            "images": str(self._folder / "images"),
            "logits": str(self._folder / "logits"),
            "device": self.device.index,
            "map": str(self.device),
            "vector_units": str(cpu_vec_isa.pick_vec_isa()),
        }
        child = self._child
        assert child.stdin is not None and child.stdout is not None
        with suppress(BrokenPipeError):  # the answer is missing then
            child.stdin.write(json.dumps(order) + "\n")
            child.stdin.flush()
        while line := child.stdout.readline():
            if line == "done\n":
                found: Tensor = torch.load(self._folder / "logits", weights_only=True)
                return found
        raise RuntimeError(
            f"the package was not written: the process that ran it {_ended(child.wait())}. Write an exported program "
            f"instead, and please report this with what the process said:\n{self._written()}"
        )

    def _written(self) -> str:
        self._errors.flush()
        text = (self._folder / "errors").read_text(errors="replace")
        return text if len(text) <= 6000 else f"{text[:3000]}\n[...]\n{text[-3000:]}"  # PyTorch says the cause first


def _ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
