"""The demonstration Space: what it computes and draws, what it says of a bad file, and clicks in a real browser."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from timm_gac.cli.sources import open_pictures
from timm_gac.hub import save_model_folder
from timm_gac.layers.neuron import BatchNormLIF

pytest.importorskip("matplotlib", reason="the Space draws with matplotlib")
SPACE = Path(__file__).resolve().parents[2] / "hub" / "space"


@pytest.fixture(scope="module", autouse=True)
def on_path() -> Iterator[None]:
    """The Space's modules import each other by their plain names."""
    sys.path.insert(0, str(SPACE))
    yield
    sys.path.remove(str(SPACE))


def make_folder(name: str, folder: Path, in_chans: int = 3) -> Path:
    """A tiny network whose neurons fire."""
    torch.manual_seed(0)
    overlay = {"input_size": (in_chans, 16, 16), "mean": (0.5,) * in_chans, "std": (0.5,) * in_chans}
    options: dict[str, Any] = {"pretrained_cfg_overlay": overlay, "num_classes": 3, "num_steps": 4}
    small = {} if name.startswith("test_") else {"layers": (1, 0, 1), "channels": (8, 8, 8), "stem_width": 8}
    model = timm.create_model(name, in_chans=in_chans, **options, **small)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BatchNormLIF):
                module.bias.fill_(0.5)  # half the threshold: currents then reach it on any seed
        for _ in range(20):
            model(2 * torch.randn(8, in_chans, 16, 16))
    return save_model_folder(model.eval(), folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder("test_gac_msresnet", tmp_path_factory.mktemp("space") / "colour")


@pytest.fixture(scope="module")
def analysis(on_path: None) -> ModuleType:
    return importlib.import_module("analysis")


@pytest.fixture(scope="module")
def figures(on_path: None) -> ModuleType:
    return importlib.import_module("figures")


@pytest.fixture(scope="module")
def network(analysis: ModuleType, folder: Path) -> Any:
    return analysis.Network(folder)


def picture(seed: int = 0, size: tuple[int, int] = (40, 32)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def test_analysis_is_what_the_network_computes(network: Any) -> None:
    pixels = network.prepare(picture())
    result = network.analyse(pixels)
    assert pixels.shape == (1, 3, 16, 16)
    model = network.model
    with torch.no_grad():
        assert torch.equal(result.steps, model.forward_steps(pixels)[0])
        torch.testing.assert_close(result.probabilities[-1], model(pixels)[0].softmax(0))
        stem = model.bn1(model.conv1(pixels))
        coded = model.encoder(stem)[:, 0]
        scores = model.encoder.spatial(stem)[0]
        pooled = (stem.mean((1, 2, 3)).expand(4)[None], stem.amax((1, 2, 3)).expand(4)[None])
        gate = (model.encoder.temporal(*pooled)[0, :, None, None, None] * scores).sigmoid()
    torch.testing.assert_close(result.gate, gate.mean(1))
    assert coded.any() and torch.allclose(coded[coded != 0], gate[coded != 0], atol=1e-6)
    assert next(iter(result.spikes)) == "lif" and len(result.spikes) == 7
    for name, spikes in result.spikes.items():
        assert spikes.shape[0] == 4 and ((spikes == 0) | (spikes == 1)).all()
        assert result.rates[name] == pytest.approx(spikes.mean().item())
    assert result.rates["layer3.0.bn2"] > 0
    assert result.prepared.shape == (16, 16, 3) and 0 <= result.prepared.min() < result.prepared.max() <= 1


def test_an_ann_is_refused_before_a_picture_comes(analysis: ModuleType, tmp_path: Path) -> None:
    save_model_folder(timm.create_model("test_ann_resnet", num_classes=3), tmp_path / "ann")
    with pytest.raises(ValueError, match="expected a spiking network for a page that shows spikes, got test_ann"):
        analysis.Network(tmp_path / "ann")


def test_energy_is_the_count_by_hand(network: Any) -> None:
    result = network.analyse(network.prepare(picture()))
    layers = {layer.name: layer for layer in result.report.layers}
    assert (layers["conv1"].macs, layers["conv1"].runs) == (16 * 16 * 16 * 27, 1)
    assert (layers["layer2.0.conv2"].macs, layers["layer2.0.conv2"].runs) == (32 * 8 * 8 * 32 * 9, 4)
    assert layers["layer2.0.conv2"].binary and layers["layer2.0.conv2"].rate == pytest.approx(
        result.rates["layer2.0.bn1"]
    )
    strict = sum(
        layer.macs * layer.runs * (0.9 * layer.rate if layer.binary else 4.6) for layer in result.report.layers
    )
    dense = sum(4.6 * layer.macs for name, layer in layers.items() if "encoder" not in name)
    assert result.energy["strict"] == pytest.approx(strict / 1e6) and strict > 0
    assert result.energy["ann"] == pytest.approx(dense / 1e6)
    assert 0 < result.energy["paper"] < result.energy["strict"]


def test_visitors_at_once_get_the_figures_of_their_own_pictures(network: Any) -> None:
    pixels = [network.prepare(picture(seed)) for seed in range(8)]
    alone = [network.analyse(one).energy["strict"] for one in pixels]
    with ThreadPoolExecutor(8) as pool:
        together = [result.energy["strict"] for result in pool.map(network.analyse, pixels)]
    assert together == alone and len(set(alone)) > 1


def test_pictures_are_prepared_as_predict_does(network: Any, tmp_path: Path) -> None:
    picture(size=(47, 31)).save(tmp_path / "wide.png")
    ours = network.prepare(Image.open(tmp_path / "wide.png"))
    assert torch.equal(ours, open_pictures([tmp_path / "wide.png"], network.model))


def test_direct_coding_has_no_gate(analysis: ModuleType, figures: ModuleType, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("msresnet18_cifar", num_classes=3, num_steps=2)
    network = analysis.Network(save_model_folder(model.eval(), tmp_path / "direct"))
    result = network.analyse(network.prepare(picture()))
    assert result.gate is None and figures.gate(result) is None
    assert result.steps.shape == (2, 3)


def test_grey_networks_see_light_ink_whatever_the_paper(analysis: ModuleType, tmp_path: Path) -> None:
    network = analysis.Network(make_folder("test_gac_msresnet", tmp_path / "grey", in_chans=1))
    dark = Image.new("L", (64, 64), 255)
    dark.paste(0, (20, 10, 40, 50))
    light = Image.eval(dark, lambda value: 255 - value)
    torch.testing.assert_close(network.prepare(dark), network.prepare(light), rtol=0, atol=0.02)
    assert network.prepare(dark)[0, 0, 8, 8] > 0.5 > -0.5 > network.prepare(dark)[0, 0, 0, 0]


def test_figures_follow_the_picture(network: Any, figures: ModuleType) -> None:
    first, second = (network.analyse(network.prepare(picture(seed))) for seed in (0, 1))
    fewer = dataclasses.replace(second.report, layers=second.report.layers[1:])
    second = dataclasses.replace(second, steps=10 * second.steps, report=fewer)  # enough to be seen
    for draw in (figures.gate, figures.raster, lambda result: figures.classes(result, network.labels), figures.energy):
        one, other = draw(first), draw(second)
        assert one.ndim == 3 and one.shape[2] == 3 and one.shape[1] == 768 and one.std() > 5
        assert one.shape != other.shape or (one != other).any()
        assert (draw(first) == one).all()
    text = figures.summary(first, network)
    best = network.labels[int(first.probabilities[-1].argmax())]
    assert text.startswith(f"**{best}** (") and "J" in text


def test_bad_files_get_a_sentence(analysis: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tmp_path / "good.png"
    picture().save(good)
    assert analysis.open_picture(good).size == (40, 32)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="This file is not a picture"):
        analysis.open_picture(tmp_path / "text.png")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged"):
        analysis.open_picture(tmp_path / "cut.png")
    monkeypatch.setattr(analysis, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="40 x 32 pixels"):
        analysis.open_picture(good)
    monkeypatch.setattr(analysis, "MAX_FILE_BYTES", 100)
    with pytest.raises(ValueError, match="at most 0 MB"):
        analysis.open_picture(good)


@pytest.fixture(scope="module")
def app(on_path: None) -> ModuleType:
    pytest.importorskip("gradio", reason="the Space's page needs gradio")
    return importlib.import_module("app")


class TestPage:
    """With Gradio, and in headless Chromium where there is one."""

    def test_model_is_chosen_and_described(
        self, app: ModuleType, network: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(app, "MODELS", tmp_path / "models")
        monkeypatch.setattr(app, "DEMO", tmp_path / "demo")
        monkeypatch.delenv("SPACE_ID", raising=False)
        with pytest.raises(ValueError, match="run `make demo` first"):
            app.choose_models(None)
        assert app.choose_models("org/name") == ["org/name"]
        shutil.copytree(folder, tmp_path / "demo")
        assert app.choose_models(None) == [str(tmp_path / "demo")]
        monkeypatch.setenv("SPACE_ID", "org/space")
        assert app.choose_models(None) == [f"timm-gac/{name}" for name in app.PUBLISHED]
        for name in ("another", *reversed(app.PUBLISHED)):
            shutil.copytree(folder, tmp_path / "models" / name)
        wanted = [str(tmp_path / "models" / name) for name in (*app.PUBLISHED, "another")]
        assert app.choose_models(None) == wanted
        assert list(app.open_networks(wanted)) == ["gated attention coding", app.PUBLISHED[1], "another"]
        assert "T = 4" in app.describe(network) and "16x16" in app.describe(network)

    def test_real_clicks_and_uploads(self, app: ModuleType, folder: Path, tmp_path: Path) -> None:
        sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright and a Chromium")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if chromium is None:
            pytest.skip("needs a Chromium")
        pytest.importorskip("sklearn", reason="the pictures to pick are scikit-learn's")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, str(SPACE / "app.py"), "--model", str(folder), "--port", str(port)]
        variables = {**os.environ, "HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
        server = subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL)
        try:
            wait_for(f"http://127.0.0.1:{port}/")
            with sync_api.sync_playwright() as playwright:
                browser = playwright.chromium.launch(
                    executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
                )
                for width in (390, 1280):
                    visit(browser.new_page(viewport={"width": width, "height": 844}), port, width, tmp_path)
                browser.close()
        finally:
            server.terminate()
            server.wait()


def wait_for(url: str, seconds: float = 60) -> None:
    """Until a server answers."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert time.monotonic() < deadline, f"no answer from {url}"
            time.sleep(0.3)


def visit(page: Any, port: int, width: int, scratch: Path) -> None:
    """Look, pick, upload, upload rubbish; nothing is wider than the window and nothing is asked of another host."""
    foreign: list[str] = []
    own = (f"http://127.0.0.1:{port}", "data:", "blob:", "ws:")
    page.on("request", lambda request: None if request.url.startswith(own) else foreign.append(request.url))
    page.goto(f"http://127.0.0.1:{port}")
    page.wait_for_selector("#energy img")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    before = page.get_attribute("#gate img", "src")
    page.click("#examples .thumbnail-item >> nth=1")
    page.wait_for_function("old => document.querySelector('#gate img').src !== old", arg=before)
    before = page.get_attribute("#gate img", "src")
    picture(3).save(scratch / "photo.png")
    page.set_input_files("input[type=file]", str(scratch / "photo.png"))
    page.wait_for_function("old => document.querySelector('#gate img').src !== old", arg=before)
    assert "time steps" in page.inner_text("#summary")
    (scratch / "rubbish.png").write_bytes(b"no picture")
    page.set_input_files("input[type=file]", str(scratch / "rubbish.png"))
    page.wait_for_selector("#summary >> text=This file is not a picture")
    assert page.locator("#gate img").count() == 1
    assert foreign == []
