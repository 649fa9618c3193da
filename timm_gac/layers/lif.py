"""The neuron alone, as a module."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from gac_kernels import CIFAR, LIFSpec, lif
from gac_kernels.checks import check_spec, check_tensor

from . import conversion
from .checks import check_num_steps, fixed_num_steps
from .learned import LearnedValues, learned_values, make_learned
from .neuron_layer import at_least_float32
from .noise import adds_noise, draw_noise


@register_notrace_module
class LIF(nn.Module):
    """Multi-step leaky integrate-and-fire neuron without memory between calls; its decay and threshold may be learned.

    Shape:
        - ``num_steps=None``: ``(T, ...)`` -> spikes ``(T, ...)``
        - ``num_steps=T``: time-folded ``(T*B, ...)`` -> spikes ``(T*B, ...)``, row ``t*B + b`` being sample b at step t

    Args:
        spec: What the neuron computes.
        num_steps: Number of time steps T folded into the first axis, or None where time is an axis of its own.
        learnable: Learn decay and threshold, beginning with the spec's: one of each (``layer``), or one of each for
            every channel, axis 2 of ``(T, B, C, ...)`` (``channel``); None for the spec's numbers. See `LearnedValues`.
        channels: Number of channels, for ``learnable="channel"``.
        device: Device of the parameters.
        dtype: float64 for parameters in that; else they are float32.

    Raises:
        ValueError: ``spec`` is no `LIFSpec`, or has a decay of 0 or 1 that is to be learned; ``num_steps`` is no
            integer >= 1; ``learnable`` is another; or the first axis of an input is no multiple of ``num_steps``.
    """

    returns_pair = False
    spikes_dtype = None  # that of its input
    num_steps = fixed_num_steps()
    current_noise = 0.0  # see SpikingResNet.set_current_noise

    learned: LearnedValues | None

    def __init__(
        self,
        spec: LIFSpec = CIFAR,
        num_steps: int | None = None,
        learnable: str | None = None,
        channels: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **constants: Any,
    ) -> None:
        super().__init__()
        if constants or isinstance(spec, int | float):
            got = ", ".join(constants) or repr(spec)
            raise ValueError(
                f"expected spec as a LIFSpec and num_steps, got {got}: a neuron's constants are fields of the spec, "
                "LIF(LIFSpec(decay=0.5, threshold=1.0)); decay is 1 - 1/tau of other packages"
            )
        check_spec(spec)
        self.spec = spec
        self.num_steps = None if num_steps is None else check_num_steps(num_steps)
        self.learned = make_learned(learnable, spec, channels, device=device, dtype=dtype)

    @classmethod
    def from_spikingjelly(cls, node: nn.Module) -> LIF:
        """A neuron with the spikes and gradients of SpikingJelly's ``IFNode``, ``LIFNode`` or ``ParametricLIFNode``.

        It takes their place in a network: ``(T, B, ...)`` in and out, and nothing to reset. A ``ParametricLIFNode``
        keeps learning its decay, where that was not frozen.

        Raises:
            ValueError: Something of it does not map; the message names it.
        """
        return cls._converted(conversion.from_spikingjelly(node))

    @classmethod
    def from_snntorch(cls, cell: nn.Module) -> LIF:
        """A neuron with the spikes and gradients of snnTorch's ``Leaky`` over all steps, ``(T, B, ...)``.

        What ``learn_beta`` and ``learn_threshold`` learn goes on learning.

        Raises:
            ValueError: Something of it does not map; the message names it.
        """
        return cls._converted(conversion.from_snntorch(cell))

    def to_spikingjelly(self) -> Any:
        """SpikingJelly's ``LIFNode`` (``IFNode`` for a decay of 1) in multi-step mode, with the same spikes.

        Learned numbers become constants.

        Raises:
            ImportError: SpikingJelly is not installed.
            ValueError: Time is folded, decay or threshold differ by channel, or the decay is 0.
        """
        spec = self.spec if self.learned is None else self.learned.fixed(self.spec)
        if self.num_steps is not None:
            raise ValueError(
                f"expected num_steps=None, got {self.num_steps}: SpikingJelly takes (T, B, ...), with time as an axis"
            )
        if spec is None:
            raise ValueError("expected one decay and threshold a layer, got one a channel: SpikingJelly's have one")
        return conversion.to_spikingjelly(spec)

    @classmethod
    def _converted(cls, neuron: conversion.Converted) -> LIF:
        sources = [value for value in (neuron.decay, neuron.threshold) if value is not None]
        if not sources:
            return cls(neuron.spec)
        layer = cls(neuron.spec, learnable="layer", device=sources[0].device, dtype=sources[0].dtype)
        assert layer.learned is not None
        for own, source in ((layer.learned.decay_logit, neuron.decay), (layer.learned.threshold_raw, neuron.threshold)):
            own.requires_grad_(source is not None and source.requires_grad)  # what was frozen stays frozen
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of the input current, in the input's dtype."""
        num_steps = self.num_steps
        if num_steps is not None:
            check_tensor("x", x)
            if x.ndim == 0 or x.shape[0] % num_steps != 0:
                size = x.shape[0] if x.ndim else "a number without axes"
                raise ValueError(
                    f"expected a first axis of num_steps * batch with num_steps={num_steps}, got {size}: "
                    "fold time with x.flatten(0, 1)"
                )
            x = x.unflatten(0, [num_steps, x.shape[0] // num_steps])
        learned: Any = learned_values(self)
        current = x
        if adds_noise(self):
            current = at_least_float32(x)  # 16 bits would round a small noise away
            current = current + draw_noise(self, current, axis=2)
        spikes = lif(current, self.spec, **learned)
        assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
        spikes = spikes if current is x else spikes.to(x.dtype)
        return spikes if num_steps is None else spikes.flatten(0, 1)

    def input_current(self, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
        """See `NeuronLayer`."""
        x = at_least_float32(inputs[0])
        return x if self.num_steps is None else x.unflatten(0, (num_steps, -1))

    def output_spikes(self, output: Tensor) -> Tensor:
        """See `NeuronLayer`."""
        return output.flatten(0, 1) if self.num_steps is None else output

    def extra_repr(self) -> str:
        """The spec's fields, and the number of steps where time is folded."""
        steps = "" if self.num_steps is None else f", num_steps={self.num_steps}"
        return f"{self.spec}{steps}"
