"""Batch norm folded away for inference: its scale into the convolution before it, its shift into the neuron."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import LIFSpec

from ..layers.checks import fixed_num_steps, log_called, may_skip
from ..layers.convolution import is_plain_3x3, shortcut_operands
from ..layers.learned import LearnedValues
from ..layers.lif import LIF
from ..layers.neuron import BatchNormLIF
from ..layers.neuron_layer import add_residual, at_least_float32, spikes_of
from ..models.blocks import MSBlock, SpikingBlock, Stage
from ..runtime.finite import check_finite
from .batch_norm import check_foldable, fold_batch_norm, plain_weights

# cuDNN pads the channels of 16-bit operands to a multiple of this.
_CHANNELS = 8
# With fewer outputs the extra launches can cost more than a pass that adds a bias: on an H100 3 us per million outputs.
_FEW_OUTPUTS = 2**22


def shift_in_neuron(x: Tensor) -> bool:
    """Whether the neuron adds a folded norm's shift, not the convolution.

    On a CPU a convolution's bias costs nothing. On a GPU it is a pass of its own over the convolution's output, while
    the neuron's kernel adds the shift at no cost. Decided at every call, so a model may be folded before it is moved.
    """
    return x.is_cuda


def bias_in_channel(x: Tensor, conv: nn.Conv2d) -> bool:
    """Whether to fold the stem's bias into an extra constant-1 input channel, which saves a pass over the output.

    It does on a GPU in 16 bits, where cuDNN pads the channels anyway. Under torch.compile and torch.export the bias is
    an ordinary one, which they fuse themselves.
    """
    if not (isinstance(x, Tensor) and x.is_cuda) or torch.compiler.is_compiling():  # under fx it is no tensor
        return False
    outputs = x.numel() // conv.in_channels * conv.out_channels // (conv.stride[0] * conv.stride[1])
    return conv.in_channels % _CHANNELS != 0 and _dtype_on_gpu(conv).itemsize == 2 and outputs >= _FEW_OUTPUTS


class _ShiftedConv2d(nn.Conv2d):
    """A convolution with another's weight and geometry, and a folded norm's shift as its bias.

    Args:
        conv: The convolution to replace, without bias; its weight is taken over.
        shift: (C',).
    """

    def __init__(self, conv: nn.Conv2d, shift: Tensor) -> None:
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        geometry: dict[str, Any] = {name: getattr(conv, name) for name in names}
        meta = torch.device("meta")  # the weight comes from elsewhere
        super().__init__(conv.in_channels, conv.out_channels, **geometry, bias=False, device=meta)
        self.weight = conv.weight
        self.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=False)
        self.train(conv.training)


class FoldedConv2d(_ShiftedConv2d):
    """A convolution that adds a folded norm's shift as its bias, unless the neuron behind it does.

    Attributes:
        in_one_op: Whether `gac_kernels.conv_lif` can compute it together with a neuron.
    """

    def __init__(self, conv: nn.Conv2d, shift: Tensor) -> None:
        super().__init__(conv, shift)
        self.in_one_op = is_plain_3x3(self)

    def forward(self, x: Tensor, bits: Tensor | None = None) -> Tensor:
        """The convolution of x; ``bits``, which serve the backward pass alone, are ignored."""
        return self._conv_forward(x, self.weight, None if shift_in_neuron(x) else self.bias)


class FoldedStem(_ShiftedConv2d):
    """A network's first convolution, with a folded norm's shift as its bias or in an extra channel."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of images x with its bias."""
        if self._sees_every_centre() and bias_in_channel(x, self):
            return self._with_ones(x)
        return self._conv_forward(x, self.weight, self.bias)

    def _sees_every_centre(self) -> bool:
        """Whether each window's centre lies inside the image, where the extra channel is 1, not in the padding."""
        centres = tuple(step * (size // 2) for size, step in zip(self.kernel_size, self.dilation, strict=True))
        odd = all(size % 2 == 1 for size in self.kernel_size)
        return odd and self.padding == centres and self.padding_mode == "zeros" and self.groups == 1

    def _with_ones(self, x: Tensor) -> Tensor:
        """The convolution of x and extra channels of ones; the first one's weight is the bias at the centre, else 0."""
        assert self.bias is not None
        added = (0, 0, 0, 0, 0, _CHANNELS - self.in_channels % _CHANNELS)
        weight = F.pad(self.weight, added)
        weight[:, self.in_channels, self.kernel_size[0] // 2, self.kernel_size[1] // 2] = self.bias
        return self._conv_forward(F.pad(x, added, value=1.0), weight, None)


class FoldedLIF(nn.Module):
    """A `BatchNormLIF` whose scale is folded into the convolution before it: shift, residual and neuron in one pass.

    Shape:
        - ``x``, ``residual`` and spikes: ``(T*B, C, H, W)``

    Args:
        norm: The module to replace, with ``num_steps``.
        shift: (C,).
        keep_membrane: Return the neuron's input current too, for the next membrane shortcut.
    """

    shift: Tensor
    spikes_dtype = None  # that of its input
    num_steps = fixed_num_steps()

    def __init__(self, norm: BatchNormLIF, shift: Tensor, keep_membrane: bool) -> None:
        super().__init__()
        self.lif, self.num_steps = norm.lif, norm.num_steps
        self.returns_pair, self.keep_membrane = norm.returns_pair, keep_membrane
        self.register_buffer("shift", shift.clone())

    def _apply(self, fn: Any, recurse: bool = True) -> FoldedLIF:
        """As for any module, but the shift keeps at least float32: the kernel reads it once, and adds in it."""
        before = self.shift
        super()._apply(fn, recurse)
        if self.shift.dtype.itemsize < 4:
            self.shift = before.to(self.shift.device)
        return self

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Spikes; where a membrane shortcut follows the block, the pair (membrane, spikes)."""
        in_kernel = shift_in_neuron(x)
        if in_kernel and not may_skip(self.lif, _LIF_FORWARDS):
            log_called(self.lif, _LIF_FORWARDS)
            x, in_kernel = x + self.shift.to(x.dtype)[:, None, None], False
        if in_kernel:
            if residual is not None:
                residual = residual.to(x.dtype)
            learned = self.learned
            values = () if learned is None else (*[None] * 4, 0.0, False, learned.values(x.shape[1]))
            spikes, current, _ = torch.ops.gac_kernels.norm_lif(
                x,
                residual,
                None,  # weight
                self.shift,
                None,  # no mean, variance and count: there is no norm, the shift alone is added
                None,
                None,
                0.0,
                self.num_steps,
                *self.lif.spec.op_arguments,
                False,
                self.keep_membrane,
                "",
                *values,
            )
        else:
            current = x if residual is None else x + residual
            spikes = self.lif(current.unflatten(0, (self.num_steps, -1))).flatten(0, 1)
        return self.returned(current, spikes)

    def returned(self, current: Tensor, spikes: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """What `forward` returns of the neuron's input current and spikes."""
        return (current if self.keep_membrane else spikes, spikes) if self.returns_pair else spikes

    @property
    def spec(self) -> LIFSpec:
        """What its neurons compute."""
        return self.lif.spec

    @property
    def learned(self) -> LearnedValues | None:
        """Decays and thresholds of its channels, where they are learned; those of a whole layer are in its spec."""
        return getattr(self.lif, "learned", None)

    @torch.no_grad()
    def input_current(self, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
        """See `NeuronLayer`."""
        x = at_least_float32(inputs[0])
        if shift_in_neuron(x):
            x = x + self.shift.to(x.dtype)[:, None, None]
        return add_residual(x, inputs).unflatten(0, (num_steps, -1))

    def output_spikes(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """See `NeuronLayer`."""
        return spikes_of(output)


class FoldedBlock(nn.Module):
    """A residual block without norms; on a GPU each convolution and its neuron are one op, `gac_kernels.conv_lif`.

    Shape:
        - membrane and spikes ``(T*B, C, H, W)``, in and out; bits, of which there are none, are ignored

    Args:
        block: The block to replace; its submodules are taken over.
    """

    def __init__(self, block: MSBlock | SpikingBlock) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = block.conv1, block.bn1, block.conv2, block.bn2
        self.downsample = block.downsample

    def forward(
        self, membrane: Tensor, spikes: Tensor, bits: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Membrane and spikes, or the spikes twice where no membrane is needed; no bits."""
        hidden = _convolve_and_fire(self.conv1, self.bn1, spikes)
        out = _convolve_and_fire(self.conv2, self.bn2, hidden, self.downsample, membrane)
        return (*out, None) if isinstance(out, tuple) else (out, out, None)


_LIF_FORWARDS = (LIF.forward,)
_CONV_FORWARDS = (FoldedConv2d.forward,)
_NEURON_FORWARDS = (FoldedLIF.forward,)
_SHORTCUT_FORWARDS = (nn.Sequential.forward,)


def _convolve_and_fire(
    conv: Any, neuron: Any, x: Tensor, downsample: Any = None, residual: Tensor | None = None
) -> Any:
    """A folded convolution and its neuron: on a GPU as one op, where nothing watches them and no gradient is asked for.

    The op has no gradients; convolution and neuron one after the other have, at the input for instance.
    """
    gradients = torch.is_grad_enabled() and (x.requires_grad or conv.weight.requires_grad)
    watched = not (
        may_skip(conv, _CONV_FORWARDS) and may_skip(neuron, _NEURON_FORWARDS) and may_skip(neuron.lif, _LIF_FORWARDS)
    )
    on_gpu = shift_in_neuron(x)
    if watched and on_gpu:
        log_called(conv, _CONV_FORWARDS)
        log_called(neuron, _NEURON_FORWARDS)
    alone = neuron.learned is not None or not neuron.lif.spec.is_lif  # no operator has these and a convolution
    if not on_gpu or gradients or watched or not conv.in_one_op or alone:
        current = conv(x)
        if residual is None:
            return neuron(current)
        shortcut = residual if downsample is None else downsample(residual)
        if gradients or watched or on_gpu or shortcut.dtype != current.dtype:
            return neuron(current, shortcut)
        return neuron(current.add_(shortcut))  # in place: fresh memory costs a CPU more than the sum
    dtype = _dtype_on_gpu(conv)
    x, weight = x.to(dtype), conv.weight.to(dtype)
    kernel = None
    if residual is not None and downsample is not None:
        skipped = may_skip(downsample, _SHORTCUT_FORWARDS) and len(downsample) == 1
        operands = shortcut_operands(downsample[0], residual) if skipped else None
        residual, kernel = operands if operands is not None else (downsample(residual), None)
    residual, kernel = (None if tensor is None else tensor.to(dtype) for tensor in (residual, kernel))
    spikes, current = torch.ops.gac_kernels.conv_lif(
        x,
        weight,
        neuron.shift,
        residual,
        neuron.num_steps,
        conv.stride[0],
        *neuron.lif.spec.forward_arguments,
        neuron.keep_membrane,
        kernel,
    )
    return neuron.returned(current, spikes)


def _dtype_on_gpu(conv: nn.Conv2d) -> torch.dtype:
    dtype = conv.weight.dtype  # autocast leaves float64
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") and dtype != torch.float64 else dtype


@torch.no_grad()
def fuse_for_inference(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Fold every batch norm of a spiking network into its convolutions, in place, and put it into eval mode.

    The network then gives the same logits up to rounding, in fewer passes over memory. It can no longer be trained, and
    its state_dict is another: to undo it, create the model anew and load its weights. Weights that parametrizations,
    pruning or weight norm compute become plain ones of the same values. A replaced module's hooks stay. Of neurons that
    learned, a layer's decay and threshold become numbers of its spec; those of channels stay tensors, with which
    convolution and neuron are two kernels on a GPU.

    Args:
        model: A network of this package, with running statistics.
        dtype: Convert the weights to this dtype afterwards, such as torch.bfloat16; None leaves them.

    Returns:
        The same model.

    Raises:
        ValueError: The model is no spiking network of this package, is folded already, has a batch norm without
            running statistics, weights that are not finite, or other modules in the place of its blocks, convolutions
            or norms. It is then left as it was.

    Examples:
        >>> import timm, timm_gac
        >>> model = timm_gac.fuse_for_inference(timm.create_model("gac_msresnet18_cifar"))
    """
    blocks = check_foldable(model)
    check_finite(model, "to fold")
    model.eval()
    plain_weights(model)
    network: Any = model
    network.set_spike_packing(False)
    network.set_current_noise(0.0)
    stem = FoldedStem(network.conv1, fold_batch_norm(network.conv1, network.bn1))
    network.conv1 = _with_hooks(stem, network.conv1)
    network.bn1 = _with_hooks(nn.Identity(), network.bn1)
    for stage in [module for module in model.modules() if isinstance(module, Stage)]:
        for index, block in enumerate(stage):
            _fuse_block(block, last=block is blocks[-1])
            stage[index] = _with_hooks(FoldedBlock(block), block)  # type: ignore[arg-type]
    network.inference_only = True
    model.eval()  # the new modules
    return model if dtype is None else model.to(dtype)


def _fuse_block(block: Any, last: bool) -> None:
    _replace(block, "conv1", "bn1", fold_batch_norm(block.conv1, block.bn1), keep_membrane=False)
    shift = fold_batch_norm(block.conv2, block.bn2)
    if block.downsample is not None:
        shift = shift + fold_batch_norm(block.downsample[0], block.downsample[1])
        block.downsample = _with_hooks(block.downsample[:1], block.downsample)
    keep = block.bn2.returns_pair and not last
    _replace(block, "conv2", "bn2", shift, keep_membrane=keep)


def _replace(block: Any, conv: str, norm: str, shift: Tensor, keep_membrane: bool) -> None:
    """A convolution and its norm by those that share a folded shift."""
    conv_before, norm_before = getattr(block, conv), getattr(block, norm)
    shift = shift.to(torch.promote_types(conv_before.weight.dtype, torch.float32))
    setattr(block, conv, _with_hooks(FoldedConv2d(conv_before, shift), conv_before))
    _fix_learned(norm_before.lif)
    setattr(block, norm, _with_hooks(FoldedLIF(norm_before, shift, keep_membrane), norm_before))


def _fix_learned(neuron: Any) -> None:
    """Put the learned decay and threshold of a whole layer into its spec, for which kernels are compiled."""
    learned = getattr(neuron, "learned", None)
    fixed = None if learned is None else learned.fixed(neuron.spec)
    if fixed is not None:
        neuron.spec, neuron.learned = fixed, None


def _with_hooks(module: nn.Module, before: nn.Module) -> nn.Module:
    """A module with the hooks of the one that it replaces; their handles remove them there too."""
    for name, value in vars(before).items():
        if name.startswith(("_forward_", "_backward_", "_is_full_backward_hook")):
            vars(module)[name] = value
    return module
