"""Training in 8 bits as its definition says, in plain PyTorch, and the check of a network's kernels against it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gac_kernels import int8_conv2d_reference, int8_weight
from gac_kernels.eight_bit import convolution
from gac_kernels.eight_bit.norm import to_spikes
from gac_kernels.eight_bit.weights import round_weight
from gac_kernels.reference import int8_conv2d_gradients_reference

from ..layers import eight_bit
from ..layers.convolution import SpikeConv2d
from ..models.blocks import STAGES, MSBlock
from ..models.network import SpikingResNet
from ..runtime.dtypes import AUTOCAST, autocast
from .baselines import LoopNeuron, PlainBlock, TimeMajorNet
from .check import EIGHT_BIT_TOLERANCES, call_part, check_logits, check_parts, inputs_of_parts
from .networks import Unavailable


class _Convolve(torch.autograd.Function):
    """`int8_conv2d_reference` with the gradients of `int8_conv2d_gradients_reference`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        return int8_conv2d_reference(x.to(dtype), weight, stride).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        at_x, at_weight = int8_conv2d_gradients_reference(grads[0], x, weight, ctx.stride)
        return at_x.to(x.dtype), at_weight.to(weight.dtype), None, None


class DefinedConv2d(nn.Conv2d):
    """A 3x3 convolution of spikes in 8 bits; its output is rounded to ``rounds_to`` and given in the input's dtype."""

    rounds_to = torch.float32

    def forward(self, x: Tensor) -> Tensor:
        """``(T*B, C, H, W)`` -> ``(T*B, C', H', W')``."""
        return _Convolve.apply(x, self.weight, self.stride[0], self.rounds_to)


def with_definition(reference: TimeMajorNet, dtype: torch.dtype) -> TimeMajorNet:
    """A copy of a plain loop whose blocks' 3x3 convolutions are `DefinedConv2d` that round to ``dtype``."""
    reference = copy.deepcopy(reference)
    for block in (module for module in reference.modules() if isinstance(module, PlainBlock)):
        convs: tuple[Any, Any] = (block.conv1, block.conv2)
        for conv in convs:
            conv.__class__ = DefinedConv2d
            conv.rounds_to = dtype
    return reference


def with_rounded_weights(model: SpikingResNet) -> SpikingResNet:
    """A copy whose weights are those that training in 8 bits computes with, integers times scale."""
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for conv in (module for module in rounded.modules() if isinstance(module, SpikeConv2d)):
            integers, scale = int8_weight(conv.weight)
            conv.weight.copy_(integers * scale[:, None, None, None])
    return rounded


def blocks_of(model: SpikingResNet) -> dict[str, Any]:
    """The blocks by name."""
    return {f"{stage}.{name}": block for stage in STAGES for name, block in getattr(model, stage).named_children()}


def require_kernels(model: SpikingResNet, device: torch.device, precision: str) -> None:
    """Raise `Unavailable` with the reason where the kernels that train in 8 bits cannot take a network in training."""
    reason = eight_bit.why_not(device, AUTOCAST[precision] or torch.float32, model.num_steps)
    for block in blocks_of(model).values():
        reason = reason or (block.why_not_in_8_bits() if isinstance(block, MSBlock) else "its blocks are no MSBlocks")
    if reason:
        raise Unavailable(f"no kernels that train in 8 bits: {reason}")


def _in_8_bits(part: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """A block as a network in 8 bits calls it, alone; another part as a module."""
    if not isinstance(part, MSBlock):
        return part(*inputs)
    membrane, spikes = (x.contiguous(memory_format=torch.channels_last) for x in inputs)
    return part.in_8_bits(membrane, spikes, to_spikes(spikes.detach(), part.num_steps), True)[:2]


def layers_run(logits: Tensor) -> int:
    """How many layers of `conv_norm_fire` stand in the graph of a forward pass."""
    seen, waiting, count = set(), [logits.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += type(node).__name__ == "_LayerBackward"
        waiting += [after for after, _ in node.next_functions]
    return count


@torch.no_grad()
def _check_integers(network: SpikingResNet, defined: TimeMajorNet, images: Tensor, dtype: torch.dtype) -> str:
    """Compare every convolution's bits with the definition, from the spikes that the plain loop gives it."""
    defined = copy.deepcopy(defined).train()
    blocks = blocks_of(network)
    for name, inputs in inputs_of_parts(defined, images):
        if name not in blocks:
            continue
        plain: Any = defined.get_submodule(name)
        hidden = plain.neuron1(plain.bn1(plain.conv1(inputs[1])), plain.num_steps)
        for label, spikes in (("conv1", inputs[1]), ("conv2", hidden)):
            conv = getattr(blocks[name], label)
            stride, steps = conv.stride[0], conv.num_steps
            small = to_spikes(spikes.to(dtype).contiguous(memory_format=torch.channels_last), steps).plain
            found, _ = convolution.forward(small, round_weight(conv.weight), stride, dtype, steps)
            differ = int((found != int8_conv2d_reference(spikes.to(dtype), conv.weight, stride)).sum())
            if differ:
                return f"{name}.{label}: {differ} values are not those of the definition"
    return ""


def check_training(
    network: Any,
    *,
    model: SpikingResNet,
    reference: TimeMajorNet,
    images: Tensor,
    precision: str,
) -> str:
    """Compare a network that trains in 8 bits with the definition; return "" if they agree, else the reason.

    In float64 and evaluation its logits are those of the plain loop with integers times scales as weights. In training
    each convolution has the definition's bits, from the spikes of a block of the plain loop; encoder and blocks agree
    within `check.EIGHT_BIT_TOLERANCES`, gradients too, with the kernels of one byte and without; and a forward pass
    runs these kernels in every block.

    Args:
        network: The network in 8 bits, channels-last.
        model: The same in float32.
        reference: The plain loop with the model's weights.
        images: Images ``(B, C, H, W)``.
        precision: Precision of the network.

    Raises:
        Unavailable: The kernels cannot take the network; the message is the reason.
    """
    device, dtype = images.device, AUTOCAST[precision] or torch.float32
    network = copy.deepcopy(network).train()
    require_kernels(network, device, precision)
    rounded = TimeMajorNet(with_rounded_weights(model), LoopNeuron(model.spec)).to(device)
    failure = check_logits(network, rounded.to(memory_format=torch.channels_last), images)
    defined = with_definition(reference, dtype)
    failure = failure or _check_integers(network, defined, images, dtype)
    tolerances = EIGHT_BIT_TOLERANCES[precision]
    for call in (_in_8_bits, call_part):  # with kernels of one byte, and as torch.compile takes the network
        failure = failure or check_parts(
            network, defined, images, precision, train=True, call=call, block_tolerances=tolerances
        )
    if not failure:
        with autocast(device, precision):
            run = layers_run(network(images))
        expected = 2 * len(blocks_of(network))
        failure = "" if run == expected else f"{run} of {expected} layers ran in kernels of 8 bits"
    return failure
