"""Launches of one Triton kernel whose arguments but its tensors stay the same.

Triton looks at every argument at every launch. A training step in a plain loop waits for the host, so here a launch
after the first looks only at what can have changed, dtypes of tensors and whether they are aligned: 5 to 7 us on one
core of an Intel Xeon instead of 17 to 30 (Triton 3.6 and 3.8, measured without what the GPU's driver takes). On an H200
ten training steps of three networks had the same bits with it and without, and msresnet34 at 224x224 trained in 0.65 to
0.80 of the time; in 8 bits, whose launches have tensor descriptors, gac_msresnet18_cifar in 0.69, with the same bits.
With TIMM_GAC_DIRECT_LAUNCH=0 in the environment, and on ROCm, where nobody has tried it, Triton launches everything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .triton import HAS_TRITON, INTERPRETED, is_embedding, launchable, triton

if HAS_TRITON and not INTERPRETED:
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

DIRECT = os.environ.get("TIMM_GAC_DIRECT_LAUNCH") != "0" and torch.version.hip is None
_prepared: list[Any] = []
_ALIGNED = 16  # bytes: Triton compiles one kernel for addresses that are multiples of it, and one for others


class Descriptor(NamedTuple):
    """How TMA copies read a tensor, whose address is all that changes.

    Attributes:
        kind: Triton's or Gluon's class of tensor descriptors.
        shape: Elements of each axis.
        strides: In elements, the last one 1.
        block: Elements of a copy.
        layout: Of a copy in shared memory, where the class takes one.
        dtype: What the tensor's bytes are read as, where that is not its own.
    """

    kind: Any
    shape: list[int]
    strides: list[int]
    block: list[int]
    layout: Any = None
    dtype: torch.dtype | None = None

    def of(self, tensor: Tensor) -> Any:
        """The descriptor of a tensor, which Triton checks."""
        base = tensor if self.dtype is None else tensor.view(self.dtype)
        layout = () if self.layout is None else (self.layout,)
        return self.kind(base, self.shape, self.strides, self.block, *layout)


class Launch:
    """A kernel with its grid, numbers and constants.

    Triton launches what it has not compiled for yet, unaligned tensors, and all while a profiler's hooks are there. A
    change of Triton's debug settings is not seen after the first launch.

    A descriptor is encoded for the GPU by Triton's own code at each launch, with the new address. What is passed by is
    the check of sizes, which have not changed, and their text, by which Triton finds what it has compiled.

    Args:
        kernel: What `triton.jit` made. Its parameters are the tensors, then the numbers, then the constants.
        grid: Programs, up to three axes.
        device: Where the tensors will be.
        numbers: Arguments behind the tensors.
        descriptors: Of the first tensors, where the kernel reads them by such.
        constants: Arguments that are compiled in, and ``num_warps`` and other options of Triton.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        numbers: tuple[int | float, ...],
        descriptors: tuple[Descriptor, ...] = (),
        /,
        **constants: Any,
    ) -> None:
        self._kernel, self._grid, self._device = kernel, grid, device
        self._numbers, self._descriptors, self._constants = numbers, descriptors, constants
        self._programs = (*grid, 1, 1)[:3]
        self._known: dict[tuple[torch.dtype | None, ...], tuple[Any, Any, Any, tuple[Any, ...]]] = {}
        self._fields: list[tuple[type, dict[str, Any]]] = []  # of descriptors that Triton has taken

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch with these tensors; None where the kernel has its argument as None."""
        if is_embedding():
            launchable(self._kernel)[self._grid](*self._arguments(tensors), *self._numbers, **self._constants)
            return
        dtypes = (*[None if x is None else x.dtype for x in tensors],)
        known = self._known.get(dtypes)
        if known is not None and self._device.index == _current_device() and not _watched(self._kernel):
            addresses: list[Any] = [None if x is None else x.data_ptr() for x in tensors]
            if not any([at and at % _ALIGNED for at in addresses]):
                for i, (kind, fields) in enumerate(self._fields):
                    addresses[i] = _again(kind, fields, tensors[i])
                run, function, metadata, rest = known
                stream = _stream(self._device.index)
                run(*self._programs, stream, function, metadata, None, None, None, *addresses, *rest)
                return
        elsewhere = self._device.type == "cuda" and self._device.index != _current_device()
        with torch.cuda.device(self._device) if elsewhere else nullcontext():
            arguments = self._arguments(tensors)
            compiled = self._kernel[self._grid](*arguments, *self._numbers, **self._constants)
        if not DIRECT or INTERPRETED or not isinstance(compiled, CompiledKernel):  # or left out for now
            return
        described = arguments[: len(self._descriptors)]
        if not all(_can_be_made_again(one) for one in described):  # of a Triton that nobody has tried
            return
        if not any(x is not None and x.data_ptr() % _ALIGNED for x in tensors):
            self._fields = [(type(one), {**vars(one), "base": None}) for one in described]
            constants = [*self._kernel.signature.parameters.values()][len(tensors) + len(self._numbers) :]
            rest = (*self._numbers, *[self._constants.get(one.name, one.default) for one in constants])
            self._known[dtypes] = (compiled.run, compiled.function, compiled.packed_metadata, rest)

    def _arguments(self, tensors: tuple[Tensor | None, ...]) -> list[Any]:
        """The tensors, the first ones as their descriptors."""
        arguments: list[Any] = list(tensors)
        for i, one in enumerate(self._descriptors):
            arguments[i] = one.of(arguments[i])
        return arguments


def _can_be_made_again(descriptor: Any) -> bool:
    """Whether a descriptor is nothing but its fields, of which ``base`` is the tensor."""
    return isinstance(getattr(descriptor, "__dict__", {}).get("base"), Tensor) and not hasattr(descriptor, "__slots__")


def _again(kind: type, fields: dict[str, Any], tensor: Tensor | None) -> Any:
    """A descriptor with these fields, of another tensor; it is not checked, as nothing but the address is new.

    Its dtype may be another one: the launcher takes the address, and how elements are read from what was compiled.
    """
    made: Any = object.__new__(kind)
    made.__dict__ = {**fields, "base": tensor}
    return made


def prepared(prepare: Callable[..., Any]) -> Any:
    """Keep the launches that a function prepares for its arguments, which decide about them with launch parameters."""
    kept = functools.lru_cache(maxsize=4096)(prepare)
    _prepared.append(kept)
    return kept


def forget_launches() -> None:
    """Prepare all launches anew, after launch parameters have changed."""
    for kept in _prepared:
        kept.cache_clear()


@contextmanager
def by_triton() -> Iterator[None]:
    """Triton launches everything within ``with``, as with TIMM_GAC_DIRECT_LAUNCH=0; not for several threads."""
    global DIRECT
    before, DIRECT = DIRECT, False
    forget_launches()
    try:
        yield
    finally:
        DIRECT = before
        forget_launches()


def _current_device() -> int:
    return torch._C._cuda_getDevice()


def _stream(index: int) -> int:
    return driver.active.get_current_stream(index)


def _watched(kernel: Any) -> bool:
    """Whether a profiler or somebody else wants to see launches as Triton makes them."""
    if kernel.pre_run_hooks:
        return True
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # None, a function, or a chain of them
    return bool(enter is not None and getattr(enter, "calls", True)) or bool(
        leave is not None and getattr(leave, "calls", True)
    )
