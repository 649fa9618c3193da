"""`spike_conv` on x86 CPUs: oneDNN's int8 convolution, then the float32 operations while its sums are in the cache."""

from __future__ import annotations

import functools
import platform
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..neuron.eager import fire, in_memory_order, reset, shifted

# Sums that are computed before the neuron reads them, 4 MiB, so that they are still in the cache: 48 samples of
# gac_msresnet18_cifar took 0.94 s with it and 1.11 s a whole step at a time (two cores, 32 MiB of L3; least of 5 runs).
_SUMS = 2**20


@functools.cache
def why_not() -> str:
    """Why this process cannot use it, empty where it can."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"oneDNN's int8 convolution is for x86-64, this is {platform.machine()}"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch is built without oneDNN"
    if not all(hasattr(torch.ops.onednn, name) for name in ("qconv_prepack", "qconv2d_pointwise")):
        return "this PyTorch has no int8 convolutions of oneDNN"
    try:
        return "" if _sums_are_exact() else "oneDNN's int8 convolution is not exact on this CPU"
    except (RuntimeError, TypeError) as error:
        return f"oneDNN's int8 convolution failed: {str(error).splitlines()[0]}"


def forward(
    spikes: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    num_steps: int,
    stride: int,
    threshold: float,
    decay: float,
    soft_reset: bool,
    shift: float,
    out: Tensor,
    membrane: Tensor,
) -> None:
    """Write spikes and, where it has elements, the neuron's input current."""
    packed = _packed(weight, stride)
    scale, bias = scale[:, None, None], bias.sub(shift)[:, None, None]
    batch = spikes.shape[0] // num_steps
    samples = max(1, _SUMS // out[0].numel())
    for first in range(0, batch, samples):
        v: Tensor | None = None
        for t in range(num_steps):
            rows = slice(t * batch + first, t * batch + min(first + samples, batch))
            current = packed.convolve(spikes[rows]).mul_(scale).add_(bias)
            if residual is not None:
                current.add_(shifted(residual[rows], shift))
            if membrane.numel():
                membrane[rows] = current
            u = current if v is None else v.mul_(decay).add_(current)
            fired = fire(u, threshold)
            out[rows] = fired
            v = reset(u, fired, threshold, soft_reset, fired)


class _Packed(NamedTuple):
    """A weight in oneDNN's own layout.

    Attributes:
        storage: Says whether the weight's memory is still in use.
        source: The weight's elements at packing, in the order in which they lay in memory.
        weight: The packed weight.
        ones: (C',) float32, its scale.
        zeros: (C',) int32, its zero point.
        stride: 1 or 2.
    """

    storage: StorageWeakRef
    source: Tensor
    weight: Tensor
    ones: Tensor
    zeros: Tensor
    stride: int

    @classmethod
    def of(cls, weight: Tensor, stride: int) -> _Packed:
        """Pack a dense (C', C, 3, 3) weight."""
        ones, zeros = (torch.full((len(weight),), n, dtype=d) for n, d in ((1, torch.float32), (0, torch.int32)))
        packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, [stride] * 2, [1, 1], [1, 1], 1, None)
        source = in_memory_order(weight).clone()
        return cls(StorageWeakRef(weight.untyped_storage()), source, packed, ones, zeros, stride)

    def convolve(self, spikes: Tensor) -> Tensor:
        """Exact sums (N, C', H', W') in float32, channels-last.

        Without VNNI the products are added in pairs in 16 bits, which saturates; pairs of spikes and weights do not.
        """
        return torch.ops.onednn.qconv2d_pointwise(
            spikes.view(torch.uint8),
            1.0,
            0,
            self.weight,
            self.ones,
            self.zeros,
            None,
            [self.stride] * 2,
            [1, 1],
            [1, 1],
            1,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )


_cache: dict[tuple[int, torch.Size, int], _Packed] = {}


def _packed(weight: Tensor, stride: int) -> _Packed:
    """The packed weight, from the cache where the weight still holds what was packed.

    Packing the widest layer takes as long as its convolution, comparing all elements a twentieth. A version counter
    would cost nothing, but it does not see every change: not one through ``.data``, nor one between two calls of a
    compiled network. Weights that are gone leave the cache when the next one is packed.
    """
    key = (weight.data_ptr(), weight.shape, stride)
    found = _cache.get(key)
    if found is None or not torch.equal(_words(found.source), _words(in_memory_order(weight))):
        for other, packed in list(_cache.items()):
            if packed.storage.expired():
                _cache.pop(other, None)
        found = _cache[key] = _Packed.of(weight, stride)
    return found


def _words(elements: Tensor) -> Tensor:
    """Bytes as 64-bit integers where they divide into such, which are compared several times as fast."""
    whole = elements.numel() % 8 == 0 and elements.storage_offset() % 8 == 0
    return elements.view(torch.int64) if whole else elements


def _sums_are_exact() -> bool:
    """Whether the largest sums of a layer of 64 channels, and sums of random weights, are those of float64."""
    generator = torch.Generator("cpu").manual_seed(0)
    random = torch.randint(-128, 128, (32, 64, 3, 3), generator=generator, dtype=torch.int8, device="cpu")
    extreme = torch.full_like(random, 127)
    extreme[1::2] = -128
    spikes = torch.ones(2, 64, 5, 7, dtype=torch.int8, device="cpu")
    spikes[1] = torch.randint(2, spikes.shape[1:], generator=generator, dtype=torch.int8, device="cpu")
    spikes = spikes.contiguous(memory_format=torch.channels_last)
    return all(
        torch.equal(
            _Packed.of(weight.contiguous(memory_format=torch.channels_last), stride).convolve(spikes).double(),
            F.conv2d(spikes.double(), weight.double(), None, stride, 1),
        )
        for weight in (random, extreme)
        for stride in (1, 2)
    )
