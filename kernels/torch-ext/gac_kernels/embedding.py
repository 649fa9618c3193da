"""Triton kernels of the operators of inference inside of what a compiler makes: a package that runs without Python.

An operator of this package is one call to a compiler, and the call goes to Python. Within `embedded_kernels` a compiler
that traces a network sees what the operator does on a GPU instead: allocations and launches of Triton kernels
(`torch.library.wrap_triton`), which AOTInductor compiles into its package as machine code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from .common.triton import HAS_TRITON, INTERPRETED, embedding
from .convolution.conv_lif import _conv_lif
from .convolution.spike_conv import _spike_conv
from .encoder.gac import _gated_lif
from .encoder.gac_fire import _gac_fire
from .encoder.pad_frames import _pad_frames
from .encoder.pool_frames import _pool_frames
from .neuron.integer_lif import _integer_lif
from .neuron.lif import _lif
from .norm.norm_lif_op import _norm_lif
from .spikes.firing_rate import _firing_rate

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "lif": _lif,
    "integer_lif": _integer_lif,
    "norm_lif": _norm_lif,
    "gated_lif": _gated_lif,
    "gac_fire": _gac_fire,
    "pad_frames": _pad_frames,
    "pool_frames": _pool_frames,
    "firing_rate": _firing_rate,
    "conv_lif": _conv_lif,
    "spike_conv": _spike_conv,
}
EMBEDDED = frozenset(str(getattr(torch.ops.gac_kernels, name).default) for name in _IMPLEMENTATIONS)  # in graphs


def why_not_embedded(tensor: Tensor) -> str:
    """Why kernels for a network with such weights cannot be put into a graph; empty where they can."""
    if tensor.device.type != "cuda":
        return f"Triton kernels run on GPUs, not on {tensor.device.type}"
    if tensor.dtype == torch.float64:
        return "Triton kernels compute in float32, not in float64"
    if INTERPRETED:
        return "TRITON_INTERPRET is set, so there are no kernels to compile"
    return "" if HAS_TRITON else "Triton is not installed"


@contextmanager
def embedded_kernels() -> Iterator[None]:
    """Show compilers that trace a network within ``with`` the kernels of its operators, for tensors on a GPU.

    For `torch._inductor.aoti_compile_and_package` of a program that `torch.export.export` made before. On Hopper the
    convolutions in one pass are Gluon, which compilers do not take: there cuDNN's convolution and `norm_lif`, or the
    kernel in plain Triton for 8-bit weights, stand in the package.
    """
    library = torch.library.Library("gac_kernels", "FRAGMENT")
    for name, implementation in _IMPLEMENTATIONS.items():
        torch.library.register_torch_dispatch(
            f"gac_kernels::{name}",
            FunctionalTensorMode,
            _rule(implementation),
            lib=library,
        )
    try:
        with embedding():
            yield
    finally:
        library._destroy()


def _rule(implementation: Callable[..., Any]) -> Callable[..., Any]:
    def run(mode: Any, op: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with mode:
            return implementation(*args, **kwargs)

    return run
