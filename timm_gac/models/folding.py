"""Time folded into the batch axis and out of it again, and inputs that are not finite.

Activations inside a network are time-folded: ``(T*B, C, H, W)``, row ``t*B + b`` being sample b at step t.
"""

from __future__ import annotations

import torch
from timm.layers import register_notrace_function
from torch import Tensor, nn

from gac_kernels import firing_rate
from gac_kernels.spikes.not_finite import mark_not_finite_

from ..layers.checks import fixed_num_steps


@register_notrace_function
def fold_time(x: Tensor, num_steps: int) -> Tensor:
    """Event frames ``(B, T, C, H, W)`` as ``(T*B, C, H, W)``; images ``(B, C, H, W)`` as they are."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"expected a tensor of images, got {type(x).__name__}: torch.fx and torchvision's feature extractor cannot "
            "trace these networks; take firing rates with timm's features_only=True or forward_intermediates"
        )
    if x.ndim == 4:
        return x
    if x.ndim != 5 or x.shape[1] != num_steps:
        advice = "create the model with num_steps equal to the number of frames"
        if x.ndim == 5 and x.shape[0] == num_steps:
            advice = "swap its first two axes with x.transpose(0, 1)"
        elif x.ndim == 3:
            advice = "give an image its batch axis with x.unsqueeze(0)"
        raise ValueError(
            f"expected images (B, C, H, W) or frames (B, T, C, H, W) with T = num_steps = {num_steps}, got "
            f"{tuple(x.shape)}: {advice}"
        )
    return x.transpose(0, 1).flatten(0, 1)


@register_notrace_function
def unfold_time(stem: Tensor, x: Tensor, num_steps: int) -> Tensor:
    """The stem's output on `fold_time` of x: ``(B, C, H, W)`` for images, ``(T, B, C, H, W)`` for event frames."""
    if x.ndim == 5:
        return stem.unflatten(0, [num_steps, x.shape[0]])
    return stem


class FiringRate(nn.Module):
    """Firing rates, the mean of time-folded spikes over time: ``(T*B, C, H, W)`` -> ``(B, C, H, W)``.

    In a network it is named ``rate``: the last feature map, which Grad-CAM and other tools can watch.

    Args:
        num_steps: Number of time steps T.
    """

    num_steps = fixed_num_steps()

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps

    def forward(self, spikes: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The rates, in the dtype of the spikes or, of integer ones, in ``dtype``."""
        if dtype is not None:
            return firing_rate(spikes, self.num_steps, dtype)
        return torch.ops.gac_kernels.firing_rate(spikes, self.num_steps)

    def extra_repr(self) -> str:
        """The number of steps."""
        return f"num_steps={self.num_steps}"


@register_notrace_function
def not_finite_marked(out: Tensor, x: Tensor, norm: nn.Module) -> Tensor:
    """``out`` with NaN for each sample of the input, or for all, where a value is not finite.

    A NaN ends at the first neuron, since a comparison with NaN is false: without a mark the output would look right.

    Args:
        out: ``(B, ...)``.
        x: ``(B, ...)``, the network's input.
        norm: The stem's norm; in eval mode its running variance counts too.
    """
    variance = stem_variance(norm)
    if torch.is_grad_enabled():
        mark = mark_not_finite_(out.detach().new_zeros(out.shape[0], *[1] * (out.ndim - 1)), x, variance)
        return out + mark
    return mark_not_finite_(out, x, variance)


def stem_variance(norm: nn.Module) -> Tensor | None:
    """The running variance of the stem's norm, where it counts: in eval mode."""
    return None if norm.training else getattr(norm, "running_var", None)
