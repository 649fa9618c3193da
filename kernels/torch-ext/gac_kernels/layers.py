"""Layers for ``kernels.kernelize``: stateless modules whose forward stands in for that of another module.

They hand the numbers of a spec to the operators, never the spec itself: it may be that of another copy of this package.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["LIF"]


class LIF(nn.Module):
    """The multi-step leaky integrate-and-fire neuron, in the place of ``timm_gac.LIF``.

    The module that it stands in for has ``num_steps`` (T folded into the first axis, or None where time is an axis of
    its own), ``spec`` with ``op_arguments``, as `LIFSpec` has them, and maybe ``learned``, whose ``values()`` are
    decays and thresholds (2, N).
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of the input current, in the shape and dtype of ``x``."""
        num_steps: int | None = self.num_steps  # type: ignore[assignment]
        if num_steps is not None:
            if x.shape[0] % num_steps != 0:
                raise ValueError(
                    f"expected a first axis of num_steps * batch with num_steps={num_steps}, got {x.shape[0]}: "
                    "fold time with x.flatten(0, 1)"
                )
            x = x.unflatten(0, [num_steps, x.shape[0] // num_steps])
        spec: Any = self.spec
        keep_mask = torch.is_grad_enabled() and x.requires_grad
        learned: Any = getattr(self, "learned", None)  # decay and threshold as parameters
        values = None if learned is None else learned.values()
        spikes = torch.ops.gac_kernels.lif(x, None, *spec.op_arguments, keep_mask, False, values)[0]
        return spikes if num_steps is None else spikes.flatten(0, 1)
