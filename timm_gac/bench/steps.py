"""One training or inference step of a network, and its time and memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..runtime.dtypes import AUTOCAST, autocast, float32_as
from ..runtime.graphs import GraphedStep
from .harness import Row, Timing

MODES = ("train", "infer")
Step = Callable[..., Tensor]


@contextmanager
def precision_settings(precision: str, *, search: bool = True) -> Iterator[None]:
    """Set switches: TensorFloat-32 for ``tf32`` only, and whether cuDNN searches for algorithms."""
    cudnn = torch.backends.cudnn
    before, cudnn.benchmark = cudnn.benchmark, search
    try:
        with float32_as("tf32" if precision == "tf32" else "ieee"):
            yield
    finally:
        cudnn.benchmark = before


def make_inputs(network: nn.Module, mode: str, images: Tensor, classes: int, copies: int) -> tuple[Tensor, ...]:
    """Inputs of a step: images, ``copies`` times the batch, and in training labels."""
    layout = torch.channels_last if is_channels_last(network) else torch.contiguous_format
    images = torch.cat([images] * copies).contiguous(memory_format=layout)
    if mode == "infer":
        return (images,)
    return images, torch.randint(classes, (len(images),), device=images.device)


def is_channels_last(network: nn.Module) -> bool:
    """Whether the network's 4D weights are stored channels-last."""
    weights = [weight for weight in network.parameters() if weight.ndim == 4 and min(weight.shape[1:3]) > 1]
    return bool(weights) and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def make_step(
    network: nn.Module,
    mode: str,
    precision: str,
    device: torch.device,
    *,
    compiled: bool,
    compile_options: dict[str, Any] | None = None,
    after_backward: Callable[[], None] | None = None,
) -> Step:
    """A step as a function of its inputs.

    A training step is forward, cross entropy, backward, ``after_backward()``, and fused SGD with momentum (float16 with
    a gradient scaler); it returns the loss. An inference step returns the logits. ``compile_options`` are Inductor's.
    """
    network.train(mode == "train")
    forward: Callable[[Tensor], Tensor] = network
    if compiled:
        forward = torch.compile(network, dynamic=False, options=compile_options)
    if mode == "infer":

        def infer(images: Tensor) -> Tensor:
            with torch.no_grad(), autocast(device, precision):
                return forward(images)

        return infer
    # So small a learning rate that weights, and with them firing rates, stay the same while the step is timed.
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=AUTOCAST[precision] == torch.float16)

    def train(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = F.cross_entropy(forward(images).float(), labels)
        scaler.scale(loss).backward()
        if after_backward is not None:
            after_backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    return train


def measure_step(
    step: Step, inputs: tuple[Tensor, ...], device: torch.device, *, graph: bool, steps: int, seconds: float = 10.0
) -> Row:
    """Time and memory of a step.

    A time is the wall-clock time of a block of steps, with a synchronisation at its end, divided by their number.
    Median and spread are over up to 10 blocks. Peak memory includes parameters, optimiser and inputs, but not the
    workspaces of cuDNN's search for algorithms, which is over by then.

    Args:
        step: Step to run.
        inputs: Its inputs.
        device: Device it runs on.
        graph: Replay it as one CUDA graph.
        steps: How many steps to time.
        seconds: Start no block after so many seconds, apart from the first three.

    Raises:
        ValueError: The step's result is not finite.
    """
    run, setup = warm_up(step, inputs, device, graph=graph)
    length, times = max(1, steps // 10), list[float]()
    started = time.perf_counter()
    while len(times) < min(10, steps) and (len(times) < 3 or time.perf_counter() - started < seconds):
        times.append(time_block(run, inputs, device, length))
    if not torch.isfinite(run(*inputs)).all():
        raise ValueError("expected a finite result of the step, got one that is not: its time would mean nothing")
    return {**asdict(Timing.of(times)), "steps_per_block": length, **setup}


def warm_up(step: Step, inputs: tuple[Tensor, ...], device: torch.device, *, graph: bool) -> tuple[Step, Row]:
    """Run a step until it is ready to be timed; return the function to time, and its peak memory and setup time."""
    on_cuda = device.type == "cuda"
    warmup = 4 if on_cuda else 1
    run: Step = GraphedStep(step, warmup) if graph else step
    started = time.perf_counter()
    for _ in range(warmup):
        run(*inputs)
    synchronize(device)
    if on_cuda:
        gc.collect()
        torch.cuda.reset_peak_memory_stats(device)
    run(*inputs)
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if on_cuda else None
    setup = time.perf_counter() - started
    for _ in range(3 if on_cuda else 0):
        run(*inputs)
    synchronize(device)
    return run, {"peak_gib": peak, "setup_s": setup}


def time_block(run: Step, inputs: tuple[Tensor, ...], device: torch.device, length: int) -> float:
    """Milliseconds per step, over a block of ``length`` steps."""
    begun = time.perf_counter()
    for _ in range(length):
        run(*inputs)
    synchronize(device)
    return 1e3 * (time.perf_counter() - begun) / length


def free_memory(device: torch.device) -> float:
    """Free caches and compiled code; return the GiB still allocated on the device."""
    torch._dynamo.reset()
    gc.collect()
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device) / 2**30


def synchronize(device: torch.device) -> None:
    """Wait for a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
