"""A spiking ResNet that computes with integers: spikes and the weights of its 3x3 convolutions are int8.

Stem, encoder, 1x1 shortcuts and classifier stay floating-point. Between encoder and classifier float32 rounds no sum
but those of 1x1 shortcuts, and these neither where that is asked for (`exact_conv`). ``network.double()`` is the same
quantised network evaluated in float64, which everything else is compared with.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gac_kernels import LIFSpec, integer_lif, spike_conv, spike_conv_reference

from ..layers.checks import fixed_num_steps, log_called, may_skip
from ..layers.neuron_layer import at_least_float32, spikes_of
from ..models.network import SpikingResNet
from .exact_conv import ExactConv2d

DECAY_STEPS = 256  # learned decays are multiples of its reciprocal

# Exponents of two. The error of rounding weights to 8 bits, 1 % of them in the trained CIFAR-100 networks, grows by at
# most 3 % in a layer with scales on the finest grid, by 28 % on the coarsest. Finer, residuals of 128 would not fit.
_FINEST, _COARSEST = -15, -12


def current_grid(spec: LIFSpec, num_steps: int) -> float:
    """The power of two g whose multiples are all currents of a quantised network, so that float32 adds them exactly.

    After T steps a membrane is a multiple of ``g * decay**(T-1)`` if decay is a power of two, and exact in float32
    below 2**24 times that. With g from 2**-15 to 2**-12 this is at least 64 up to T=7 for decay 1/2 and T=4 for 1/4.
    With more steps or another decay membranes that were not reset for long can round as float32 does.
    """
    mantissa, exponent = math.frexp(spec.decay)
    lost = (num_steps - 1) * (1 - exponent) if mantissa == 0.5 else 0
    return 2.0 ** min(max(lost - 18, _FINEST), _COARSEST)


class _RoundedNeuron(nn.Module):
    """Base of layers whose neuron may have learned its decay and threshold, which are kept as integers.

    Attributes:
        spec: What the neuron computes.
        neuron: Decay in units of 1/256 and threshold in units of the grid, (2,) int64, which the spec follows; None for
            a spec that was given.
    """

    spec: LIFSpec
    num_steps: Any
    neuron: Tensor | None

    def _take_neuron(self, neuron: Tensor | None) -> None:
        self.register_buffer("neuron", neuron)
        self._start = self.spec  # of the network, from which the grid follows
        self._set_spec()

    def _set_spec(self) -> None:
        if self.neuron is not None:
            decay, threshold = self.neuron.tolist()
            grid = current_grid(self._start, self.num_steps)
            self.spec = dataclasses.replace(self._start, decay=decay / DECAY_STEPS, threshold=threshold * grid)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._set_spec()


class IntegerLIF(_RoundedNeuron):
    """Multi-step LIF of real values, spikes as int8: ``(T*B, C, H, W)`` -> ``(T*B, C, H, W)``.

    Args:
        spec: What the neuron computes.
        num_steps: Number of time steps T folded into the first axis.
        neuron: Learned decay and threshold, rounded, see `_RoundedNeuron`.
    """

    returns_pair, spikes_dtype = False, torch.int8
    num_steps = fixed_num_steps()

    def __init__(self, spec: LIFSpec, num_steps: int, neuron: Tensor | None = None) -> None:
        super().__init__()
        self.spec, self.num_steps = spec, num_steps
        self._take_neuron(neuron)

    def forward(self, x: Tensor) -> Tensor:
        """The spikes."""
        return integer_lif(x, self.num_steps, self.spec)

    def input_current(self, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
        """See `NeuronLayer`."""
        return at_least_float32(inputs[0]).unflatten(0, (num_steps, -1))

    def output_spikes(self, output: Tensor) -> Tensor:
        """See `NeuronLayer`."""
        return output

    def extra_repr(self) -> str:
        """The spec's fields and the number of steps."""
        return f"{self.spec}, num_steps={self.num_steps}"


