"""Checks of the model benchmark: a network is timed only if it computes the same as a plain loop over time.

A randomly initialised spiking network is chaotic: one rounding error in the first layer flips spikes, and a few flips
there change a tenth of the spikes in the last layer. So the whole network is compared in float64, where errors are too
small to flip spikes. The precision to be timed is compared part by part, each part on the same inputs on both sides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from gac_kernels import spike_conv_reference, use_backend

from ..inference.integer import SpikeConv
from ..inference.record import forward_hooks
from ..models.blocks import STAGES
from ..models.network import SpikingResNet
from ..runtime.dtypes import AUTOCAST, autocast
from .baselines import LEARNED, TimeMajorNet
from .ops import relative_error
from .steps import precision_settings

# In float64, norm(got - expected) / norm(expected) of the logits.
LOGITS_TOLERANCE = 1e-9
# Part by part against float32: share of spikes that differ; relative errors of membrane, encoder and gradients.
# A 16-bit convolution rounds to 2**-9 (2**-11 in float16) before the threshold, which flips about 1 % of the spikes:
# these tolerances only show a wrong equation. In float32 a few spikes in a million flip, which changes the output of a
# block's second convolution by a few thousandths.
TOLERANCES = {
    "float32": {"spikes": 1e-4, "values": 1e-2, "gradients": 3e-2},
    "tf32": {"spikes": 1e-2, "values": 1e-1, "gradients": 2e-1},
    "bfloat16": {"spikes": 3e-2, "values": 1.5e-1, "gradients": 4e-1},
    "float16": {"spikes": 1e-2, "values": 1e-1, "gradients": 2e-1},
}
# Training in 8 bits against its definition, which rounds at the same places in float32: kernels in 16 bits also round
# norms and sums. A definition that does not round at all is 5 % off in the membranes and 0.6 to 1.5 % of the spikes.
EIGHT_BIT = {"spikes": 5e-3, "values": 1e-2, "gradients": 1.5e-1}
EIGHT_BIT_TOLERANCES = TOLERANCES | {"bfloat16": EIGHT_BIT, "float16": EIGHT_BIT}
# A gradient that is the small sum of large terms, such as a gate's, may be further off, if it is for the plain loop in
# the same precision: up to so many times its error. One of the gate of gac_msresnet34 at 128x128 has 0.41 in bfloat16.
ROUNDING = 1.25


@torch.no_grad()
def prepare_weights(model: SpikingResNet, images: Tensor) -> None:
    """Initialise a new model in place so that all layers fire and an error in any of them shows.

    Batch-norm scales are drawn around the threshold, since a residual branch that starts at zero would hide its errors.
    The encoder's attention weights are enlarged: behind gates near 1/2 hardly a neuron fires. They stay small enough
    that no gate rounds to 1, where ``u > threshold`` here and ``u >= threshold`` in SpikingJelly would differ. Running
    statistics are set to those of ``images``.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.affine]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.75 * model.spec.threshold, 1.25 * model.spec.threshold)
        nn.init.normal_(norm.bias, std=0.1 * model.spec.threshold)
        norm.momentum = 1.0
    for name, parameter in model.named_parameters():
        if name.startswith("encoder.temporal."):
            nn.init.uniform_(parameter, 0.25, 0.75)
        elif name.startswith("encoder.spatial."):
            parameter.mul_(2.0)
    model.train()
    model(images)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum


def check_logits(network: nn.Module, reference: TimeMajorNet, images: Tensor) -> str:
    """Compare logits with the plain loop's in eval mode and float64; return "" if they agree, else the reason."""
    with torch.no_grad(), use_backend("eager"), precision_settings("float32", search=False):
        expected = copy.deepcopy(reference).double().eval()(images.double())
        got = copy.deepcopy(network).double().eval()(images.double())
    error = relative_error(got.double(), expected)
    if not error <= LOGITS_TOLERANCE:  # a NaN must not pass
        return f"logits in float64: relative error {error:.1e} > {LOGITS_TOLERANCE:.0e}"
    return ""


