"""Post-training quantisation to 8-bit weights: with spikes as input the convolutions are exact in integers."""

from __future__ import annotations

import logging
import math
import re
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from gac_kernels import int8_weight

from ..layers.convolution import SpikeConv2d, is_plain_3x3
from ..layers.encoder import GatedAttentionCoding
from ..layers.learned import LearnedValues
from ..layers.lif import LIF
from ..models.blocks import STAGES, MSBlock, SpikingBlock
from ..models.network import SpikingResNet
from ..runtime.finite import check_finite
from .batch_norm import check_foldable, fold_batch_norm, norm_scale_and_shift, plain_weights
from .exact_conv import ExactConv2d, input_step
from .fold import FoldedStem
from .integer import DECAY_STEPS, IntegerBlock, IntegerLIF, IntegerSpikingResNet, RealConv, SpikeConv, current_grid

_logger = logging.getLogger(__name__)

# Its grid follows from spec and T (`current_grid`); another grid would be another scheme.
# Sums of 1x1 shortcuts and of a plain network's first convolution are float32's.
SCHEME = "int8-weights-per-channel-on-grid"
EXACT_SCHEME = "int8-weights-per-channel-exact-sums"
# The integers of a network that was trained with them. Scales are the trained ones times the batch norm's, on no grid:
# rounding them to it would change each by up to 1 %.
TRAINED_SCHEME = "int8-weights-per-channel-as-trained"
SCHEMES = (SCHEME, EXACT_SCHEME, TRAINED_SCHEME)
CLIPS = ("max", "mse")
_LEVELS = 127
# Fractions of a channel's largest weight at which "mse" looks for the least squared error.
_FRACTIONS = tuple(1.0 - 0.02 * i for i in range(16))
# Deviations of a current, as its batch norms have it, for which the input of a shortcut has room; the power of two
# behind it leaves up to twice as much. Of 210 million currents of the trained CIFAR-100 networks none was beyond: the
# largest was 31.74 where there is room for 32.
_DEVIATIONS = 8.0


@torch.no_grad()
def quantize(model: nn.Module, clip: str = "mse", exact_sums: bool = False) -> IntegerSpikingResNet:
    """A copy of a trained network whose 3x3 convolutions of spikes have int8 weights, for inference.

    A network that was trained in 8 bits (`SpikingResNet.set_int8_convs`) keeps its integers: nothing is rounded but
    scales and biases, to float32. For others all of the following holds.

    Batch norms are folded; each output channel gets one scale, symmetric around 0; the weights are rounded so that
    their errors cancel within each window and each output channel (`quantize_weight`), which needs no data.
    Spikes are integers, so the convolutions are exact. Scales, biases and the currents from encoder and 1x1 shortcuts
    are rounded to multiples of a power of two, 2**-15 at T=4 and decay 1/2. Float32 then computes the neurons exactly
    too, with the spikes of float64; `timm_gac.inference.integer.current_grid` says up to which T.
    Stem, encoder, 1x1 shortcuts and classifier stay as they are, and so does the first convolution of a plain network,
    whose input is real-valued. With ``exact_sums`` these shortcuts and that convolution stay floating-point too, but
    round no sum: their inputs are multiples of a power of two, at most 1,024 times it, and their weights have so few
    bits (`timm_gac.inference.exact_conv`). How large an input gets is read off the batch norms. So from the encoder's
    output on, float32 in any order of its sums and float64 give the same currents and spikes.
    Of neurons that learned one decay and threshold a layer, decays are rounded to multiples of 1/256 and thresholds to
    the grid; float32 then rounds membranes, so that its spikes can differ from those of float64, which a line in the
    log says. The encoder keeps what it learned.
    ``.to(torch.bfloat16)`` and autocast change those alone; ``.double()`` evaluates the quantised network in float64.
    The convolutions run in Triton on GPUs and as oneDNN's int8 convolutions on x86 CPUs; elsewhere, which is logged, as
    exact float32 ones.

    Args:
        model: A network of this package with running statistics; it is left alone.
        clip: ``max`` scales a channel so that its largest weight is not clipped, ``mse`` so that the squared error of
            rounding and clipping is least.
        exact_sums: Let every sum behind the encoder be the same in any order, for other programs that shall compute the
            same integers. Of networks trained in 8 bits it changes nothing.

    Returns:
        The integer network, in eval mode, on the model's device and with its floating dtype.

    Raises:
        ValueError: The model is no spiking network of this package, is folded or quantised already, has a batch norm
            without running statistics, a stride above 2, another neuron than ``lif``, neurons of several specs or with
            one decay and threshold a channel, or other modules in the place of its blocks, convolutions, norms or
            neurons; its weights are not finite; or ``clip`` or ``exact_sums`` is unknown.

    Examples:
        >>> import timm, timm_gac
        >>> network = timm_gac.quantize(timm.create_model("gac_msresnet18_cifar"))
    """
    if not isinstance(exact_sums, bool):
        raise ValueError(f"expected exact_sums as True or False, got {exact_sums!r}: give one of them")
    scheme = EXACT_SCHEME if exact_sums else SCHEME
    return quantize_as(TRAINED_SCHEME if getattr(model, "int8_convs", False) else scheme, model, clip)