class RealConv(ExactConv2d):
    """Floating-point 3x3 convolution with bias, then LIF: the first of a plain network, whose encoder's output is real.

    ``(T*B, C, H, W)`` -> spikes ``(T*B, C', H', W')`` int8.

    Args:
        conv: The convolution.
        bias: (C',).
        step: See `ExactConv2d`.
        exact: As there.
        spec: What the neuron computes.
        num_steps: Number of time steps T folded into the first axis.
        neuron: Learned decay and threshold, rounded, see `_RoundedNeuron`.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        bias: Tensor,
        step: float,
        exact: bool,
        spec: LIFSpec,
        num_steps: int,
        neuron: Tensor | None = None,
    ) -> None:
        super().__init__(conv, step, bias, exact)
        self.lif = IntegerLIF(spec, num_steps, neuron)

    def forward(self, x: Tensor) -> Tensor:
        """The spikes."""
        return self.lif(super().forward(x))


class SpikeConv(_RoundedNeuron):
    """3x3 convolution of int8 spikes with int8 weights, scale and bias per channel, residual and LIF, in one pass.

    Scale and bias are float32 also in a network of a 16-bit dtype; in a float64 network all is computed in float64.
    They are multiples of `current_grid`, to which residuals are rounded, so that both give the same spikes.

    Shape:
        - spikes: ``(T*B, C, H, W)`` int8, residual ``(T*B, C', H', W')``
        - output: spikes ``(T*B, C', H', W')`` int8, with ``keep_membrane`` the pair (membrane, spikes)

    Attributes:
        weight: ``(C', 9, C)`` int8, the nine taps in rows.
        scale: ``(C',)``.
        bias: ``(C',)``.

    Args:
        in_channels: C.
        out_channels: C'.
        stride: 1 or 2.
        spec: What the neuron computes.
        num_steps: Number of time steps T folded into the first axis.
        keep_membrane: Return the neuron's input current too.
        grid: What a floating-point residual is rounded to; 0 where it consists of multiples of the grid already.
        device: Device of weight, scale and bias.
        neuron: Learned decay and threshold, rounded, see `_RoundedNeuron`.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    # The rest of the geometry, under nn.Conv2d's names.
    kernel_size, padding, dilation, groups = (3, 3), (1, 1), (1, 1), 1

    spikes_dtype = torch.int8
    num_steps = fixed_num_steps()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        spec: LIFSpec,
        num_steps: int,
        keep_membrane: bool,
        grid: float = 0.0,
        device: torch.device | None = None,
        neuron: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.spec, self.num_steps, self.keep_membrane = stride, spec, num_steps, keep_membrane
        self.grid = grid
        self.in_channels, self.out_channels = in_channels, out_channels
        # Three axes: a memory format, which has meaning for four, leaves it as the kernel reads it.
        self.register_buffer("weight", torch.zeros(out_channels, 9, in_channels, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.ones(out_channels, dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.zeros(out_channels, dtype=torch.float32, device=device))
        self._take_neuron(neuron)

    @property
    def kernel(self) -> Tensor:
        """The weight as a convolution has it, ``(C', C, 3, 3)``, a view."""
        return self.weight.unflatten(1, (3, 3)).permute(0, 3, 1, 2)

    def forward(
        self, spikes: Tensor, residual: Tensor | None = None, shortcut: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Spikes, or the pair (membrane, spikes); ``shortcut`` is the weight of a 1x1 convolution of the residual."""
        return self._run(spikes, residual, self.num_steps, self.keep_membrane, shortcut)

    @property
    def returns_pair(self) -> bool:
        """Whether `forward` returns the pair (membrane, spikes)."""
        return self.keep_membrane

    @torch.no_grad()
    def input_current(self, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
        """See `NeuronLayer`; exact, where a membrane of 16 bits is rounded."""
        # Residual and the weight of its 1x1 shortcut: the current has the residual's dtype.
        real = [x if x is None or not x.is_floating_point() else at_least_float32(x) for x in inputs[1:]]
        residual, shortcut = (*real, None, None)[:2]
        current: Tensor = self._run(inputs[0], residual, num_steps, True, shortcut)[0]
        return current.unflatten(0, (num_steps, -1))

    def output_spikes(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """See `NeuronLayer`."""
        return spikes_of(output)

    def _run(
        self,
        spikes: Tensor,
        residual: Tensor | None,
        num_steps: int,
        keep_membrane: bool,
        shortcut: Tensor | None = None,
    ) -> Any:
        run: Callable[..., Any] = spike_conv if self.scale.dtype == torch.float32 else spike_conv_reference
        return run(
            spikes,
            self.kernel,
            self.scale,
            self.bias,
            num_steps,
            self.spec,
            stride=self.stride,
            residual=residual,
            return_membrane=keep_membrane,
            grid=self.grid,
            shortcut=shortcut,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SpikeConv:
        before = {"scale": self.scale, "bias": self.bias}
        super()._apply(fn, recurse)
        for name, value in before.items():
            changed = getattr(self, name)
            if changed.dtype.itemsize < value.dtype.itemsize:
                setattr(self, name, value.to(changed.device, torch.float32))
        return self

    def extra_repr(self) -> str:
        """Sizes, neuron and what is returned."""
        return (
            f"{self.in_channels}, {self.out_channels}, stride={self.stride}, num_steps={self.num_steps}, {self.spec}, "
            f"keep_membrane={self.keep_membrane}, grid={self.grid}"
        )


_SPIKE_CONV_FORWARDS = (SpikeConv.forward,)


class IntegerBlock(nn.Module):
    """A residual block on membrane and int8 spikes; the float block's equations.

    Args:
        conv1: First convolution with its neuron.
        conv2: Second convolution with residual and neuron.
        downsample: 1x1 shortcut, `ExactConv2d`; None for the identity.
        membrane_shortcut: The shortcut carries the membrane (`MSBlock`), else the spikes (`SpikingBlock`).
    """

    def __init__(
        self, conv1: nn.Module, conv2: SpikeConv, downsample: ExactConv2d | None, membrane_shortcut: bool
    ) -> None:
        super().__init__()
        self.conv1, self.conv2, self.downsample = conv1, conv2, downsample
        self.membrane_shortcut = membrane_shortcut

    def forward(
        self, membrane: Tensor, spikes: Tensor, bits: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Membrane and spikes, or the spikes twice where no membrane is needed; bits are for training alone."""
        hidden = self.conv1(spikes)
        shortcut = membrane if self.membrane_shortcut else spikes
        weight = None
        if self.downsample is not None:
            shortcut = shortcut if shortcut.is_floating_point() else self._real(shortcut)
            # A hook on the second convolution sees the shortcut itself.
            skipped = may_skip(self.conv2, _SPIKE_CONV_FORWARDS)
            if not skipped:
                log_called(self.conv2, _SPIKE_CONV_FORWARDS)
            operands = self.downsample.operands(shortcut) if skipped else None
            shortcut, weight = operands if operands is not None else (self.downsample(shortcut), None)
        out = self.conv2(hidden, shortcut) if weight is None else self.conv2(hidden, shortcut, weight)
        return (*out, None) if isinstance(out, tuple) else (out, out, None)

    def _real(self, spikes: Tensor) -> Tensor:
        assert self.downsample is not None
        return spikes.to(self.downsample.weight.dtype)


class IntegerSpikingResNet(SpikingResNet):
    """What `timm_gac.quantize` makes of a `SpikingResNet`; for inference only.

    Attributes:
        quantization: Scheme and options of the quantisation, as in its folder's config.json.
    """

    inference_only = True
    quantization: dict[str, Any]
    num_classes: int
    pretrained_cfg: dict[str, Any]
    _first_neurons = {**SpikingResNet._first_neurons, IntegerLIF: torch.int8}

    @classmethod
    def like(cls, model: SpikingResNet, quantization: dict[str, Any]) -> IntegerSpikingResNet:
        """A network of this class with a copy of the model's modules and attributes."""
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        # Pruning and weight norm keep what they computed last, which deepcopy refuses where it has a gradient.
        computed = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
        memo = {id(value): value.detach().clone() for value in computed}
        network.__dict__.update(copy.deepcopy(model.__dict__, memo))
        network.quantization = quantization
        return network

    def check_grid(self) -> None:
        """Raise a ValueError unless scales and biases are multiples of the grid that spec and T stand for.

        Those of a network that was trained in 8 bits lie on none. Sums of real numbers have to be exact too.
        """
        if self.int8_convs:
            return
        for name, module in self.named_modules():
            if isinstance(module, ExactConv2d):
                module.check_exact(name)
        grid = current_grid(self.spec, self.num_steps)
        for name, layer in self.named_modules():
            if isinstance(layer, SpikeConv) and torch.cat((layer.scale, layer.bias)).remainder(grid).any():
                raise ValueError(
                    f"expected {name} with scales and biases that are multiples of {grid} (T={self.num_steps}), got "
                    "others: quantise anew with this T"
                )

    def _stem(self, x: Tensor) -> Tensor:
        stem = super()._stem(x)
        if isinstance(stem, Tensor) and stem.requires_grad:  # under fx it is none
            raise ValueError(
                "expected a quantised network to run without gradients (with torch.no_grad()), got an input that "
                "requires one, or a stem that does: take gradients through the float network"
            )
        return stem

    def _rate_dtype(self) -> torch.dtype:
        return self.conv1.weight.dtype

    def _logits(self, spikes: Tensor) -> Tensor:
        return self.forward_head(spikes.to(self.conv1.weight.dtype))
