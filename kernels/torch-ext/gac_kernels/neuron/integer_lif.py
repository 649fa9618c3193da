"""Multi-step LIF whose spikes are int8, as `spike_conv` takes them: the way from real values into integers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_current, check_spec, check_steps
from ..common.fake import register_fake
from ..common.tiles import dense
from ..derivatives import refuse_forward_mode, register_no_derivatives
from ..spec import CIFAR, LIFSpec
from . import eager
from .lif import launch_forward

_lib = torch.library.Library("gac_kernels", "FRAGMENT")
_lib.define("integer_lif(Tensor x, int num_steps, float threshold, float decay, bool soft_reset) -> Tensor")


def _check(x: Tensor, num_steps: int) -> None:
    check_current("x", x, min_dims=4, max_dims=4)
    check_steps("x", x, num_steps)


@torch.library.impl(_lib, "integer_lif", "CompositeExplicitAutograd")
def _integer_lif(x, num_steps, threshold, decay, soft_reset):
    _check(x, num_steps)
    refuse_forward_mode("integer_lif")
    x = dense(x.detach())
    spikes = torch.empty_like(x, dtype=torch.int8)
    if x.numel():
        nothing = x.new_empty(0, dtype=torch.float32)
        run = launch_forward if resolve_backend(x.device, x.dtype) == "triton" else eager.lif_forward
        steps, fired = x.unflatten(0, (num_steps, -1)), spikes.unflatten(0, (num_steps, -1))
        run(steps, None, fired, nothing, nothing, threshold, decay, 1.0, soft_reset)
    return spikes


register_no_derivatives(_lib, "integer_lif")


@register_fake("gac_kernels::integer_lif", lib=_lib)
def _integer_lif_fake(x, num_steps, threshold, decay, soft_reset):
    return torch.empty_like(dense(x), dtype=torch.int8)


def integer_lif(x: Tensor, num_steps: int, spec: LIFSpec = CIFAR) -> Tensor:
    """`lif` of a time-folded sequence with its spikes as int8. Inference only: no gradient.

    Args:
        x: (T*B, C, H, W), row ``t * B + b`` being sample b at step t; float32, float16, bfloat16 or float64.
        num_steps: T.
        spec: What the neuron computes.

    Returns:
        Spikes (T*B, C, H, W) int8, 0 or 1, in the memory format of x.

    Raises:
        ValueError: x has another rank or dtype, or T does not divide its first axis.
    """
    check_spec(spec)
    _check(x, num_steps)
    return torch.ops.gac_kernels.integer_lif(x, num_steps, *spec.forward_arguments)