@torch.no_grad()
def quantize_as(scheme: str, model: nn.Module, clip: str = "mse") -> IntegerSpikingResNet:
    """`quantize` by a scheme out of `SCHEMES`, `TRAINED_SCHEME` for networks that were trained in 8 bits alone."""
    if clip not in CLIPS:
        raise ValueError(f"expected clip out of {CLIPS}, got {clip!r}: choose one of these")
    check_foldable(model)
    assert isinstance(model, SpikingResNet)
    model.spec.refuse_others("8-bit inference")
    _check_parts(model)
    check_finite(model, "to quantise")
    if (scheme == TRAINED_SCHEME) != model.int8_convs:
        trained = "trained" if model.int8_convs else "not trained"
        raise ValueError(f"expected another scheme for a network {trained} in 8 bits, got {scheme}: quantise anew")
    quantization = {"scheme": scheme} if model.int8_convs else {"scheme": scheme, "clip": clip}
    dtype, device = model.conv1.weight.dtype, model.conv1.weight.device
    network = IntegerSpikingResNet.like(model, quantization)
    network.eval()
    network.set_current_noise(0.0)
    plain_weights(network)
    network.double()  # so that weights are rounded once, to int8
    parts: Any = network
    currents = _Currents.behind_encoder(network)
    parts.conv1 = FoldedStem(parts.conv1, fold_batch_norm(parts.conv1, parts.bn1))
    parts.bn1 = nn.Identity()
    if isinstance(parts.lif, LIF):
        parts.lif = IntegerLIF(network.spec, network.num_steps, _rounded(parts.lif, network))
    stages = [getattr(network, name) for name in STAGES]
    blocks = [block for stage in stages for block in stage]
    for stage in stages:
        for index, block in enumerate(stage):
            stage[index] = _integer_block(
                block,
                network,
                clip,
                currents,
                first=block is blocks[0],
                last=block is blocks[-1],
            )
            currents = currents.behind(block)
    _report_learned(model, network)
    return network.to(device, dtype).requires_grad_(False).eval()


def _rounded(neuron: LIF, network: SpikingResNet) -> Tensor | None:
    """Learned decay in units of 1/256 and threshold in units of the grid, (2,) int64; None where nothing is learned."""
    if neuron.learned is None:
        return None
    units = torch.tensor([[1.0 / DECAY_STEPS], [current_grid(network.spec, network.num_steps)]], dtype=torch.float64)
    decay, threshold = (neuron.learned.values().double().cpu() / units).round().clamp(min=1.0)[:, 0].long().tolist()
    return torch.tensor([min(decay, DECAY_STEPS - 1), threshold])


def _report_learned(model: SpikingResNet, network: IntegerSpikingResNet) -> None:
    """Say in the log what rounding changed in learned neurons, and that exactness is lost."""
    learned = [module.learned for module in model.modules() if isinstance(module, LIF) and module.learned is not None]
    rounded = [module.spec for module in network.modules() if isinstance(module, SpikeConv | IntegerLIF)]
    if not learned:
        return
    moved = max(abs(value.decay.item() - spec.decay) for value, spec in zip(learned, rounded, strict=True))
    exact = all(math.frexp(spec.decay)[0] == 0.5 for spec in rounded)  # powers of two
    if exact and moved == 0.0:
        return
    _logger.warning(
        "Rounded the learned decays of %d layers to multiples of 1/%d, by at most %.4f, and thresholds to the grid%s",
        len(learned),
        DECAY_STEPS,
        moved,
        "" if exact else ": float32 rounds membranes with these decays, so spikes can differ from those of float64",
    )


