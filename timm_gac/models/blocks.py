"""Residual blocks of spiking ResNets, and the stages made of them.

A block takes and returns membrane and spikes, both time-folded ``(T*B, C, H, W)``. So every neuron follows a batch
norm, and one kernel computes norm, residual and neuron. With packed spikes it takes and returns their bits too: a
convolution then saves only these for its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import checkpoint
from torch import Tensor, nn

from gac_kernels import CIFAR, LIFSpec, pack_spikes
from gac_kernels.eight_bit.norm import Spikes

from ..layers import eight_bit
from ..layers.batch_statistics import call_norm, keep_running_statistics
from ..layers.checks import fixed_num_steps, log_called, may_skip
from ..layers.convolution import Conv2d, SpikeConv2d, convolve
from ..layers.neuron import BatchNormLIF, MembraneBatchNormLIF

Activations = tuple[Tensor, Tensor, Tensor | None]  # membrane, spikes, and the spikes' bits where they are packed
EightBitActivations = tuple[Tensor, Tensor, Spikes | None]  # membrane, the spikes' edge, and spikes of one byte
STAGES = ("layer1", "layer2", "layer3", "layer4")  # names of a network's stages
_NEURON_FORWARDS = (BatchNormLIF.forward, MembraneBatchNormLIF.forward)
_SHORTCUT_FORWARDS = (nn.Sequential.forward,)


class _Block(nn.Module):
    """Base of both blocks: two 3x3 convolutions and, where the shape changes, a 1x1 shortcut.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
        stride: Stride of the first convolution and of the shortcut.
        num_steps: Number of time steps T folded into the first axis.
        spec: Neuron model.
        drop_path: Probability, in training, of dropping the residual branch of a sample at all of its time steps.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        learnable: Learn decay and threshold of the neurons, see `LIF`.
    """

    last_norm: type[BatchNormLIF] = BatchNormLIF
    num_steps = fixed_num_steps()

    def __init__(
        self,
        in_chs: int,
        out_chs: int,
        stride: int = 1,
        num_steps: int = 4,
        spec: LIFSpec = CIFAR,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        learnable: str | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_steps = num_steps
        self.conv1 = SpikeConv2d(in_chs, out_chs, kernel_size=3, stride=stride, padding=1, num_steps=num_steps, **dd)
        self.bn1 = BatchNormLIF(out_chs, spec, num_steps, learnable=learnable, **dd)
        self.conv2 = SpikeConv2d(out_chs, out_chs, kernel_size=3, padding=1, num_steps=num_steps, **dd)
        self.bn2 = self.last_norm(out_chs, spec, num_steps, drop_path=drop_path, learnable=learnable, **dd)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or in_chs != out_chs:
            self.downsample = nn.Sequential(
                Conv2d(in_chs, out_chs, 1, stride=stride, bias=False, **dd), nn.BatchNorm2d(out_chs, **dd)
            )
        self.pack_hidden = self.pack_output = False  # see SpikingResNet.set_spike_packing

    def zero_init_last(self) -> None:
        """Make the residual branch start as zero."""
        nn.init.zeros_(self.bn2.weight)

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x)
        return x

    def _training_pass(self, shortcut: Tensor, spikes: Tensor, bits: Tensor | None) -> Activations:
        """The block with its shortcut's norm as part of the last one, and spikes packed where asked for."""
        grad = torch.is_grad_enabled()  # without it nothing is kept anyway
        hidden_bits = None
        current = convolve(self.conv1, spikes, bits)
        if self.pack_hidden and grad:
            _, hidden, hidden_bits = self._fire(self.bn1, current, None, None, pack=True)
        else:
            hidden = self.bn1(current)
        norm = None
        if self.downsample is not None:
            if may_skip(self.downsample, _SHORTCUT_FORWARDS) and len(self.downsample) == 2:
                shortcut, norm = self.downsample[0](shortcut), self.downsample[1]
            else:
                log_called(self.downsample, _SHORTCUT_FORWARDS)
                shortcut = self.downsample(shortcut)
        current = convolve(self.conv2, hidden, hidden_bits)
        return self._fire(self.bn2, current, shortcut, norm, pack=self.pack_output and grad)

    def _fire(
        self, neuron: nn.Module, x: Tensor, shortcut: Tensor | None, norm: nn.Module | None, pack: bool
    ) -> Activations:
        """Membrane, spikes and, with ``pack``, bits of a neuron, with the shortcut's norm as part of it if possible."""
        if isinstance(neuron, BatchNormLIF) and may_skip(neuron, _NEURON_FORWARDS):
            return neuron.norm_and_fire(
                x,
                shortcut,
                self.num_steps,
                keep_membrane=neuron.returns_pair,
                pack=pack,
                residual_norm=norm,
            )
        log_called(neuron, _NEURON_FORWARDS)
        shortcut = shortcut if norm is None or shortcut is None else call_norm(norm, shortcut)
        out = neuron(x) if shortcut is None else neuron(x, shortcut)
        membrane, spikes = out if isinstance(out, tuple) else (out, out)
        return membrane, spikes, pack_spikes(spikes, self.num_steps) if pack else None

    def _trains(self, x: Tensor) -> bool:
        """Whether `_training_pass` has something to gain; not under fx, for which the norms are leaves."""
        return isinstance(x, Tensor) and ((self.training and self.downsample is not None) or self.pack_hidden)


