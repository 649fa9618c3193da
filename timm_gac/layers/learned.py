"""Decay and threshold as parameters of a neuron: a sigmoid and a softplus, one of each a layer or one a channel."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gac_kernels import LIFSpec

_logger = logging.getLogger(__name__)
_IS_LEARNED = re.compile(r"(^|\.)learned\.(decay_logit|threshold_raw)$")

LEARNABLE = (None, "layer", "channel")
# Names of neurons, as networks and recipes take them, and what is learned of them.
NEURONS: dict[str, str | None] = {"lif": None, "plif": "layer", "plif_channel": "channel"}


class LearnedValues(nn.Module):
    """The learned decay, ``sigmoid(decay_logit)``, and threshold, ``softplus(threshold_raw)``, of a layer of neurons.

    Both start at the spec's values, to the bit. Parameters have one axis, which keeps weight decay away from them in
    timm's optimisers, our trainer and `parameter_groups`; they stay float32 (float64) where a network is converted to
    16 bits.

    Attributes:
        decay_logit: ``(N,)``, N being 1 or the number of channels.
        threshold_raw: ``(N,)``.

    Args:
        spec: Where both start.
        count: N.
        device: Device of the parameters.
        dtype: float64 for parameters in that; else they are float32.

    Raises:
        ValueError: The spec's decay is 0 or 1, where a sigmoid has no gradient, or rounds to one of these in the dtype;
            or its threshold is beyond the dtype.
    """

    def __init__(
        self,
        spec: LIFSpec,
        count: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 0.0 < spec.decay < 1.0:
            raise ValueError(
                f"expected a decay between 0 and 1 to learn from, got {spec.decay!r}: a sigmoid never reaches it, "
                "start at one such as 0.5"
            )
        dd: dict[str, Any] = {"device": device, "dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        logit = _argument(torch.sigmoid, math.log(spec.decay / (1.0 - spec.decay)), spec.decay, dd["dtype"])
        raw = _argument(
            F.softplus, spec.threshold + math.log(-math.expm1(-spec.threshold)), spec.threshold, dd["dtype"]
        )
        self._start = {"decay_logit": logit, "threshold_raw": raw}
        starts = torch.tensor([[logit], [raw]], dtype=dd["dtype"], device="cpu")
        _check_values(starts[0].sigmoid(), F.softplus(starts[1]), near=spec)
        self.decay_logit = nn.Parameter(torch.full((count,), logit, **dd))
        self.threshold_raw = nn.Parameter(torch.full((count,), raw, **dd))

    @property
    def decay(self) -> Tensor:
        """Decays ``(N,)``."""
        return self.decay_logit.sigmoid()

    @property
    def threshold(self) -> Tensor:
        """Thresholds ``(N,)``."""
        return F.softplus(self.threshold_raw)

    def values(self, channels: int | None = None) -> Tensor:
        """Decays and thresholds ``(2, N)`` as operators take them; with ``channels`` one of each a channel."""
        values = torch.stack((self.decay, self.threshold))
        return values if channels is None else values.expand(2, channels)

    def named(self) -> dict[str, Tensor]:
        """Decay and threshold by the names under which functions such as `gac_kernels.lif` take them."""
        return {"decay": self.decay, "threshold": self.threshold}

    @torch.no_grad()
    def set_values(self, decay: Tensor, threshold: Tensor) -> None:
        """Start anew from these values, of one element or ``(N,)``.

        Raises:
            ValueError: A decay is not between 0 and 1, or a threshold not finite and above 0, in the parameters' dtype.
        """
        dtype = self.decay_logit.dtype
        logit, raw = _arguments(decay, threshold)
        _check_values(logit.to(dtype).sigmoid(), F.softplus(raw.to(dtype)))
        self.decay_logit.copy_(logit)
        self.threshold_raw.copy_(raw)

    def start(self, name: str) -> Tensor:
        """What a parameter started at, on the CPU."""
        return torch.full_like(self._parameters[name], self._start[name], device="cpu")  # type: ignore[arg-type]

    def fixed(self, spec: LIFSpec) -> LIFSpec | None:
        """The spec with the learned numbers in it; None where they differ by channel."""
        if self.decay_logit.numel() != 1:
            return None
        decay, threshold = self.decay.item(), self.threshold.item()
        names = ("surrogate", "width", "detach_reset", "reset")
        return LIFSpec(threshold=threshold, decay=decay, **{name: getattr(spec, name) for name in names})

    def _apply(self, fn: Any, recurse: bool = True) -> LearnedValues:
        """As for any module, but the parameters keep at least float32."""
        before = {name: parameter.detach() for name, parameter in self._parameters.items() if parameter is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            changed = self._parameters[name]
            if changed is not None and changed.dtype.itemsize < 4:
                changed.data = value.to(changed.device)
                if changed.grad is not None:
                    changed.grad = changed.grad.to(value.dtype)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, parameter in self._parameters.items():
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and parameter is not None and given.shape == (1,):
                state_dict[prefix + name] = given.repeat(len(parameter))  # of a layer, into one a channel
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """How many of each."""
        return f"{self.decay_logit.numel()}"


def make_learned(
    learnable: str | None,
    spec: LIFSpec,
    channels: int | None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LearnedValues | None:
    """The parameters of a layer of neurons; None where nothing is learned.

    Args:
        learnable: None, ``layer`` (one decay and threshold) or ``channel`` (one of each a channel).
        spec: Where they start.
        channels: Number of channels, needed for ``channel``.
        device: Device of the parameters.
        dtype: See `LearnedValues`.

    Raises:
        ValueError: ``learnable`` is another, channels are missing, or the spec's decay is 0 or 1 or its neuron not
            ``lif``.
    """
    if learnable not in LEARNABLE:
        raise ValueError(f"expected learnable out of {LEARNABLE}, got {learnable!r}: choose one of these")
    if learnable is None:
        return None
    spec.refuse_others("learned decay and threshold")
    if learnable == "channel" and (not isinstance(channels, int) or isinstance(channels, bool) or channels < 1):
        raise ValueError(
            f"expected channels as an integer >= 1 with learnable='channel', got {channels!r}: give their number, the "
            "size of axis 2 of (T, B, C, ...)"
        )
    count = channels if learnable == "channel" else 1
    return LearnedValues(spec, count or 1, device=device, dtype=dtype)


def learned_values(layer: Any) -> dict[str, Tensor]:
    """Learned decay and threshold of a layer of neurons by name; empty where those of its spec hold."""
    learned = getattr(layer, "learned", None)
    return learned.named() if isinstance(learned, LearnedValues) else {}


def _arguments(decay: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The parameters whose values these are, in float64."""
    decay, threshold = decay.double(), threshold.double()
    return torch.logit(decay), threshold + torch.log(-torch.expm1(-threshold))


