"""Launches of one Triton kernel whose arguments but its tensors stay the same.

Triton looks at every argument at every launch. A training step in a plain loop waits for the host, so here a launch
after the first looks only at what can have changed, dtypes of tensors and whether they are aligned: 5 to 7 us on one
core of an Intel Xeon instead of 17 to 30 (Triton 3.6 and 3.8, measured without what the GPU's driver takes). On an H200
ten training steps of three networks had the same bits with it and without, and msresnet34 at 224x224 trained in 0.65 to
0.80 of the time. With TIMM_GAC_DIRECT_LAUNCH=0 in the environment, and on ROCm, where nobody has tried it, Triton
launches everything.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .triton import HAS_TRITON, INTERPRETED, is_embedding, launchable, triton

if HAS_TRITON and not INTERPRETED:
    from triton.compiler import CompiledKernel
    from triton.runtime import driver

DIRECT = os.environ.get("TIMM_GAC_DIRECT_LAUNCH") != "0" and torch.version.hip is None
_prepared: list[Any] = []
_ALIGNED = 16  # bytes: Triton compiles one kernel for addresses that are multiples of it, and one for others


class Launch:
    """A kernel with its grid, numbers and constants.

    Triton launches what it has not compiled for yet, unaligned tensors, and all while a profiler's hooks are there. A
    change of Triton's debug settings is not seen after the first launch.

    Args:
        kernel: What `triton.jit` made. Its parameters are the tensors, then the numbers, then the constants.
        grid: Programs, up to three axes.
        device: Where the tensors will be.
        numbers: Arguments behind the tensors.
        constants: Arguments that are compiled in, and ``num_warps`` and other options of Triton.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        numbers: tuple[int | float, ...],
        **constants: Any,
    ) -> None:
        self._kernel, self._grid, self._device = kernel, grid, device
        self._numbers, self._constants = numbers, constants
        self._programs = (*grid, 1, 1)[:3]
        self._known: dict[tuple[torch.dtype | None, ...], tuple[Any, Any, Any, tuple[Any, ...]]] = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch with these tensors; None where the kernel has its argument as None."""
        if is_embedding():
            launchable(self._kernel)[self._grid](*tensors, *self._numbers, **self._constants)
            return
        dtypes = (*[None if x is None else x.dtype for x in tensors],)
        known = self._known.get(dtypes)
        if known is not None and self._device.index == _current_device() and not _watched(self._kernel):
            addresses = [None if x is None else x.data_ptr() for x in tensors]
            if not any([at and at % _ALIGNED for at in addresses]):
                run, function, metadata, rest = known
                stream = _stream(self._device.index)
                run(*self._programs, stream, function, metadata, None, None, None, *addresses, *rest)
                return
        elsewhere = self._device.type == "cuda" and self._device.index != _current_device()
        with torch.cuda.device(self._device) if elsewhere else nullcontext():
            compiled = self._kernel[self._grid](*tensors, *self._numbers, **self._constants)
        if not DIRECT or INTERPRETED or not isinstance(compiled, CompiledKernel):  # or left out for now
            return
        if not any(x is not None and x.data_ptr() % _ALIGNED for x in tensors):
            constants = [*self._kernel.signature.parameters.values()][len(tensors) + len(self._numbers) :]
            rest = (*self._numbers, *[self._constants.get(one.name, one.default) for one in constants])
            self._known[dtypes] = (compiled.run, compiled.function, compiled.packed_metadata, rest)


def prepared(prepare: Callable[..., Any]) -> Any:
    """Keep the launches that a function prepares for its arguments, which decide about them with launch parameters."""
    kept = functools.lru_cache(maxsize=4096)(prepare)
    _prepared.append(kept)
    return kept


def forget_launches() -> None:
    """Prepare all launches anew, after launch parameters have changed."""
    for kept in _prepared:
        kept.cache_clear()


def _current_device() -> int:
    return torch._C._cuda_getDevice()


def _stream(index: int) -> int:
    return driver.active.get_current_stream(index)


def _watched(kernel: Any) -> bool:
    """Whether a profiler or somebody else wants to see launches as Triton makes them."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return bool(kernel.pre_run_hooks) or any(hook is not None and getattr(hook, "calls", True) for hook in hooks)
