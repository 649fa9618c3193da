"""What runs of the trainer need: a set of images that a run is done with in seconds, and a process as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from timm_gac.train import Recipe


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 images of four classes that differ in brightness; the 17 to test on do not divide among processes."""
    rng = np.random.default_rng(0)
    labels = np.arange(64 + 17) % 4
    images = (rng.integers(0, 40, (len(labels), 3, 8, 8)) + labels[:, None, None, None] * 70).astype(np.uint8)
    file = tmp_path_factory.mktemp("toy") / "toy.npz"
    np.savez(file, x_train=images[:64], y_train=labels[:64], x_test=images[64:], y_test=labels[64:])
    return file


@pytest.fixture
def recipe(npz: Path) -> Recipe:
    """Four steps an epoch."""
    return Recipe(
        model="test_gac_msresnet",
        num_steps=1,
        data=str(npz),
        epochs=1,
        batch_size=16,
        warmup_epochs=0,
        crop_padding=1,
        eval_every=100,
    )


@pytest.fixture
def full_recipe(npz: Path) -> Recipe:
    """All that a run may have: warm-up, mixing and its end, a moving average, dropout, evaluations on the way."""
    return Recipe(
        model="test_gac_msresnet",
        num_steps=2,
        data=str(npz),
        dataset="toy",
        epochs=4,
        batch_size=16,
        lr=0.05,
        warmup_epochs=1,
        label_smoothing=0.1,
        cutmix=1.0,
        mix_probability=0.5,
        mix_off_epochs=2,
        ema_decay=0.9,
        report="ema",
        drop_rate=0.1,
        crop_padding=1,
        eval_every=2,
        stored_dtype="bfloat16",
    )


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state a process; each test has its own precision."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
