"""The recorder of neurons: finds a network's neuron layers and registers hooks on them, for all tools that look inside.

Hooks see the modules' real inputs and outputs: a kernel that computes several modules at once is not used while one of
them has hooks. They do not see into a compiled network or a CUDA graph's replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gac_kernels import LIFSpec
from gac_kernels.reference import of_channels

from ..layers.encoder import GatedAttentionCoding
from ..layers.neuron_layer import NeuronLayer

After = Callable[[str, Any, tuple[Any, ...], Any], None]  # name, module, inputs, output
Before = Callable[[str, Any, tuple[Any, ...]], None]  # name, module, inputs


def neuron_layers(model: nn.Module, also: tuple[type[nn.Module], ...] = ()) -> dict[str, Any]:
    """A network's neuron layers, modules that are a `NeuronLayer`, by name and in the order of its modules.

    A layer that is shared is listed once, under its first name. Parts of a layer are not listed: of a batch norm with
    a neuron in it, the norm stands for both.

    Args:
        model: Any network.
        also: Classes of modules to list beside neurons, such as `DirectCoding`.
    """
    layers: dict[str, Any] = {}
    seen: set[nn.Module] = set()

    def visit(name: str, module: nn.Module) -> None:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, (NeuronLayer, *also)):
            layers[name] = module
            return  # its parts are not marked as seen: one of them may be a layer of its own elsewhere
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    visit("", model)
    return layers


@contextmanager
def forward_hooks(
    modules: Mapping[str, nn.Module], after: After | None = None, before: Before | None = None
) -> Iterator[None]:
    """Call functions at every call of some modules, within ``with``; the hooks are removed whatever happens.

    Calls in other threads do not count, so several threads may record one network.

    Args:
        modules: By name. One that has several names is called by the first of them.
        after: Called with name, module, inputs and output after a module has run.
        before: Called with name, module and inputs before it runs.
    """
    first_names: dict[nn.Module, str] = {}
    for name, module in modules.items():
        first_names.setdefault(module, name)
    with ExitStack() as stack:
        for module, name in first_names.items():
            if before is not None:
                stack.callback(_hook_before(name, module, before).remove)
            if after is not None:
                stack.callback(_hook_after(name, module, after).remove)
        yield


def _hook_before(name: str, module: nn.Module, before: Before) -> RemovableHandle:
    thread = get_ident()

    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:  # a result would replace the inputs
        if get_ident() == thread:
            before(name, layer, inputs)

    hook.by_design = True  # type: ignore[attr-defined]  # no line in the log says that a hook makes it slower
    return module.register_forward_pre_hook(hook)


def _hook_after(name: str, module: nn.Module, after: After) -> RemovableHandle:
    thread = get_ident()

    def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:  # a result would replace the output
        if get_ident() == thread:
            after(name, layer, inputs, output)

    hook.by_design = True  # type: ignore[attr-defined]
    return module.register_forward_hook(hook)


def gate_scores(encoder: nn.Module | None) -> dict[str, nn.Module]:
    """The modules that score an encoder's gate: ``temporal`` and ``spatial``; none where it has no gate."""
    if not isinstance(encoder, GatedAttentionCoding):
        return {}
    return {"temporal": encoder.temporal, "spatial": encoder.spatial}


@dataclass
class Recording:
    """What `record_spikes` keeps of the last forward pass.

    Attributes:
        spikes: Of each neuron layer, time-folded ``(T*B, C, H, W)``, floating-point, in the order in which the layers
            first ran. Those of a gated encoder, named ``encoder``, are real values in [0, 1).
        scores: Of the encoder's gate before the sigmoid: ``temporal`` ``(B, T)`` and ``spatial`` ``(B, C, H, W)``, or
            ``(T*B, C, H, W)`` of event frames; empty with direct coding.
    """

    spikes: dict[str, Tensor] = field(default_factory=dict)
    scores: dict[str, Tensor] = field(default_factory=dict)

    @property
    def gate(self) -> Tensor | None:
        """The gate ``sigmoid(m[t] n[t])``, ``(B, T, C, H, W)``; None with direct coding."""
        if not self.scores:
            return None
        temporal, spatial = self.scores["temporal"], self.scores["spatial"]
        frames = spatial.unflatten(0, (-1, len(temporal))).transpose(0, 1)  # [B, 1 or T, C, H, W]
        return (temporal[:, :, None, None, None] * frames).sigmoid()


@contextmanager
def record_spikes(model: Any) -> Iterator[Recording]:
    """Keep what all neurons of a network emit and what its gate does, within ``with``.

    Args:
        model: A network of this package or with neuron layers of one's own; batch norms folded or not, quantised too.

    Examples:
        >>> import timm, timm_gac, torch
        >>> model = timm.create_model("test_gac_msresnet").eval()
        >>> with record_spikes(model) as recording, torch.no_grad():
        ...     logits = model(torch.zeros(1, 3, 16, 16))
        >>> list(recording.spikes)[:3]
        ['encoder', 'lif', 'layer1.0.bn1']
    """
    recording = Recording()

    def keep_spikes(name: str, layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
        spikes = layer.output_spikes(output)
        recording.spikes[name] = spikes if spikes.is_floating_point() else spikes.float()  # int8 of integer networks

    def keep_score(name: str, module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        recording.scores[name] = output

    scores = gate_scores(getattr(model, "encoder", None))
    with forward_hooks(neuron_layers(model), keep_spikes), forward_hooks(scores, keep_score):
        yield recording


@torch.no_grad()
def membrane_of(current: Tensor, spec: LIFSpec, scaled: bool = False, **learned: Tensor) -> Tensor:
    """Membrane potentials before the reset, which meet the threshold; in the shape of the current, ``(T, ...)``.

    Args:
        current: What the neurons integrate.
        spec: Of the neurons.
        scaled: In units of the threshold.
        learned: Decay and threshold in the place of the spec's, see `learned_values`.

    Raises:
        ValueError: The spec's neuron is not ``lif``.
    """
    spec.refuse_others("potentials against one threshold")
    decay, threshold = (
        of_channels(learned.get(name, getattr(spec, name)), current[0]) for name in ("decay", "threshold")
    )
    v = torch.zeros_like(current[0])
    potentials = []
    for x in current:
        u = decay * v + x
        potentials.append(u)
        fired = u > threshold
        v = torch.where(fired, u - threshold if spec.soft_reset else torch.zeros_like(u), u)
    stacked = torch.stack(potentials)
    return stacked / threshold if scaled else stacked
