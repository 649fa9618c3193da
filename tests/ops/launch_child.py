"""Launch kernels on a pretended GPU by way of Triton and directly, and say as JSON what reached the GPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from compile_for_hopper import Hopper
from gac_kernels.common import launch as launch_module
from gac_kernels.norm import batch_stats, launch

calls: list[tuple[str, list[Any], bool]] = []  # kernel, arguments with addresses for tensors, whether Triton made it


class Launcher:
    """What Triton launches a kernel with."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = src.fn.__name__

    def __call__(self, *arguments: Any) -> None:
        place, rest = arguments[:6], arguments[9:]  # between them: Triton's launch metadata and hooks
        addresses = [x.data_ptr() if isinstance(x, Tensor) else fields(x) for x in rest]
        made_by_triton = any(isinstance(x, Tensor) for x in rest)
        calls.append((self.name, [str(x) for x in (*place[:4], *place[5:], *addresses)], made_by_triton))


def fields(x: Any) -> Any:
    """A tensor descriptor's, with an address for its tensor; anything else as it is."""
    return {**vars(x), "base": x.base.data_ptr()} if hasattr(x, "block_shape") else x


def pretend() -> None:
    """Let Triton find a GPU that is none, on which tensors of the CPU lie."""
    Hopper.launcher_cls = Launcher  # type: ignore[attr-defined]
    Hopper.utils = SimpleNamespace(  # type: ignore[attr-defined]
        load_binary=lambda *_: (object(), 1, 32, 0, 1024),
        unload_module=lambda _: None,
        get_device_properties=lambda _: {"max_shared_mem": 232448},
    )
    driver.set_active(Hopper())
    launch_module.DIRECT = True
    launch_module._current_device = lambda: None  # type: ignore[assignment]  # the index of torch.device("cpu")


def seen(function: Callable[[], Any]) -> list[tuple[str, list[Any], bool]]:
    calls.clear()
    function()
    return list(calls)


def both(function: Callable[[], Any]) -> dict[str, Any]:
    """The calls of a first and of a second run."""
    first, second = seen(function), seen(function)
    return {
        "kernels": [name for name, _, _ in first],
        "same": [a[:2] == b[:2] for a, b in zip(first, second, strict=True)],
        "by Triton": [[made for *_, made in run] for run in (first, second)],
    }


def tensor(dtype: torch.dtype, offset: int = 0) -> Tensor:
    """(T*B, C, H, W) channels-last, ``offset`` elements behind an aligned address."""
    memory = torch.zeros(4 * 8 * 4 * 4 + offset, dtype=dtype)[offset:]
    return memory.view(4, 4, 4, 8).permute(0, 3, 1, 2)


def vectors(count: int) -> list[Tensor]:
    return [torch.zeros(16, dtype=torch.float32)[:8] for _ in range(count)]


if __name__ == "__main__":
    pretend()
    shared = torch.zeros(4096)
    torch.empty = lambda *size, **_: shared[: size[0]]  # the same memory in each run
    number, neuron = torch.tensor(0), (1.0, 0.5, 0, 1.0, True, False)
    stats, none = vectors(4), (None,) * 4

    def statistics(x: Tensor) -> None:
        batch_stats._stats_triton(x, *stats, 0.1, number)

    x = tensor(torch.float32)
    empty, bits, y, gx, ga = x.new_zeros(0), x.new_zeros(0, dtype=torch.uint8), *(torch.zeros_like(x) for _ in range(3))
    weights = vectors(4)
    norms = {"plain": none, "normed": (*weights[2:], *stats[2:])}

    def forward(norm: str) -> None:
        residual = None if norm == "plain" else y
        launch.forward_triton(
            x, residual, (*weights[:2], *stats[:2]), norms[norm], 1e-5, 1e-3, 2, neuron, True, gx, empty, bits
        )

    def backward(norm: str) -> None:
        residual, at = (None, empty) if norm == "plain" else (y, ga)
        affine = (*weights[:2], *stats[:2])
        given = (y, None, x, residual, None, affine, norms[norm], None, 1e-5, 1e-3, 2, neuron, True)
        launch.backward_triton(
            *given, at, gx, *vectors(2), *(vectors(2) if residual is not None else (empty, empty)), ""
        )

    results = {"statistics": both(lambda: statistics(x))}
    for norm in norms:
        results[f"forward {norm}"] = both(lambda norm=norm: forward(norm))
    gradients = vectors(4)
    vectors = lambda count: gradients[:count]  # noqa: E731 (the same addresses in each run)
    for norm in norms:
        results[f"backward {norm}"] = both(lambda norm=norm: backward(norm))
    shifted = tensor(torch.float32, 1)
    results["another dtype"] = both(lambda: statistics(tensor(torch.bfloat16)))
    results["unaligned"] = both(lambda: statistics(shifted))
    results["aligned again"] = both(lambda: statistics(x))
    watch = lambda _: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(watch)
    results["watched"] = both(lambda: statistics(x))
    knobs.runtime.launch_enter_hook.remove(watch)
    results["unwatched"] = both(lambda: statistics(x))
    launch_module._current_device = lambda: 1
    results["another device is current"] = both(lambda: statistics(x))
    sys.stdout.write(json.dumps(results))
