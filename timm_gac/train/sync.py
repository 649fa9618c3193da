"""Batch norm over all processes, on any device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layers.batch_statistics import update_running
from ..runtime.collectives import combine_statistics


class AnyDeviceSyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm`` that also works on a CPU; PyTorch's needs an accelerator."""

    def forward(self, input: Tensor) -> Tensor:
        """Batch norm of ``(N, C, ...)`` with the statistics of all processes' batches, in training."""
        group = self.process_group or dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if input.device.type != "cpu" or not self.training or group is None or dist.get_world_size(group) == 1:
            return super().forward(input)
        return self._synchronised(input, group)

    def _synchronised(self, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, axes, correction=0)
        mean, var, total = combine_statistics(mean, var, x.numel() // x.shape[1], group)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        with torch.no_grad():
            update_running(self._buffers, mean, var * (total / (total - 1.0)), self.momentum)
        scale = torch.rsqrt(var + self.eps)
        shift = -mean * scale
        if self.affine:
            scale, shift = scale * self.weight, shift * self.weight + self.bias
        return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)


def synchronise_norms(network: nn.Module) -> Any:
    """The network with every batch norm over all processes, those fused with neurons included (see `BatchNormLIF`)."""
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in converted.modules():
        if type(module) is nn.SyncBatchNorm:  # not the norm in a BatchNormLIF, which has a class of its own
            module.__class__ = AnyDeviceSyncBatchNorm  # adds methods; the state is the same
    return converted
