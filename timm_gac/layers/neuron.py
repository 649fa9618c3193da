"""Spiking neurons as modules: the neuron alone, and batch norm + residual + neuron in one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gac_kernels import CIFAR, LIFSpec, lif, pack_spikes

from ..runtime.collectives import combine_statistics
from .checks import check_num_steps, fixed_num_steps
from .neuron_layer import add_residual, at_least_float32, spikes_of

__all__ = ["LIF", "BatchNormLIF", "MembraneBatchNormLIF"]


@register_notrace_module
class LIF(nn.Module):
    """Multi-step leaky integrate-and-fire neuron without parameters and without memory between calls.

    Shape:
        - ``num_steps=None``: ``(T, ...)`` -> spikes ``(T, ...)``
        - ``num_steps=T``: time-folded ``(T*B, ...)`` -> spikes ``(T*B, ...)``, row ``t*B + b`` being sample b at step t

    Args:
        spec: What the neuron computes.
        num_steps: Number of time steps T folded into the first axis, or None where time is an axis of its own.

    Raises:
        ValueError: ``num_steps`` is no integer >= 1, or the first axis of an input is no multiple of it.
    """

    returns_pair = False
    spikes_dtype = None  # that of its input
    num_steps = fixed_num_steps()

    def __init__(self, spec: LIFSpec = CIFAR, num_steps: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.num_steps = None if num_steps is None else check_num_steps(num_steps)

    def forward(self, x: Tensor) -> Tensor:
        """Spikes of the input current, in the input's dtype."""
        num_steps = self.num_steps
        if num_steps is not None:
            if x.shape[0] % num_steps != 0:
                raise ValueError(
                    f"expected a first axis of num_steps * batch with num_steps={num_steps}, got {x.shape[0]}: "
                    "fold time with x.flatten(0, 1)"
                )
            x = x.unflatten(0, [num_steps, x.shape[0] // num_steps])
        spikes = lif(x, self.spec)
        assert isinstance(spikes, Tensor)  # a pair only where the state is asked for
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


@register_notrace_module
class BatchNormLIF(_NormBase):
    """Batch norm over (T, B, H, W), plus an optional residual, then LIF: ``LIF(BN(x) + residual)``.

    Its parameters, buffers and state_dict are those of ``nn.BatchNorm2d``. It is deliberately not a subclass of
    ``_BatchNorm``: ``nn.SyncBatchNorm.convert_sync_batchnorm`` (and timm's) would replace it whole and lose the neuron
    in silence. They replace its child `sync` instead, a batch norm without parameters, statistics or state, and a
    ``SyncBatchNorm`` in that place tells this module to share its batch statistics over that process group.

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
    """

    returns_pair = False
    spikes_dtype = None  # that of its input
    num_steps = fixed_num_steps()

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
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not 0.0 <= drop_path < 1.0:
            raise ValueError(f"expected drop_path in [0, 1), got {drop_path!r}: give one such as 0.1")
        self.drop_path = float(drop_path)
        self.lif = LIF(spec)
        self.num_steps = None if num_steps is None else check_num_steps(num_steps)
        self.sync = nn.BatchNorm2d(num_features, affine=False, track_running_stats=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Spikes of ``BN(x) + residual``."""
        return self._membrane_and_spikes(x, residual, keep_membrane=False)[1]

    def _membrane_and_spikes(self, x: Tensor, residual: Tensor | None, keep_membrane: bool) -> tuple[Tensor, Tensor]:
        """The pair (membrane, spikes) in the shape of x; without ``keep_membrane`` the membrane is not to be used."""
        num_steps = self.num_steps
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
                it is part of the pass, and its output never exists; its forward hooks do not run then.
        """
        if residual is not None and residual_norm is not None and not self._takes_in(x, residual, residual_norm):
            residual, residual_norm = residual_norm(residual), None
        if self.training and self.drop_path > 0.0:
            membrane, spikes = self._with_drop_path(x, residual, num_steps)
            return membrane, spikes, pack_spikes(spikes, num_steps) if pack else None
        if residual is not None and residual.dtype != x.dtype:
            dtype = torch.promote_types(x.dtype, residual.dtype)
            x, residual = x.to(dtype), residual.to(dtype)
        mean, var, total, group = self._statistics(x.detach())
        of_residual: tuple[Tensor | None, ...] = (None, None, None, None)
        res_eps = 0.0
        if residual is not None and isinstance(residual_norm, nn.BatchNorm2d):
            of_residual, res_eps = _shortcut_statistics(residual_norm, residual.detach()), residual_norm.eps
        batch = self.training or self.running_mean is None
        spikes, membrane, bits = torch.ops.gac_kernels.norm_lif(
            x, residual, self.weight, self.bias, mean, var, total, self.eps, num_steps, *self.lif.spec.op_arguments,
            batch, keep_membrane, group, *of_residual, res_eps, pack,
        )  # fmt: skip
        return membrane, spikes, bits if pack else None

    def _takes_in(self, x: Tensor, residual: Tensor, norm: nn.Module) -> bool:
        """Whether a norm of the residual can be part of this one's pass."""
        return (
            type(norm) is nn.BatchNorm2d  # a SyncBatchNorm shares its statistics over processes
            and norm.training
            and self.training
            and norm.affine == self.affine
            and norm.track_running_stats
            and norm.momentum is not None
            and self.drop_path == 0.0
            and residual.dtype == x.dtype
            and not (isinstance(self.sync, nn.SyncBatchNorm) and _world_size(self.sync) > 1)
        )

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, str]:
        """Mean and variance to normalise with; over several processes also the count of values and the group's name.

        In training the running statistics are brought up to date on the way.
        """
        running_mean, running_var = self.running_mean, self.running_var
        if not self.training and running_mean is not None and running_var is not None:
            return running_mean, running_var, None, ""
        momentum = 0.0 if self.momentum is None else self.momentum
        update = self.training and self.track_running_stats
        counter = self.num_batches_tracked if update else None
        if self.training and isinstance(self.sync, nn.SyncBatchNorm) and _world_size(self.sync) > 1:
            return self._synced_statistics(x, counter)
        in_place = update and self.momentum is not None
        mean, var = torch.ops.gac_kernels.batch_stats(
            x, self.running_mean if in_place else None, self.running_var if in_place else None, momentum, counter
        )
        if update and self.momentum is None:
            count = x.numel() // x.shape[1]
            self._update_running(mean, var * (count / (count - 1.0)))
        return mean, var, None, ""

    def _update_running(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Bring the running statistics up to date, without a host synchronisation where they are cumulative."""
        running_mean, running_var, count = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is None or running_var is None:
            return
        if self.momentum is not None:
            momentum = torch.full_like(mean, self.momentum)
        elif count is not None:
            momentum = (1.0 / count.to(mean.dtype)).expand_as(mean)
        else:
            return
        running_mean.lerp_(mean.to(running_mean.dtype), momentum.to(running_mean.dtype))
        running_var.lerp_(unbiased_var.to(running_var.dtype), momentum.to(running_var.dtype))

    def _synced_statistics(self, x: Tensor, counter: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, str]:
        """Statistics over all processes of the group, on any backend and device."""
        mean, var = torch.ops.gac_kernels.batch_stats(x, None, None, 0.0, counter)
        mean, var, total = self._combine(mean, var, x.numel() // self.num_features)
        group = _process_group(self.sync)
        assert group is not None
        return mean, var, total, group.group_name

    def _combine(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and count of values over all processes from those of each; also the running statistics."""
        mean, var, total = combine_statistics(mean, var, count, _process_group(self.sync))
        if self.track_running_stats:
            with torch.no_grad():
                self._update_running(mean, var * (total / (total - 1.0)))
        return mean, var, total

    def _with_drop_path(self, x: Tensor, residual: Tensor | None, num_steps: int) -> tuple[Tensor, Tensor]:
        """The same with the norm's output dropped for some samples: norm, drop, add and neuron one by one."""
        normed = self._normalize(x)
        membrane = normed.unflatten(0, [num_steps, x.shape[0] // max(num_steps, 1)])
        keep = membrane.new_empty([1, membrane.shape[1], 1, 1, 1]).bernoulli_(1.0 - self.drop_path)
        membrane = membrane * (keep / (1.0 - self.drop_path))
        if residual is not None:
            membrane = membrane + residual.view_as(membrane)
        return membrane.flatten(0, 1), self.lif(membrane).flatten(0, 1)

    def _normalize(self, x: Tensor) -> Tensor:
        """Batch norm alone, in training."""
        if isinstance(self.sync, nn.SyncBatchNorm) and _world_size(self.sync) > 1:
            return self._synced_normalize(x)
        self._statistics(x.detach())  # for the running statistics
        return F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    def _synced_normalize(self, x: Tensor) -> Tensor:
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
        """What its neurons compute."""
        return self.lif.spec

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
        """Batch norm's fields, the number of steps and the drop probability."""
        return f"{super().extra_repr()}, num_steps={self.num_steps}, drop_path={self.drop_path}"


@register_notrace_module
class MembraneBatchNormLIF(BatchNormLIF):
    """`BatchNormLIF` that also returns what its neuron integrates, for networks with membrane shortcuts.

    ``membrane = BN(x) + residual``, ``spikes = LIF(membrane)``, both in the shape and dtype of ``x``.
    """

    returns_pair = True

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """The pair (membrane, spikes)."""
        return self._membrane_and_spikes(x, residual, keep_membrane=True)


def _shortcut_statistics(norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor | None, ...]:
    """Scale, shift, mean and variance of a batch norm in training, whose running statistics are brought up to date."""
    assert norm.momentum is not None
    mean, var = torch.ops.gac_kernels.batch_stats(
        x, norm.running_mean, norm.running_var, norm.momentum, norm.num_batches_tracked
    )
    return norm.weight, norm.bias, mean, var


def _process_group(sync: nn.Module) -> dist.ProcessGroup | None:
    group = getattr(sync, "process_group", None)
    return dist.group.WORLD if group is None else group


def _world_size(sync: nn.Module) -> int:
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(_process_group(sync))