def call_part(part: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """What a part returns when it is called as a module."""
    return part(*inputs)


def check_parts(
    network: nn.Module,
    reference: TimeMajorNet,
    images: Tensor,
    precision: str,
    *,
    train: bool,
    call: Callable[[nn.Module, Sequence[Tensor]], Any] = call_part,
    block_tolerances: dict[str, float] | None = None,
) -> str:
    """Compare encoder and blocks with the plain loop's on the same inputs; return "" if they agree, else the reason.

    What a neuron learns has no counterpart in a loop with a fixed one: its gradient is left out.

    Args:
        network: Network with the reference's module names and parameters.
        reference: The plain loop; computed in float32.
        images: Images ``(B, C, H, W)``.
        precision: Precision of the network.
        train: Compare in training mode, gradients included.
        call: How to call a part of the network.
        block_tolerances: For blocks, in the place of those of the precision.
    """
    network, reference = copy.deepcopy(network).train(train), copy.deepcopy(reference).train(train)
    device, dtype = images.device, AUTOCAST[precision] or torch.float32
    for name, captured in inputs_of_parts(reference, images):
        inputs = [tensor.to(dtype) for tensor in captured]
        with precision_settings(precision, search=False), autocast(device, precision):
            got = _run_part(network.get_submodule(name), inputs, train, call)
        with precision_settings("float32", search=False):
            expected = _run_part(reference.get_submodule(name), [tensor.float() for tensor in inputs], train)
        got = {quantity: value for quantity, value in got.items() if not LEARNED.search(quantity)}
        if got.keys() != expected.keys():
            return f"{name}: has {sorted(got.keys() ^ expected.keys())} on one side only"
        for quantity, value in got.items():
            kind, right = quantity.partition(" ")[0], expected[quantity]
            differ = (value.float() != right).float().mean().item() if value.shape == right.shape else float("inf")
            error = differ if kind == "spikes" else relative_error(value, right)
            allowed = (block_tolerances if block_tolerances and name != "encoder" else TOLERANCES[precision])[kind]
            if not error <= allowed and kind == "gradients" and value.shape == right.shape:
                with precision_settings(precision, search=False), autocast(device, precision):
                    rounded = _run_part(reference.get_submodule(name), inputs, train)[quantity]
                allowed = max(allowed, ROUNDING * relative_error(rounded, right))
            if not error <= allowed:
                return f"{name}, {quantity}: error {error:.1e} > {allowed:.1e} in {precision}"
    return ""


# Neurons within this relative distance of the threshold may fire in float32 and not in float64: after many steps
# membranes are no longer exact (`timm_gac.inference.integer.current_grid`).
BAND = 1e-5


@torch.no_grad()
def check_integer(network: nn.Module, images: Tensor, precision: str) -> str:
    """Compare every integer convolution with float64 on its own inputs; return "" if they agree, else the reason.

    Every spike must be equal, except those of neurons whose float64 membrane comes within `BAND` of the threshold.
    """
    failures: list[str] = []

    def compare(name: str, module: SpikeConv, inputs: tuple[Tensor, ...], output: Any) -> None:
        residual = inputs[1] if len(inputs) > 1 else None
        current, expected = spike_conv_reference(
            inputs[0],
            weight=module.kernel,
            scale=module.scale,
            bias=module.bias,
            num_steps=module.num_steps,
            spec=module.spec,
            stride=module.stride,
            residual=residual,
            return_membrane=True,
            grid=module.grid,
        )
        membrane, spikes = output if isinstance(output, tuple) else (None, output)
        differ = (spikes != expected).unflatten(0, (module.num_steps, -1)).any(0)
        near = _near_threshold(current.unflatten(0, (module.num_steps, -1)), module.spec)
        if (differ & ~near).any():
            failures.append(f"{name}: {int((differ & ~near).sum())} neurons differ from float64")
        if membrane is not None:
            error = relative_error(membrane.double(), current)
            allowed = 2 * torch.finfo(membrane.dtype).eps
            if not error <= allowed:
                failures.append(f"{name}: relative error of the membrane {error:.1e} > {allowed:.0e}")

    layers = {name: module for name, module in network.named_modules() if isinstance(module, SpikeConv)}
    network.eval()
    arithmetic = precision_settings(precision, search=False)
    with forward_hooks(layers, compare), arithmetic, autocast(images.device, precision):
        network(images)
    return failures[0] if failures else "" if layers else "no integer convolution was found"


def _near_threshold(current: Tensor, spec: Any) -> Tensor:
    """Mask of the neurons that come within `BAND` of the threshold at any step, from float64 currents (T, ...)."""
    membrane, near = torch.zeros_like(current[0]), torch.zeros_like(current[0], dtype=torch.bool)
    for step in current:
        membrane = spec.decay * membrane + step
        near |= (membrane - spec.threshold).abs() <= BAND * spec.threshold
        fired = (membrane > spec.threshold).to(membrane.dtype)
        membrane = membrane - spec.threshold * fired if spec.soft_reset else membrane * (1.0 - fired)
    return near


def inputs_of_parts(reference: TimeMajorNet, images: Tensor) -> list[tuple[str, list[Tensor]]]:
    """Name and inputs of the encoder and every block in a forward pass of the reference."""
    captured: list[tuple[str, list[Tensor]]] = []

    def keep(name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        captured.append((name, [tensor.clone() for tensor in inputs]))

    parts = {
        name: module
        for name, module in reference.named_modules()
        if name == "encoder" or (name.split(".")[0] in STAGES and name.count(".") == 1)
    }
    with torch.no_grad(), precision_settings("float32", search=False), forward_hooks(parts, before=keep):
        reference(images)
    return captured


def _run_part(
    part: nn.Module,
    inputs: Sequence[Tensor],
    train: bool,
    call: Callable[[nn.Module, Sequence[Tensor]], Any] = call_part,
) -> dict[str, Tensor]:
    """Outputs of a part and, in training, its gradients, by kind and name."""
    leaves = [tensor.detach().requires_grad_(train) for tensor in inputs]
    with torch.set_grad_enabled(train):
        result = call(part, leaves)
    if isinstance(result, tuple):
        result = result[:2]  # without the packed spikes, which are the same spikes
        # A plain spiking block returns its spikes twice, in place of a membrane.
        outputs = list(result) if result[0] is not result[1] else [result[1]]
        names = ["values of the membrane", "spikes"][-len(outputs) :]
    else:
        outputs, names = [result.reshape(-1, *result.shape[-3:])], ["values"]
    found = {name: output.detach() for name, output in zip(names, outputs, strict=True)}
    if not train:
        return found
    generator = torch.Generator(outputs[0].device).manual_seed(0)
    upstream = [torch.randn(o.shape, generator=generator, device=o.device).to(o.dtype) for o in outputs]
    parameters = dict(part.named_parameters())
    targets = [*leaves, *parameters.values()]
    gradients = torch.autograd.grad(outputs, targets, upstream, allow_unused=True)
    labels = [*(f"gradients of input {i}" for i in range(len(leaves))), *(f"gradients of {n}" for n in parameters)]
    return found | {label: grad for label, grad in zip(labels, gradients, strict=True) if grad is not None}
