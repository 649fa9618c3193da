"""Spiking neurons behind a batch norm: batch norm, residual and neuron in one."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gac_kernels import CIFAR, LIFSpec, pack_spikes
from gac_kernels.checks import check_tensor

from ..runtime.collectives import combine_statistics
from .batch_statistics import (
    batch_statistics,
    call_norm,
    counter_beside,
    is_synchronised,
    process_group,
    update_running,
    uses_batch,
)
from .checks import check_count, check_num_steps, fixed_num_steps, log_called, may_skip
from .learned import LearnedValues
from .lif import LIF
from .neuron_layer import add_residual, at_least_float32, spikes_of
from .noise import adds_noise, draw_noise
from .shared_norm import NORM_FORWARDS, share_norm

_NEURON_FORWARDS = (LIF.forward,)
_BATCH_NORM_FORWARDS = (nn.BatchNorm2d.forward,)


def _option_of_norm(name: str) -> Any:
    """A batch norm's option as a property of `BatchNormLIF`: it is kept in `norm` alone."""

    def get(self: BatchNormLIF) -> Any:
        return getattr(self.norm, name, None)

    def put(self: BatchNormLIF, value: Any) -> None:
        setattr(self.norm, name, value)

    return property(get, put, doc=f"``{name}`` of the batch norm.")


# Mean and variance to normalise with; over several processes also the count of values and the group's name.
_Statistics = tuple[Any, Any, Tensor | None, str]


