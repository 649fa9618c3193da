"""What measures a network in float32 does not let a GPU's convolutions use TensorFloat-32 meanwhile, and only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from timm_gac.analysis.coding import measure_coding
from timm_gac.analysis.gate import gate_statistics, weight_and_gradient
from timm_gac.analysis.inspect import inspect_network
from timm_gac.energy import measure_energy
from timm_gac.export import report
from timm_gac.export.inductor import _CHILD
from timm_gac.hub.open import calibrate

IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MEASURES: dict[str, Callable[[Any], Any]] = {
    "inspect": lambda model: inspect_network(model, [IMAGES], "", ()),
    "energy": lambda model: measure_energy(model, [IMAGES]),
    "gate": lambda model: gate_statistics(model, [IMAGES]),
    "gate's gradients": lambda model: weight_and_gradient(model, IMAGES, torch.tensor([0, 1])),
    "coding": lambda model: measure_coding(model, [IMAGES]),
    "calibration": lambda model: calibrate(model, [IMAGES]),
    "export": lambda model: report.compare(Path("file"), "", model, IMAGES, model, None),
}


@pytest.fixture
def allowed() -> Iterator[Any]:
    """TensorFloat-32 as PyTorch allows it where nobody asks; cuDNN's setting."""
    torch.backends.cudnn.allow_tf32 = True
    yield torch.backends.cudnn.conv
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("name", MEASURES)
def test_float32_is_float32_within(name: str, allowed: Any) -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=3, num_steps=2).eval()
    seen = []
    model.conv1.register_forward_hook(lambda *_: seen.append(allowed.fp32_precision))
    MEASURES[name](model)
    assert seen and "tf32" not in seen
    assert allowed.fp32_precision == "tf32"


def test_a_compiled_package_is_compared_in_float32_too(allowed: Any) -> None:
    """In the process of its own, whose code begins with this."""
    setting = next(line for line in _CHILD.splitlines() if "tf32" in line)
    exec(setting)
    assert allowed.fp32_precision != "tf32"
