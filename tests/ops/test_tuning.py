"""Tuned launch parameters: each one is stored where a launch looks for it, under a name that the kernel has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from gac_kernels import tuning

FOLDER = Path(tuning.__file__).parent
FILES = sorted((FOLDER / "configs").glob("*.json"))
# Kernels that know no T ask for their parameters with the constant 1.
WITHOUT_STEPS = {
    op for path in FOLDER.rglob("*.py") for op in re.findall(r'launch_config\("(\w+)", 1,', path.read_text())
}
BY_SHAPE = re.compile(r"\d+-\d+(:s2)?(@\d+x\d+)?(\+res(\+side)?)?")
CONVOLUTIONS = (
    "spike_conv",
    "conv_lif",
    *(f"eight_bit_{op}" for op in ("forward", "input_gradient", "weight_gradient")),
)
BY_SIZE = re.compile(r"[248]")
BY_SIZE_AND_STEPS = re.compile(r"[248](:\d+)?")


def assert_found(stored: dict[str, dict[str, dict[str, int]]]) -> None:
    for op, configs in stored.items():
        keys = BY_SHAPE if op.startswith(CONVOLUTIONS) else BY_SIZE_AND_STEPS
        for key, config in configs.items():
            assert (BY_SIZE if op in WITHOUT_STEPS else keys).fullmatch(key), f"no launch of {op} looks for {key}"
            assert config.keys() <= tuning.DEFAULTS[op].keys(), (
                f"{op} {key}: {config.keys() - tuning.DEFAULTS[op].keys()}"
            )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_stored_parameter_is_looked_for(path: Path) -> None:
    assert_found(json.loads(path.read_text()))


def test_what_no_launch_looks_for_is_seen() -> None:
    assert {"batch_stats", "count_spikes", "pad_frames"} <= WITHOUT_STEPS and FILES
    for stored in ({"batch_stats": {"2:4": {}}}, {"lif_fwd": {"bfloat16": {}}}, {"lif_fwd": {"2": {"BLOCKS": 1}}}):
        with pytest.raises(AssertionError):
            assert_found(stored)
