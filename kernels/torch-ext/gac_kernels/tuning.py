"""Launch parameters as data: a deterministic default, and one reviewed JSON file for each device that has been tuned.

``configs/<device name>.json`` maps an op to ``{"<bytes per element>": {"BLOCK": ..., "num_warps": ...}}``; a key
``"<bytes>:<T>"`` is more specific and wins. Nothing is tuned at run time: a search on the training path would stall the
first step and could choose differently on each rank.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

DEFAULTS: dict[str, dict[str, int]] = {
    "lif_fwd": {"BLOCK": 1024, "num_warps": 4},
    "lif_bwd": {"BLOCK": 512, "num_warps": 4},
    "lif_bwd_mask": {"BLOCK": 1024, "num_warps": 4},
    "lif_learned_fwd": {"TILE": 1024, "BLOCK_C": 128, "num_warps": 4, "REVERSE": 0},
    "lif_learned_bwd": {"TILE": 512, "BLOCK_C": 128, "num_warps": 4, "STAGES": 1, "REVERSE": 0},
    "gac_fwd": {"BLOCK": 1024, "num_warps": 4},
    "gac_bwd": {"BLOCK": 128, "num_warps": 1, "TILES": 4},
    "gac_fire_fwd": {"BLOCK": 1024, "num_warps": 4},
    "gac_fire_bwd": {"BLOCK": 128, "num_warps": 1},
    "pad_frames": {"BLOCK": 1024, "num_warps": 4},
    "count_spikes": {"BLOCK": 1024, "num_warps": 4, "STAGES": 5},
    "firing_rate": {"BLOCK": 1024, "num_warps": 4},
    "pool_frames": {"BLOCK": 4096, "num_warps": 8},
    "unpack_spikes": {"BLOCK": 1024, "num_warps": 4},
    "spike_conv": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    "conv_lif_hopper": {"COPIES": 3, "STEPS": 1, "ONE_PASS": 0},
    "spike_conv_hopper": {"COPIES": 3, "STEPS": 1},
    "eight_bit_forward": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
    "eight_bit_input_gradient": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3},
    "eight_bit_input_gradient_s2": {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
    "eight_bit_forward_hopper": {"COPIES": 2, "STEPS": 1},
    "eight_bit_input_gradient_hopper": {"COPIES": 2, "STEPS": 1, "PROMOTE": 1},
    "eight_bit_weight_gradient": {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": 3},
}
# PER_SM: programs that fit at once. Without PROMOTE sums stay in tensor cores, 0.01 to 0.03 % off (see `conv_kernels`),
# while rounding a gradient to e4m3 costs 2.7 %; adding them up on the way takes half as long again.
# SPLITS: programs that share the sum of a tile; with 0 as many as make all programs fit at once.
DEFAULTS["eight_bit_weight_gradient"] |= {"PER_SM": 2, "PROMOTE": 0, "SPLITS": 0}
DEFAULTS["eight_bit_weight_gradient_pairs"] = {"BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
DEFAULTS["eight_bit_weight_gradient_pairs"] |= {"PAIRS": 1, "PER_SM": 1, "PROMOTE": 0}
# REVERSE: each kernel walks against the one before it, convolution > statistics > forward, convolution > reduce >
# apply, since the L2 cache holds what was touched last. Without statistics in between, forward walks the other way.
# PER_SM: as many programs as registers allow at once, since one more would wait for all others; a key with T wins. REGS
# are so many that this holds whatever the neuron: 80 of a thread are 6 programs of 128 threads, 64 are 8.
DEFAULTS |= {
    "batch_stats": {"TILE": 4096, "BLOCK_C": 128, "num_warps": 8, "PER_SM": 4, "STAGES": 1, "REVERSE": 1},
    "norm_lif_fwd_eval": {"TILE": 4096, "BLOCK_C": 128, "num_warps": 8, "REVERSE": 1},
    "eight_bit_bytes": {"BLOCK_B": 32, "BLOCK_C": 128, "num_warps": 8, "PIXELS_FIRST": 0},
    "eight_bit_norm_fwd": {"BLOCK_B": 16, "BLOCK_C": 128, "num_warps": 8, "PIXELS_FIRST": 0},
    "eight_bit_norm_bwd_apply": {"BLOCK_B": 16, "BLOCK_C": 128, "num_warps": 8, "PIXELS_FIRST": 0},
}
DEFAULTS["lif_learned_bwd"] |= {"PER_SM": 6, "REGS": 80}
DEFAULTS |= {f"lif_learned_bwd:{_steps}": {"PER_SM": 3, "REGS": 168} for _steps in range(5, 9)}  # twice the registers
# A sum with a shortcut, whose membrane is kept, and with a shortcut that has a norm of its own, take more registers.
for _kind, _per_sm in {"": 4, "_residual": 3, "_normed": 3}.items():
    _reduce = {"TILE": 1024, "BLOCK_C": 128, "num_warps": 4, "PER_SM": _per_sm, "STAGES": 1, "REVERSE": 1}
    DEFAULTS |= {
        f"norm_lif_fwd{_kind}": {"TILE": 4096, "BLOCK_C": 128, "num_warps": 8, "REVERSE": 0},
        f"norm_lif_bwd_reduce{_kind}": _reduce,
        f"norm_lif_bwd_apply{_kind}": {"TILE": 2048, "BLOCK_C": 128, "num_warps": 8, "REVERSE": 0},
    }
    for _steps in range(5, 9):
        DEFAULTS[f"norm_lif_bwd_reduce{_kind}:{_steps}"] = {"PER_SM": 2 if _steps > 6 or _kind == "_normed" else 3}


@functools.cache
def _device_configs(name: str) -> dict[str, dict[str, dict[str, int]]]:
    path = Path(__file__).parent / "configs" / f"{name.replace(' ', '_')}.json"
    return json.loads(path.read_text()) if path.exists() else {}


@functools.cache
def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def launch_config(op: str, num_steps: int, element_size: int, device: torch.device) -> dict[str, int]:
    """Launch parameters of ``op``.

    Args:
        op: Name of a kernel, a key of ``DEFAULTS``.
        num_steps: T.
        element_size: Bytes of an element of the main input.
        device: Where it will run.

    Returns:
        num_warps and BLOCK, for ``gac_bwd`` also TILES (blocks per program); for the batch-norm kernels num_warps, TILE
        (elements per tile), BLOCK_C (channels per tile) and, where a fixed number of programs shares the tiles, PER_SM
        (programs per multiprocessor), STAGES (tiles in flight) and, of some, REGS (most registers of a thread).
    """
    tuned = _device_configs(_device_name(device)).get(op, {})
    default = DEFAULTS[op] | DEFAULTS.get(f"{op}:{num_steps}", {})
    return default | tuned.get(str(element_size), {}) | tuned.get(f"{element_size}:{num_steps}", {})


@functools.cache
def shape_config(op: str, keys: tuple[str, ...], device: torch.device) -> dict[str, int]:
    """Launch parameters of an op whose best ones depend on its shape.

    Args:
        op: Name of a kernel, a key of ``DEFAULTS``.
        keys: Names of the shape in the JSON file, from the general to the particular; a later one wins.
        device: Where it will run.
    """
    tuned = _device_configs(_device_name(device)).get(op, {})
    return functools.reduce(lambda found, key: found | tuned.get(key, {}), keys, DEFAULTS[op])