def _check_parts(model: SpikingResNet) -> None:
    """Refuse neurons and convolutions that `SpikeConv` does not compute."""
    for name, module in model.named_modules():
        if isinstance(module, MSBlock | SpikingBlock):
            neurons = {f"{name}.bn1.lif": module.bn1.lif, f"{name}.bn2.lif": module.bn2.lif}
            _check_geometry(f"{name}.conv1", module.conv1)
            _check_geometry(f"{name}.conv2", module.conv2)
        else:
            neurons = {} if module is not model or isinstance(model.lif, nn.Identity) else {"lif": model.lif}
        for neuron_name, neuron in neurons.items():
            learned = getattr(neuron, "learned", None)
            if learned is not None and learned.decay_logit.numel() != 1:
                raise ValueError(
                    f"expected one learned decay and threshold a layer, got one a channel in {neuron_name}: integer "
                    "kernels have one, train with neuron='plif' or fold with fuse_for_inference"
                )
            if type(neuron) is not LIF or neuron.spec != model.spec:
                raise ValueError(
                    f"expected neurons LIF of the network's {model.spec}, got {type(neuron).__name__} of "
                    f"{getattr(neuron, 'spec', None)} as {neuron_name}: it cannot be quantised"
                )


def _check_geometry(name: str, conv: nn.Conv2d) -> None:
    if not is_plain_3x3(conv):
        raise ValueError(
            f"expected a 3x3 convolution with padding 1 and stride 1 or 2 as {name}, got {conv}: it cannot be quantised"
        )


class _Currents(NamedTuple):
    """Mean and variance of a membrane shortcut's currents, as batch norms have them; (C,) float64 each."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, norm: Any) -> _Currents:
        """Behind one norm."""
        ones = torch.ones_like(norm.running_mean)
        weight, bias = (ones if norm.weight is None else norm.weight), (0 * ones if norm.bias is None else norm.bias)
        return cls(bias, weight.square())

    @classmethod
    def behind_encoder(cls, network: Any) -> _Currents:
        """Of the encoder's output: gates, below 1, or the stem's current at every step."""
        currents = cls.of(network.bn1)
        if not isinstance(network.encoder, GatedAttentionCoding):
            return currents
        return cls(torch.zeros_like(currents.mean), torch.full_like(currents.mean, _DEVIATIONS**-2))

    def behind(self, block: MSBlock | SpikingBlock) -> _Currents:
        """Of a block's output, as if residual and branch were independent."""
        residual = self if block.downsample is None else self.of(block.downsample[1])
        branch = self.of(block.bn2)
        return _Currents(residual.mean + branch.mean, residual.variance + branch.variance)

    def step(self) -> float:
        """What these currents are rounded to for a convolution, see `ExactConv2d`."""
        limit = float((self.mean.abs() + _DEVIATIONS * self.variance.sqrt()).max())
        return input_step(max(limit, 2.0**-6))


def _integer_block(
    block: MSBlock | SpikingBlock,
    network: IntegerSpikingResNet,
    clip: str,
    currents: _Currents,
    first: bool,
    last: bool,
) -> IntegerBlock:
    membrane = isinstance(block, MSBlock)
    scheme = network.quantization["scheme"]
    exact, step = scheme == EXACT_SCHEME, currents.step() if membrane or first else 0.0
    conv1: nn.Module
    if first and not membrane:
        shift = fold_batch_norm(block.conv1, block.bn1)
        conv1 = RealConv(
            block.conv1,
            shift,
            step,
            exact,
            network.spec,
            network.num_steps,
            _rounded(block.bn1.lif, network),
        )
    else:
        conv1 = _spike_conv(block.conv1, block.bn1, 0.0, network, clip, keep_membrane=False)
    added: Tensor | float = 0.0
    downsample: ExactConv2d | None = None
    if block.downsample is not None:
        shortcut = block.downsample[0]
        assert isinstance(shortcut, nn.Conv2d)
        added = fold_batch_norm(shortcut, block.downsample[1])
        downsample = ExactConv2d(shortcut, step, exact=exact)
    conv2 = _spike_conv(block.conv2, block.bn2, added, network, clip, keep_membrane=membrane and not last)
    # Without a shortcut's convolution the residual consists of spikes, or of the currents of the block before.
    if scheme != TRAINED_SCHEME and (first or downsample is not None):
        conv2.grid = current_grid(network.spec, network.num_steps)
    return IntegerBlock(conv1, conv2, downsample, membrane)


def _spike_conv(
    conv: SpikeConv2d,
    norm: Any,
    added: Tensor | float,
    network: IntegerSpikingResNet,
    clip: str,
    keep_membrane: bool,
) -> SpikeConv:
    """The integer layer of a convolution and the norm that follows; ``added`` is the shift of the shortcut's norm."""
    layer = SpikeConv(
        conv.in_channels,
        conv.out_channels,
        stride=conv.stride[0],
        spec=network.spec,
        num_steps=network.num_steps,
        keep_membrane=keep_membrane,
        device=conv.weight.device,
        neuron=_rounded(norm.lif, network),
    )
    if network.quantization["scheme"] == TRAINED_SCHEME:
        weight, scale = int8_weight(conv.weight)
        factor, bias = norm_scale_and_shift(conv, norm)
        scale, bias = scale * factor, bias + added
    else:
        grid = current_grid(network.spec, network.num_steps)
        bias = fold_batch_norm(conv, norm) + added
        weight, scale = quantize_weight(conv.weight, clip, grid)
        bias = (bias / grid).round_() * grid
    layer.weight.copy_(weight.flatten(2).transpose(1, 2))
    layer.scale.copy_(scale)
    layer.bias.copy_(bias)
    return layer