def _check_values(decay: Tensor, threshold: Tensor, near: LIFSpec | None = None) -> None:
    """Refuse values that no operator takes; ``near`` is the spec whose numbers they round."""
    told = "" if near is None else f" from the spec's decay {near.decay!r} and threshold {near.threshold!r}"
    if not bool(((decay > 0.0) & (decay < 1.0)).all()):
        raise ValueError(
            f"expected decays between 0 and 1 in {decay.dtype}, got {decay.flatten()[:8].tolist()}{told}: a sigmoid "
            "learns no more there, start at one such as 0.5"
        )
    wide = near is not None and not near.threshold <= torch.finfo(threshold.dtype).max
    if wide or not bool(((threshold > 0.0) & threshold.isfinite()).all()):
        raise ValueError(
            f"expected finite thresholds > 0 in {threshold.dtype}, got {threshold.flatten()[:8].tolist()}{told}: start "
            "at one such as 1.0"
        )


def fit_learned_values(network: nn.Module, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state_dict with learned neurons, fitted to a network without, or the other way round; with a line in the log.

    Args:
        network: The network that will load it.
        state_dict: In its names.

    Returns:
        The state_dict without what the network does not learn, with the network's own values where it has none (what
        they start at where the network is on the meta device), or with the mean over channels of decay and threshold
        where the network learns one a layer.
    """
    own: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, LearnedValues):
            values = module.state_dict().items()
            own |= {f"{name}.{key}": module.start(key) if value.is_meta else value for key, value in values}
    given = [name for name in state_dict if _IS_LEARNED.search(name)]
    if own and not given:
        _logger.warning("Kept decays and thresholds of %d layers as they were: the weights have none", len(own) // 2)
        return {**state_dict, **own}
    if given and not own:
        _logger.warning(
            "Left out the learned decays and thresholds of %d layers: create the network with neuron='plif' or "
            "'plif_channel' to use them",
            len(given) // 2,
        )
        return {name: value for name, value in state_dict.items() if name not in given}
    means: dict[str, Tensor] = {}
    for name in given:
        value, layer = state_dict[name], name.rpartition(".")[0]
        raw: Any = state_dict.get(f"{layer}.threshold_raw")
        if name.endswith("decay_logit") and name in own and own[name].shape == (1,) and _of_channels(value, raw):
            logit, raw = _arguments(value.double().sigmoid().mean(0, True), F.softplus(raw.double()).mean(0, True))
            means |= {name: logit.to(value.dtype), f"{layer}.threshold_raw": raw.to(value.dtype)}
    if means:
        _logger.warning(
            "Took the mean over the channels of the learned decays and thresholds of %d layers: create the network "
            "with neuron='plif_channel' to keep one a channel",
            len(means) // 2,
        )
    return {**state_dict, **means} if means else state_dict


def _of_channels(logit: Any, raw: Any) -> bool:
    return isinstance(logit, Tensor) and isinstance(raw, Tensor) and logit.dim() == 1 < len(logit) == len(raw)


def _argument(function: Callable[[Tensor], Tensor], near: float, value: float, dtype: torch.dtype) -> float:
    """The number next to ``near`` at which a rising function gives ``value`` best, to the bit where it can."""
    around = torch.tensor([near], dtype=dtype, device="cpu")
    candidates = [around]
    for end in (-torch.inf, torch.inf):
        step = around
        for _ in range(8):
            step = torch.nextafter(step, torch.full_like(step, end))
            candidates.append(step)
    tried = torch.cat(candidates)
    error = (function(tried).double() - value).abs()
    return float(tried[error.argmin()])