@register_notrace_module
class BatchNormLIF(_NormBase):
    """Batch norm over (T, B, H, W), plus an optional residual, then LIF: ``LIF(BN(x) + residual)``.

    Parameters, buffers and state_dict are those of ``nn.BatchNorm2d``, and what a neuron that learns adds. Its two
    children are called only where somebody watches or has replaced them, else one kernel does the work of both: `lif`,
    the neuron, and `norm`, a batch norm with the tensors of this module. What is done to `norm` counts:
    ``norm.eval()`` freezes its statistics, ``convert_sync_batchnorm`` (PyTorch's and timm's) shares them over a process
    group, ``timm.utils.freeze`` and ``torch.optim.swa_utils.update_bn`` treat it as any other batch norm.

    Shape:
        - ``x``, ``residual`` and spikes: ``(T*B, C, H, W)`` with ``num_steps=T``; with None ``(T, B, C, H, W)``

    Args:
        num_features: Number of channels C.
        spec: What the neuron computes.
        num_steps: Number of time steps T folded into the first axis, or None where time is an axis of its own.
        eps: Added to the variance.
        momentum: Weight of a batch in the running statistics; None for a cumulative average.
        affine: Learn a scale and a shift per channel.
        track_running_stats: Keep running statistics; without them batch statistics are used in eval mode too.
        drop_path: Probability, in training, of dropping ``BN(x)`` of a sample at all of its time steps.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        learnable: Learn decay and threshold of the neuron, see `LIF`.

    Raises:
        ValueError: ``spec``, ``num_steps``, ``learnable`` or ``drop_path`` is none, or an input has another rank or
            number of steps.
    """

    returns_pair = False
    spikes_dtype = None  # that of its input
    num_steps = fixed_num_steps()
    num_features, eps, momentum = (_option_of_norm(name) for name in ("num_features", "eps", "momentum"))
    affine, track_running_stats = (_option_of_norm(name) for name in ("affine", "track_running_stats"))

    def __init__(
        self,
        num_features: int,
        spec: LIFSpec = CIFAR,
        num_steps: int | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        learnable: str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # the base class's options, such as eps, are those of `norm`
        num_features = check_count("num_features", num_features, 64)
        probability: Any = drop_path
        if not isinstance(probability, Real) or not 0.0 <= float(probability) < 1.0:
            raise ValueError(f"expected drop_path in [0, 1), got {drop_path!r}: give one such as 0.1")
        self.drop_path = float(drop_path)
        self.lif = LIF(spec, learnable=learnable, channels=num_features, device=device, dtype=dtype)
        self.num_steps = None if num_steps is None else check_num_steps(num_steps)
        norm = nn.BatchNorm2d(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            track_running_stats=track_running_stats,
            device=device,
            dtype=dtype,
        )
        self._parameters.update(norm._parameters)
        self._buffers.update(norm._buffers)
        self.norm = norm

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "norm" and isinstance(value, nn.Module):
            value = share_norm(value, self._modules.get(name), self._parameters, self._buffers)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a child; a batch norm as ``norm`` takes the tensors of this module, and gives them its values."""
        if name == "norm" and module is not None:
            module = share_norm(module, self._modules.get(name), self._parameters, self._buffers)
        super().add_module(name, module)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Spikes of ``BN(x) + residual``."""
        return self._membrane_and_spikes(x, residual, keep_membrane=False)[1]

    def _membrane_and_spikes(self, x: Tensor, residual: Tensor | None, keep_membrane: bool) -> tuple[Tensor, Tensor]:
        """The pair (membrane, spikes) in the shape of x; without ``keep_membrane`` the membrane is not to be used."""
        num_steps = self.num_steps
        check_tensor("x", x)
        if x.ndim != (5 if num_steps is None else 4) or (num_steps is not None and x.shape[0] % num_steps != 0):
            raise ValueError(
                f"expected x as (T*B, C, H, W) with T = num_steps = {num_steps}, or as (T, B, C, H, W) with "
                f"num_steps=None, got {x.shape}: fold time with x.flatten(0, 1)"
            )
        if num_steps is not None:
            return self.norm_and_fire(x, residual, num_steps, keep_membrane)[:2]
        shortcut = None if residual is None else residual.flatten(0, 1)
        membrane, spikes, _ = self.norm_and_fire(x.flatten(0, 1), shortcut, x.shape[0], keep_membrane)
        return membrane.view_as(x) if keep_membrane else membrane, spikes.view_as(x)

    def norm_and_fire(
        self,
        x: Tensor,
        residual: Tensor | None,
        num_steps: int,
        keep_membrane: bool = False,
        pack: bool = False,
        residual_norm: nn.Module | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Membrane (not to be used without ``keep_membrane``), spikes and, with ``pack``, the spikes' bits.

        Args:
            x: ``(T*B, C, H, W)``.
            residual: Of the same shape.
            num_steps: T.
            keep_membrane: The membrane is needed.
            pack: The bits are needed, for a convolution that is to keep them for its backward pass.
            residual_norm: A batch norm to apply to the residual. Where it is an ordinary ``nn.BatchNorm2d`` in training
                that nobody watches, it is part of the pass and its output never exists; else it is called.
        """
        norm: Any = self._modules["norm"]  # nn.Module's attributes take several times as long
        neuron: Any = self._modules["lif"]
        fused = may_skip(norm, NORM_FORWARDS) and may_skip(neuron, _NEURON_FORWARDS)
        if residual is None:
            residual_norm = None
        elif residual_norm is not None and not (fused and self._takes_in(x, residual, residual_norm)):
            residual, residual_norm = call_norm(residual_norm, residual), None
        if not fused or (self.drop_path > 0.0 and self.training):
            membrane, spikes = self._one_by_one(x, residual, num_steps)
            return membrane, spikes, pack_spikes(spikes, num_steps) if pack else None
        if residual is not None and residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        batch = uses_batch(norm) or self._buffers["running_mean"] is None
        mean, var, total, group = self._statistics(x.detach()) if batch else self._running()
        of_residual: tuple[Tensor | None, ...] = (None, None, None, None)
        res_eps = 0.0
        if isinstance(residual_norm, nn.BatchNorm2d) and residual is not None:
            statistics = batch_statistics(residual_norm, residual.detach(), residual_norm._buffers)
            of_residual = (residual_norm.weight, residual_norm.bias, *statistics)
            res_eps = residual_norm.eps
        learned = getattr(neuron, "learned", None)
        noise = draw_noise(neuron, x, axis=1) if adds_noise(neuron) else None
        again = noise is not None and (residual is not None or keep_membrane)
        residual = noise if residual is None and not again else residual
        operands = (x, residual, self.weight, self.bias, mean, var, total, norm.eps, num_steps)
        options = (batch, keep_membrane or again, group, *of_residual, res_eps, pack and not again)
        values = () if learned is None else (learned.values(x.shape[1]),)
        norm_lif = torch.ops.gac_kernels.norm_lif
        spikes, membrane, bits = norm_lif(*operands, *neuron.spec.op_arguments, *options, *values)
        if again:
            # The membrane stays without noise, which would add up along the shortcuts; a second pass, of the neuron
            # alone, sums both in float32.
            operands = (membrane, noise, *[None] * 5, 0.0, num_steps)
            options = (False, False, "", *[None] * 4, 0.0, pack)
            spikes, _, bits = norm_lif(*operands, *neuron.spec.op_arguments, *options, *values)
        return membrane, spikes, bits if pack else None

    def _takes_in(self, x: Tensor, residual: Tensor, norm: nn.Module) -> bool:
        """Whether a norm of the residual can be part of this one's pass."""
        if not may_skip(norm, _BATCH_NORM_FORWARDS):
            if not isinstance(norm, nn.SyncBatchNorm):  # which is always called, to share statistics over processes
                log_called(norm, _BATCH_NORM_FORWARDS)
            return False
        affine = (self.weight is None, self.bias is None)
        return (
            norm.training
            and uses_batch(self.norm)
            and (norm.weight is None, norm.bias is None) == affine
            and self.drop_path == 0.0
            and residual.dtype == x.dtype
            and not is_synchronised(self.norm)
        )

    def _running(self) -> _Statistics:
        return self._buffers["running_mean"], self._buffers["running_var"], None, ""

    def _statistics(self, x: Tensor) -> _Statistics:
        """Statistics of a batch; in training the running ones are brought up to date on the way."""
        norm: Any = self._modules["norm"]
        if is_synchronised(norm) and norm.training:
            return self._synchronised_statistics(x)
        return *batch_statistics(norm, x, self._buffers), None, ""

    def _synchronised_statistics(self, x: Tensor) -> _Statistics:
        """Statistics over all processes of the group, on any backend and device."""
        counter = counter_beside(x, self.num_batches_tracked) if self.track_running_stats else None
        mean, var = torch.ops.gac_kernels.batch_stats(x, None, None, 0.0, counter)
        mean, var, total = self._combine(mean, var, x.numel() // self.num_features)
        group = process_group(self.norm)
        assert group is not None
        return mean, var, total, group.group_name

    def _combine(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and count of values over all processes from those of each; also the running statistics."""
        mean, var, total = combine_statistics(mean, var, count, process_group(self.norm))
        if self.track_running_stats:
            with torch.no_grad():
                update_running(self._buffers, mean, var * (total / (total - 1.0)), self.momentum)
        return mean, var, total

    def _one_by_one(self, x: Tensor, residual: Tensor | None, num_steps: int) -> tuple[Tensor, Tensor]:
        """Membrane and spikes by norm, drop path, residual and neuron one after the other."""
        log_called(self.norm, NORM_FORWARDS)
        log_called(self.lif, _NEURON_FORWARDS)
        normed = self._normalize(x)
        membrane = normed.unflatten(0, [num_steps, x.shape[0] // max(num_steps, 1)])
        if self.drop_path > 0.0 and self.training:
            keep = membrane.new_empty([1, membrane.shape[1], 1, 1, 1]).bernoulli_(1.0 - self.drop_path)
            membrane = membrane * (keep / (1.0 - self.drop_path))
        if residual is not None:
            membrane = membrane + residual.view_as(membrane)
        return membrane.flatten(0, 1), self.lif(membrane).flatten(0, 1)

    def _normalize(self, x: Tensor) -> Tensor:
        """Batch norm alone."""
        norm = self.norm
        training = uses_batch(norm)
        if training and is_synchronised(norm) and (may_skip(norm, NORM_FORWARDS) or not x.is_cuda):
            return self._synchronised_norm(x)
        if not may_skip(norm, NORM_FORWARDS):
            return call_norm(norm, x)
        mean, var = self.running_mean, self.running_var
        if training or mean is None:
            self._statistics(x.detach())  # for the running statistics
            mean = var = None
        return F.batch_norm(x, mean, var, self.weight, self.bias, mean is None, 0.0, self.eps)

    def _synchronised_norm(self, x: Tensor) -> Tensor:
        if self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        mean, var, _ = self._combine(mean, var, x.numel() // self.num_features)
        scale = torch.rsqrt(var + self.eps)
        shift = -mean * scale
        if self.affine:
            shift = shift * self.weight + self.bias
            scale = scale * self.weight
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    @property
    def spec(self) -> LIFSpec:
        """What its neurons compute, or began with where they learn."""
        return self.lif.spec

    @property
    def learned(self) -> LearnedValues | None:
        """Learned decay and threshold of its neurons."""
        return getattr(self.lif, "learned", None)

    @torch.no_grad()
    def input_current(self, inputs: tuple[Any, ...], num_steps: int) -> Tensor:
        """See `NeuronLayer`."""
        x = at_least_float32(inputs[0])
        shape = x.shape if self.num_steps is None else (num_steps, -1, *x.shape[1:])
        norm = (self.running_mean, self.running_var, self.weight, self.bias)
        mean, var, weight, bias = (None if value is None else value.to(x.dtype) for value in norm)
        folded = x.flatten(0, 1) if self.num_steps is None else x
        x = F.batch_norm(folded, mean, var, weight, bias, training=mean is None, eps=self.eps).view_as(x)
        return add_residual(x, inputs).reshape(shape)

    def output_spikes(self, output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """See `NeuronLayer`."""
        spikes = spikes_of(output)
        return spikes.flatten(0, 1) if self.num_steps is None else spikes

    def extra_repr(self) -> str:
        """The number of steps and the drop probability."""
        return f"num_steps={self.num_steps}, drop_path={self.drop_path}"


@register_notrace_module
class MembraneBatchNormLIF(BatchNormLIF):
    """`BatchNormLIF` that also returns what its neuron integrates, for networks with membrane shortcuts.

    ``membrane = BN(x) + residual``, ``spikes = LIF(membrane)``, both in the shape and dtype of ``x``.
    """

    returns_pair = True

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The pair (membrane, spikes)."""
        return self._membrane_and_spikes(x, residual, keep_membrane=True)