def quantize_weight(weight: Tensor, clip: str, grid: float) -> tuple[Tensor, Tensor]:
    """Symmetric 8-bit rounding per output channel, whose errors cancel.

    Error-balanced rounding: flip the fewest integers, nearest to a tie first, until the rounding errors of each 3x3
    window, then of each output channel, sum to at most about half a unit. Spikes are 0 or 1 and come in patches, so
    these sums act as a shift of the threshold; rounding to nearest leaves them to chance.

    Args:
        weight: (C', C, 3, 3) float64.
        clip: ``max`` or ``mse``, see `quantize`.
        grid: A power of two, of which scales are multiples.

    Returns:
        Integers from -127 to 127, int8 in the shape of ``weight``, and the scale (C',) in float32; their product is
        the rounded weight.
    """
    peak = weight.abs().amax((1, 2, 3))
    best = torch.full_like(peak, float("inf"))
    scale = torch.ones_like(peak, dtype=torch.float32)
    for fraction in _FRACTIONS if clip == "mse" else (1.0,):
        tried = torch.where(peak > 0, (peak * (fraction / _LEVELS) / grid).ceil() * grid, 1.0).float()
        error = (_round(weight, tried) * tried.double()[:, None, None, None] - weight).square().sum((1, 2, 3))
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, tried, scale)
    exact, rounded = weight / scale.double()[:, None, None, None], _round(weight, scale)
    for first in (2, 1):  # each window, then each output channel
        rounded = _balance(exact.flatten(first), rounded.flatten(first)).view_as(weight)
    return rounded.to(torch.int8), scale


def _balance(exact: Tensor, rounded: Tensor) -> Tensor:
    """Move some of the integers to the other side of ``exact``, so that errors cancel along the last axis.

    Weights that are 0 stay 0.
    """
    error = exact - rounded
    total = error.sum(-1, keepdim=True)
    direction = total.sign()
    free = (exact != 0) & ((rounded + direction).abs() <= _LEVELS)
    rank = torch.where(free, error * direction, -torch.inf).sort(stable=True, descending=True).indices.argsort(-1)
    return rounded + direction * (free & (rank < total.abs().round()))


def _round(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale.double()[:, None, None, None]).round_().clamp_(-_LEVELS, _LEVELS)


def dequantize(network: IntegerSpikingResNet) -> SpikingResNet:
    """A float network with the rounded weights of a quantised one, for comparisons.

    Its batch norms add the biases and do nothing else. It rounds no residuals, to the grid or for a shortcut.
    """
    args = network.changed_args() | {"int8_convs": False}
    model: Any = timm.create_model(network.pretrained_cfg["architecture"], **args)
    state: dict[str, Any] = {}
    stored = network.state_dict()
    for name, module in model.named_modules():
        if "running_var" in module._buffers:
            state |= {f"{name}.{key}": torch.zeros_like(value) for key, value in module.state_dict().items()}
            state[f"{name}.weight"] += 1.0
            state[f"{name}.running_var"] += 1.0 - float(module.eps)
    for name, value in stored.items():
        layer, _, field = name.rpartition(".")
        scale = stored.get(f"{layer}.scale")
        if re.search(r"(^|\.)conv[12]$", layer) and field == "bias":
            state[re.sub(r"conv([12])$", r"bn\1.bias", layer)] = value
        elif layer.endswith(".downsample") and field == "weight":
            state[f"{layer}.0.{field}"] = value
        elif field == "weight" and scale is not None:
            state[name] = value.unflatten(1, (3, 3)).permute(0, 3, 1, 2) * scale[:, None, None, None]
        elif field not in ("scale", "neuron", "log2_step"):
            state[name] = value
    model.load_state_dict(state | _learned_state(network))
    float_network: SpikingResNet = model.to(network.conv1.weight.device).train(network.training)
    return float_network


def _learned_state(network: IntegerSpikingResNet) -> dict[str, Tensor]:
    """The rounded decays and thresholds of a network whose neurons learned, as the float network names them."""
    state: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, SpikeConv | IntegerLIF) and module.neuron is not None:
            layer = re.sub(r"conv([12])(\.lif)?$", r"bn\1.lif", name)
            learned = LearnedValues(module.spec, 1)  # which starts at these values
            state |= {f"{layer}.learned.{key}": value for key, value in learned.state_dict().items()}
    return state
