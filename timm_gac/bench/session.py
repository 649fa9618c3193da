"""One case of the model benchmark: its networks with the same weights, their checks and their times."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch

from ..hub import load_model
from ..inference.integer import IntegerSpikingResNet
from ..inference.quantize import dequantize
from ..models.ann_resnet import refuse_ann
from ..models.network import SpikingResNet
from ..runtime.dtypes import AUTOCAST
from . import check as bench_check
from . import steps as bench_steps
from .baselines import LoopNeuron, TimeMajorNet
from .definition import check_training
from .harness import Row
from .networks import COMPILERS, NETWORKS, Unavailable, describe
from .profile import profile_step

CHECK_BATCH = 4


@dataclass(frozen=True)
class Case:
    """Settings shared by the providers that are compared with each other."""

    model: str
    mode: str
    precision: str
    num_steps: int
    batch: int
    image_size: int


def open_stored(case: Case) -> SpikingResNet:
    """The float network of a model folder; a quantised folder gives one with rounded weights.

    Raises:
        ValueError: The folder is damaged, or its network has another T than the case.
    """
    network: Any = load_model(Path(case.model))
    refuse_ann(network, "this benchmark, in which `ann` is a provider")
    if network.num_steps != case.num_steps:
        raise ValueError(
            f"expected num_steps={network.num_steps} as {case.model} has, got {case.num_steps}: give --num-steps"
        )
    floating: Any = dequantize(network) if isinstance(network, IntegerSpikingResNet) else network
    floating.train()
    return floating


class Session:
    """The networks of one case, all with the same weights, and the results of their checks.

    Args:
        case: What to build.
        device: Where it runs.
        steps: How many steps to time.
    """

    def __init__(self, case: Case, device: torch.device, steps: int) -> None:
        self.case, self.device, self.steps = case, device, steps
        stored = Path(case.model).is_dir()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            self.model: SpikingResNet = (
                open_stored(case) if stored else timm.create_model(case.model, num_steps=case.num_steps)
            )
            shape = (self.model.in_chans, case.image_size, case.image_size)
            self.check_images = torch.randn(CHECK_BATCH, *shape)
            if not stored:
                bench_check.prepare_weights(self.model, self.check_images)
            self.images = torch.randn(case.batch, *shape).to(self.device)
        self.failures: dict[str, str] = {}

    def build(self, network: str, model: SpikingResNet | None = None) -> torch.nn.Module:
        """A network of the session's or another model on the device.

        It is channels-last unless it is the published algorithm with its five axes.
        """
        built = NETWORKS[network](model or self.model, self.case.model, self.case.mode).to(self.device)
        return built if network == "published" else built.to(memory_format=torch.channels_last)

    def inputs(self, network: torch.nn.Module, copies: int = 1) -> tuple[torch.Tensor, ...]:
        """What a step of the case takes; see `make_inputs`."""
        return bench_steps.make_inputs(
            network=network,
            mode=self.case.mode,
            images=self.images,
            classes=self.model.num_classes,
            copies=copies,
        )

    def check(self, network: str) -> str:
        """Reason why the network must not be timed, "" if it may be. Each network is checked once."""
        if network not in self.failures:
            self.failures[network] = self._check(network)
        return self.failures[network]

    def _check(self, network: str) -> str:
        if network in ("convolutions", "ann"):  # lower bounds compute something else
            return ""
        # Folded, or with learned values, in float64, in which its logits are compared.
        wide = network in ("timm_gac_fused", "timm_gac_plif")
        model = copy.deepcopy(self.model).double() if wide else None
        built, images, train = self.build(network, model), self.check_images.to(self.device), self.case.mode == "train"
        if network == "timm_gac_int8":  # weights are rounded: compared with itself in float64
            return bench_check.check_integer(built, images, self.case.precision)
        reference = TimeMajorNet(self.model, LoopNeuron(self.model.spec)).to(self.device)
        reference = reference.to(memory_format=torch.channels_last)  # so that both sides call the same convolutions
        if network == "timm_gac_8bit":  # weights and gradients are rounded: compared with the definition of that
            return check_training(
                built, model=self.model, reference=reference, images=images, precision=self.case.precision
            )
        # SpikingJelly has no float64 kernels and is compared part by part only, with its memory optimiser or without.
        failure = "" if network.startswith("spikingjelly") else bench_check.check_logits(built, reference, images)
        if network in ("published", "timm_gac_fused"):  # they have other modules
            return failure
        built = self.build(network) if network == "timm_gac_plif" else built
        for precision in dict.fromkeys(("float32", self.case.precision)):
            failure = failure or bench_check.check_parts(built, reference, images, precision, train=train)
        return failure

    def measure(self, provider: str) -> Row:
        """Check and time a provider; return these fields of its row."""
        network, *ways = provider.split("+")
        case, device = self.case, self.device
        if "graph" in provider and device.type != "cuda":
            raise Unavailable("CUDA graphs need a CUDA device")
        failure = self.check(network)
        if failure:
            return {"status": "failed check", "note": failure}
        left = bench_steps.free_memory(device) - self.images.nbytes / 2**30
        built = self.build(network)
        dtype = AUTOCAST[case.precision]
        if network == "timm_gac_fused" and dtype is not None:  # as a user deploys it: nothing is cast in the step
            built = built.to(dtype)
        copies = case.num_steps if network == "ann" else 1
        inputs = self.inputs(built, copies)
        layout = "channels_last" if bench_steps.is_channels_last(built) else "contiguous"
        with bench_steps.precision_settings(case.precision):
            step = bench_steps.make_step(
                built,
                case.mode,
                case.precision,
                device,
                compiled="compile" in provider,
                compile_options=next((COMPILERS[way] for way in ways if way in COMPILERS), None),
            )
            measured = bench_steps.measure_step(step, inputs, device, graph="graph" in provider, steps=self.steps)
        note = f"T passes: a batch of {copies}*{case.batch}" if copies > 1 else ""
        note += describe(network, compiled="compile" in provider)
        if device.type == "cuda" and left > 0.05:
            note += f" {left:.2f} GiB were held before"
        speed = 1e3 * case.batch / measured["median_ms"]
        return {"status": "ok", "images_per_s": speed, "memory_format": layout, "note": note.strip(), **measured}

    def profile(self) -> Row:
        """Profile a step of ``timm_gac``; see `profile_step`."""
        built = self.build("timm_gac")
        inputs = self.inputs(built)
        with bench_steps.precision_settings(self.case.precision):
            step = bench_steps.make_step(built, self.case.mode, self.case.precision, self.device, compiled=False)
            for _ in range(3):
                step(*inputs)
            return profile_step(step, inputs, self.device)
