"""A trained-looking tiny model folder, and a Hub on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi, constants

from loopback import WRITE_TOKEN, LoopbackHub, loopback_hub
from timm_gac.hub import save_model_folder


@pytest.fixture(scope="session")
def make_folder() -> Callable[..., Path]:
    """Writes a tiny network whose statistics fit its golden images, so that its neurons fire."""

    def make(folder: Path, num_classes: int = 3) -> Path:
        torch.manual_seed(0)
        model = timm.create_model("test_gac_msresnet", num_classes=num_classes, num_steps=2)
        with torch.no_grad():
            for _ in range(20):
                model(torch.randn(8, 3, 32, 32) * 1.2)
        return save_model_folder(model.eval(), folder)

    return make


@pytest.fixture(scope="session")
def model_folder(make_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a network of three classes; not to be changed."""
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """The server; the client's retries do not wait."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with loopback_hub() as server:
        # Clients before 2.0 read addresses by these alone, whatever endpoint an HfApi has.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    """A client of that server which may write."""
    return HfApi(endpoint=hub.url, token=WRITE_TOKEN)