class MSBlock(_Block):
    """Membrane-shortcut block: ``y = BN2(conv2(LIF(BN1(conv1(LIF(x)))))) + shortcut(x)``.

    It takes (x, LIF(x)) and returns (y, LIF(y)): the neuron that opens a block is evaluated at the end of the one
    before. See `_Block` for the arguments.

    Source: Hu et al., "Advancing Spiking Neural Networks toward Deep Residual Learning" (arXiv 2112.08954).
    """

    last_norm = MembraneBatchNormLIF

    def forward(self, membrane: Tensor, spikes: Tensor, bits: Tensor | None = None) -> Activations:
        """Membrane and spikes, ``(T*B, C', H', W')`` each, and the spikes' bits where they are packed."""
        if self._trains(membrane):
            return self._training_pass(membrane, spikes, bits)
        hidden = self.bn1(self.conv1(spikes))
        membrane, spikes = self.bn2(self.conv2(hidden), self._shortcut(membrane))
        return membrane, spikes, None

    def why_not_in_8_bits(self) -> str:
        """Why `in_8_bits` cannot take this block; empty where it can."""
        return (
            eight_bit.takes_layer(self.conv1, self.bn1)
            or eight_bit.takes_layer(self.conv2, self.bn2)
            or eight_bit.takes_shortcut(self.downsample, self.bn2)
        )

    def in_8_bits(self, membrane: Tensor, edge: Tensor, spikes: Spikes, last: bool) -> EightBitActivations:
        """The block in training with spikes of one byte, of which ``edge`` has the gradient.

        Args:
            membrane: ``(T*B, C, H, W)``.
            edge: Of the spikes, see `conv_norm_fire`.
            spikes: Those of the membrane.
            last: Other layers than blocks follow: the spikes are the edge, and there are no others.
        """
        hidden_edge, _, hidden = eight_bit.layer(self.conv1, self.bn1, edge, spikes)
        assert hidden is not None
        shortcut, norm = membrane, None
        if self.downsample is not None:
            shortcut, norm = self.downsample[0](membrane), self.downsample[1]
        edge, membrane, fired = eight_bit.layer(self.conv2, self.bn2, hidden_edge, hidden, shortcut, norm, last)
        return membrane, edge, fired


class SpikingBlock(_Block):
    """Plain spiking block: ``y = LIF(BN2(conv2(LIF(BN1(conv1(x))))) + shortcut(x))``.

    It has spikes only: the first of its inputs is ignored, and y is returned in both places. See `_Block` for the
    arguments.

    Source: Zheng et al., "Going Deeper With Directly-Trained Larger Spiking Neural Networks" (arXiv 2011.05280).
    """

    def forward(self, membrane: Tensor, spikes: Tensor, bits: Tensor | None = None) -> Activations:
        """The spikes twice, ``(T*B, C', H', W')`` each, and their bits where they are packed."""
        if self._trains(spikes):
            _, spikes, bits = self._training_pass(spikes, spikes, bits)
            return spikes, spikes, bits
        hidden = self.bn1(self.conv1(spikes))
        spikes = self.bn2(self.conv2(hidden), self._shortcut(spikes))
        return spikes, spikes, None


class Stage(nn.Sequential):
    """Blocks in sequence on membrane, spikes and bits; an empty stage returns its input.

    With ``grad_checkpointing`` set, the backward pass recomputes each block instead of keeping its activations. That
    leaves running statistics alone, so each step updates them once.
    """

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(  # type: ignore[override]
        self, membrane: Tensor, spikes: Tensor, bits: Tensor | None = None
    ) -> Activations:
        """Membrane, spikes and bits after the last block."""
        for block in self:
            if self.grad_checkpointing:
                run = block if torch.compiler.is_compiling() else _Recomputed(block)
                membrane, spikes, bits = checkpoint(run, membrane, spikes, bits)
            else:
                membrane, spikes, bits = block(membrane, spikes, bits)
        return membrane, spikes, bits


class _Recomputed:
    """A block whose calls after the first, which are recomputations, leave running statistics as they are."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.ran = block, False

    def __call__(self, *inputs: Tensor | None) -> Any:
        if self.ran:
            with keep_running_statistics(self.block):
                return self.block(*inputs)
        self.ran = True
        return self.block(*inputs)
