"""How a network trains beside its recipe: spikes kept as bits, 3x3 convolutions in 8 bits, noise on currents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gac_kernels.checks import check_finite, check_flags
from gac_kernels.common.tiles import is_channels_last
from gac_kernels.eight_bit.norm import Spikes, to_spikes

from ..layers import eight_bit
from ..layers.convolution import SpikeConv2d, is_plain_3x3
from ..layers.encoder import GatedAttentionCoding
from ..layers.lif import LIF
from ..layers.neuron import BatchNormLIF
from ..layers.neuron_layer import NeuronLayer
from .blocks import STAGES, MSBlock, SpikingBlock
from .timm_network import TimmNetwork


class TrainingOptions(TimmNetwork):
    """Base of `SpikingResNet`, with what is switched on and off for training."""

    spec: Any
    inference_only = False  # set where batch norms are folded away
    int8_convs = False  # see set_int8_convs

    def set_spike_packing(self, enable: bool = True) -> None:
        """Keep spikes of blocks as bits for the backward pass of the convolutions that read them.

        Less memory in training for the same gradients, to the bit, and some time to unpack them; of no effect where
        gradients are disabled. In networks with plain blocks the identity shortcuts still keep spikes as they are.

        Raises:
            ValueError: Spikes of the network's neuron are not 0 or 1, or ``enable`` is not True or False.
        """
        check_flags(enable=enable)
        if enable:
            self.spec.refuse_spikes("packed bits", "ternary", "levels")
        blocks = [module for module in self.modules() if isinstance(module, (MSBlock, SpikingBlock))]
        for block in blocks:
            block.pack_hidden, block.pack_output = enable, enable and block is not blocks[-1]

    def set_int8_convs(self, enable: bool = True) -> None:
        """Train the 3x3 convolutions of spikes in 8 bits: int8 weights forward, float8 gradients backward.

        `gac_kernels.int8_conv2d` says what is computed, in evaluation too: what is trained is what `quantize` returns.
        Parameters and state_dict stay as they are, the weights that learn. In a network with plain blocks the first
        convolution, whose input is real, is left alone.

        Raises:
            ValueError: The network is folded or quantised, has another convolution in the place of one of these, or
                another neuron than ``lif``, for which there is no 8-bit inference; or ``enable`` is not True or False.
        """
        check_flags(enable=enable)
        if enable:
            self.spec.refuse_others("8-bit convolutions")
        if self.inference_only:
            raise ValueError("expected a network that trains, got one that is folded or quantised: create it anew")
        blocks = [module for module in self.modules() if isinstance(module, (MSBlock, SpikingBlock))]
        convs: list[Any] = [conv for block in blocks for conv in (block.conv1, block.conv2)]
        convs = convs[1:] if blocks and isinstance(blocks[0], SpikingBlock) else convs
        for conv in convs:
            if not isinstance(conv, SpikeConv2d) or not is_plain_3x3(conv) or conv.bias is not None:
                kind = " ".join(str(conv).split())[:80]
                raise ValueError(f"expected 3x3 SpikeConv2d without bias in all blocks, got {kind}: put it back")
        for conv in convs:
            conv.int8 = enable
        self.int8_convs = enable

    def set_current_noise(self, share: float) -> None:
        """Add Gaussian noise to the input current of all neurons, in training only; 0 for none.

        The unit is the threshold: rounding flips a spike where it moves a membrane across the threshold, and what a
        batch norm puts out is measured in thresholds too. The noise is independent in every element and time step.
        A batch norm's statistics, the encoder's gate and the membrane that a shortcut carries on are of values without
        it, as in evaluation. Packed spikes work; 8-bit convolutions then run without their kernels.

        Args:
            share: Standard deviation of the noise as a share of a neuron's threshold, of a learned one as it is now.

        Raises:
            ValueError: ``share`` is no finite number >= 0; or, where it is not 0, the network is folded or quantised,
                or has other neurons than this package's.
        """
        check_finite("share", share, 0.0)
        layers: list[Any] = [module for module in self.modules() if isinstance(module, (LIF, GatedAttentionCoding))]
        if share and self.inference_only:
            raise ValueError("expected a network that trains, got one that is folded or quantised: create it anew")
        for module in self.modules() if share else ():
            neuron = module.lif if isinstance(module, BatchNormLIF) else module
            other = isinstance(neuron, NeuronLayer) or neuron is not module
            if other and not isinstance(neuron, (LIF, GatedAttentionCoding)):
                name = type(neuron).__name__
                raise ValueError(
                    f"expected LIF in the place of all neurons for noise on currents, got {name}: put it back"
                )
        for layer in layers:
            layer.current_noise = float(share)

    def _takes_8_bits(self, membrane: Tensor, spikes: Tensor) -> bool:
        """Whether the blocks can train with spikes and gradients of one byte; what stands in the way is logged once."""
        if not (self.training and torch.is_grad_enabled() and isinstance(spikes, Tensor)):
            return False  # also under fx
        if torch.compiler.is_compiling() or spikes.numel() < 2 * spikes.shape[1]:
            return False
        device, dtype = spikes.device.type, spikes.dtype
        computing = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        reason = eight_bit.why_not(spikes.device, dtype, self.num_steps)
        if not reason and not (dtype == membrane.dtype == computing):
            reason = f"the encoder returns {membrane.dtype} and {dtype}, and convolutions compute in {computing}"
        if not reason and not all(is_channels_last(x) for x in (membrane, spikes)):
            reason = "the network is not in channels-last memory"
        for block in self._blocks() if not reason else ():
            if not isinstance(block, MSBlock) or type(block).forward is not MSBlock.forward:
                reason = "blocks are no MSBlocks"
            else:
                reason = reason or block.why_not_in_8_bits()
        if not reason and any(getattr(self, name).grad_checkpointing for name in STAGES):
            reason = "blocks are recomputed in the backward pass"
        if reason:
            eight_bit.say(reason)
        return not reason

    def _blocks(self) -> list[Any]:
        return [block for name in STAGES for block in getattr(self, name)]

    def _run_in_8_bits(self, membrane: Tensor, spikes: Tensor) -> Tensor:
        """What `_run_stages` computes, where `_takes_8_bits`."""
        blocks, edge = self._blocks(), spikes
        small: Spikes | None = to_spikes(spikes.detach(), self.num_steps)
        for block in blocks:
            assert small is not None
            membrane, edge, small = block.in_8_bits(membrane, edge, small, block is blocks[-1])
        return edge
