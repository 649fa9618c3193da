"""The batch norm inside `BatchNormLIF`, as a module that the tools of PyTorch and timm find, freeze and convert.

Such tools look for ``nn.BatchNorm2d`` by ``isinstance`` and put another module in its place. If `BatchNormLIF` were one
itself, ``nn.SyncBatchNorm.convert_sync_batchnorm`` would replace it and lose its neuron. So it has a child that is one,
and that reads and writes its tensors: ``update_bn`` resets them, ``child.eval()`` freezes the norm, a ``SyncBatchNorm``
in its place shares the statistics over processes. The child has no tensors of its own and nothing in a state_dict.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import SplitBatchNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops.misc import FrozenBatchNorm2d

_PARAMETERS, _BUFFERS = ("weight", "bias"), ("running_mean", "running_var", "num_batches_tracked")
_SIZES = ("num_features", "affine", "track_running_stats")  # they describe the tensors, so they stay with them
_OWN = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_shared")


class _Tensors:
    """Parameters and buffers of a module, the dictionaries themselves.

    `torch.export` puts copies in the place of tuples and dictionaries that it finds in a module, with fake tensors in
    them; in an object of this class it does not look.
    """

    def __init__(self, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
        self.parameters = parameters
        self.buffers = buffers

    def of(self, name: str) -> dict[str, Any]:
        """The dictionary that a tensor of this name is in."""
        return self.buffers if name in _BUFFERS else self.parameters


class _SharedTensors(nn.Module):
    """Tensors of another module under the names of a batch norm."""

    _shared: _Tensors

    def __getattr__(self, name: str) -> Any:
        if name in _PARAMETERS or name in _BUFFERS:
            return self.__dict__["_shared"].of(name).get(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PARAMETERS or name in _BUFFERS:
            self.__dict__["_shared"].of(name)[name] = value
        else:
            super().__setattr__(name, value)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Scale and shift, for ``for p in norm.parameters(): p.requires_grad = False``.

        `named_parameters` and ``recurse=False`` give none: walks over all modules count them where they belong.
        """
        return iter([tensor for tensor in self._shared.parameters.values() if tensor is not None] if recurse else [])

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # a batch norm's would add its own counter of batches


class SharedBatchNorm2d(_SharedTensors, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` with the tensors of a `BatchNormLIF`."""


class SharedSyncBatchNorm(_SharedTensors, nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm` with the tensors of a `BatchNormLIF`."""


class SharedFrozenBatchNorm2d(_SharedTensors, FrozenBatchNorm2d):
    """torchvision's and timm's ``FrozenBatchNorm2d`` with the tensors of a `BatchNormLIF`."""

    def forward(self, x: Tensor) -> Tensor:
        """Batch norm with the running statistics."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_features}, eps={self.eps})"


# Of norms that `BatchNormLIF` may do the work of.
NORM_FORWARDS = (SharedBatchNorm2d.forward, SharedSyncBatchNorm.forward, SharedFrozenBatchNorm2d.forward)


def share_norm(
    norm: nn.Module, before: nn.Module | None, parameters: dict[str, Any], buffers: dict[str, Any]
) -> nn.Module:
    """A norm that is put into a `BatchNormLIF`, as one that has its tensors.

    Args:
        norm: Batch norm, synchronised or frozen one, whose values are taken over; any other module is returned as is.
        before: The norm that stood there.
        parameters: Of the `BatchNormLIF`, which a frozen norm freezes.
        buffers: Of the `BatchNormLIF`.

    Raises:
        ValueError: The norm splits its batch into parts.
    """
    if isinstance(norm, _SharedTensors) and norm._shared.parameters is parameters:
        return norm
    if isinstance(norm, SplitBatchNorm2d):
        raise ValueError(
            "expected a batch norm over a whole batch, got a SplitBatchNorm2d: it would split the time steps of a "
            "sample; do without --split-bn and convert_splitbn_model"
        )
    kind: type[_SharedTensors]
    if isinstance(norm, FrozenBatchNorm2d):
        kind = SharedFrozenBatchNorm2d
    elif isinstance(norm, nn.SyncBatchNorm):
        kind = SharedSyncBatchNorm
    elif type(norm).forward is _BatchNorm.forward:
        kind = SharedBatchNorm2d
    else:
        return norm
    frozen = kind is SharedFrozenBatchNorm2d
    _take_values(norm, parameters, buffers)
    shared = kind.__new__(kind)
    nn.Module.__init__(shared)
    kept = vars(before) if isinstance(before, _SharedTensors) else {}
    thawed = isinstance(before, SharedFrozenBatchNorm2d) and not frozen  # timm makes a norm with the default momentum
    state = {name: value for name, value in vars(norm).items() if name not in _OWN}
    fixed = (*_SIZES, "momentum") if frozen or thawed else _SIZES
    vars(shared).update(state | {name: kept[name] for name in fixed if name in kept})
    vars(shared)["_shared"] = _Tensors(parameters, buffers)
    if frozen or thawed:
        shared.requires_grad_(thawed)
    return shared


@torch.no_grad()
def _take_values(norm: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any]) -> None:
    for name in (*_PARAMETERS, *_BUFFERS):
        new, own = getattr(norm, name, None), (parameters if name in _PARAMETERS else buffers).get(name)
        if isinstance(new, Tensor) and isinstance(own, Tensor) and new is not own:
            own.copy_(new)
