"""What neurons learned, drawn and in a table: each value, their spread, nothing where nothing was learned."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import timm
import torch

import timm_gac
from gac_kernels import CIFAR, LIFSpec
from timm_gac import cli
from timm_gac.analysis.inspect import Inspection, inspect_network, write_inspection
from timm_gac.analysis.inspect.neurons import COLUMNS, _place, draw_neurons, has_learned, neuron_rows
from timm_gac.hub import calibrate, save_model_folder
from timm_gac.inference.record import neuron_layers
from timm_gac.layers.learned import LearnedValues


def network(neuron: str, name: str = "test_gac_msresnet", learn: bool = True, **kwargs):
    """A network whose neurons have learned something else in each layer and channel, and images for it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, neuron=neuron, **kwargs)
    for module in model.modules():
        if isinstance(module, LearnedValues) and learn:
            for parameter in module.parameters():
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
    images = torch.randn(2, 3, 16, 16)
    return calibrate(model, [images]), images


def inspected(*args, **kwargs) -> Inspection:
    model, images = network(*args, **kwargs)
    return inspect_network(model, [images])


def read(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("neuron", ["plif", "plif_channel"])
def test_table_has_every_value_of_the_network(neuron: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    model, images = network(neuron)
    files = write_inspection(inspect_network(model, [images]), tmp_path)
    assert {tmp_path / "neurons.png", tmp_path / "neurons.csv"} <= set(files)
    assert "Decay and threshold by layer" in (tmp_path / "index.html").read_text()
    rows = read(tmp_path / "neurons.csv")
    assert tuple(rows[0]) == COLUMNS
    numbers = {layer["name"]: layer for layer in json.loads((tmp_path / "inspect.json").read_text())["layers"]}
    layers = neuron_layers(model)
    assert list(dict.fromkeys(row["layer"] for row in rows)) == list(layers) == list(numbers)
    for name, layer in layers.items():
        mine = [row for row in rows if row["layer"] == name]
        channels = [str(index) for index in range(len(mine))] if neuron == "plif_channel" else [""]
        assert [row["channel"] for row in mine] == channels
        for parameter in ("decay", "threshold"):
            learned = getattr(layer.learned, parameter)
            assert [float(row[parameter]) for row in mine] == pytest.approx(learned.tolist(), rel=1e-5)  # 6 digits
            assert {float(row[f"initial_{parameter}"]) for row in mine} == {getattr(CIFAR, parameter)}
            assert numbers[name][parameter] == pytest.approx(learned.mean().item())
    assert sum(row["layer"] == "layer3.0.bn1" for row in rows) == (1 if neuron == "plif" else numbers[name]["channels"])


def test_picture_of_layers_has_a_dot_at_each_value() -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    inspection = inspected("plif", spec=LIFSpec(threshold=0.8, decay=0.3))
    axes = draw_neurons(inspection).axes
    assert [axis.get_title() for axis in axes] == ["decay", "threshold"]
    names = [layer.name for layer in inspection.layers]
    assert [label.get_text() for label in axes[0].get_yticklabels()] == names
    for axis, parameter, initial in zip(axes, ("decay", "threshold"), (0.3, 0.8), strict=True):
        values = [getattr(layer, parameter) for layer in inspection.layers]
        dots = [line for line in axis.lines if line.get_marker() == "o"]
        assert [float(dot.get_xdata()[0]) for dot in dots] == pytest.approx(values)
        assert [float(dot.get_ydata()[0]) for dot in dots] == list(axes[0].get_yticks())
        assert [text.get_text() for text in axis.texts] == [f"{value:.3f}" for value in values]
        (line,) = (patch for patch in axis.patches if patch.get_linestyle() == "--")
        assert set(line.get_data().values) == {initial}
        low, high = axis.get_xlim()
        assert low < min(*values, initial) and max(*values, initial) < high


def test_picture_of_channels_has_their_spread() -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    inspection = inspected("plif_channel")
    figure = draw_neurons(inspection)
    for axis, parameter in zip(figure.axes, ("decay", "threshold"), strict=True):
        boxes = [bars.patches[0] for bars in axis.containers]
        ranges, medians = axis.collections[0::2], axis.collections[1::2]
        for layer, box, line, median in zip(inspection.layers, boxes, ranges, medians, strict=True):
            values = getattr(layer.values, parameter).double()
            least, first, middle, third, most = values.quantile(torch.linspace(0, 1, 5).double()).tolist()
            assert [box.get_x(), box.get_x() + box.get_width()] == pytest.approx([first, third])
            assert line.get_segments()[0][:, 0].tolist() == pytest.approx([least, most])
            assert median.get_segments()[0][:, 0].tolist() == pytest.approx([middle, middle])
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["initial value", "all channels", "middle half", "median"]


def test_an_untrained_network_looks_as_if_nothing_had_been_learned() -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    for axis, initial in zip(draw_neurons(inspected("plif", learn=False)).axes, (0.5, 1.0), strict=True):
        assert axis.get_xlim() == pytest.approx((initial - 0.01, initial + 0.01))


@pytest.mark.parametrize("change", [timm_gac.fuse_for_inference, timm_gac.quantize], ids=["folded", "quantised"])
def test_folded_and_quantised_networks_keep_where_they_began(change) -> None:
    model, images = network("plif")
    before = inspect_network(model, [images])
    after = inspect_network(change(model), [images])
    assert has_learned(after) and len(after.layers) == len(before.layers)
    for old, new in zip(before.layers, after.layers, strict=True):
        assert new.values.initial == CIFAR
        assert new.decay == pytest.approx(old.decay, abs=1 / 512 + 1e-6)  # half of what 8 bits round decays to
        assert new.threshold == pytest.approx(old.threshold, abs=1e-4)


def test_nothing_is_drawn_where_nothing_was_learned(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    model, images = network("plif")
    write_inspection(inspect_network(model, [images]), tmp_path)
    assert (tmp_path / "neurons.png").exists() and (tmp_path / "neurons.csv").exists()
    spec = LIFSpec(threshold=0.37, decay=0.83)
    inspection = inspected("lif", spec=spec)
    files = write_inspection(inspection, tmp_path)  # those of the first network do not stay
    assert not any("neurons" in file.name for file in files) and not list(tmp_path.glob("neurons.*"))
    page = (tmp_path / "index.html").read_text()
    assert "Decay and threshold by layer" not in page and "codes directly" not in page
    inspections = [inspection]
    for change in (timm_gac.fuse_for_inference, timm_gac.quantize):
        model, images = network("lif", spec=spec)
        inspections.append(inspect_network(change(model), [images]))
    for inspection in inspections:
        assert not has_learned(inspection) and draw_neurons(inspection) is None
        assert {float(row["decay"]) for row in neuron_rows(inspection)} == {0.83}


def test_stages_stand_apart() -> None:
    rows, bands = _place(["encoder", "lif", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1"])
    assert rows == pytest.approx([0, 1, 2.6, 3.6, 5.2])
    assert len(bands) == 3 and all(low < high for low, high in bands)
    assert all(bands[index][1] < bands[index + 1][0] for index in range(2))


def test_command_draws_what_a_folder_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="draws with matplotlib")
    from PIL import Image

    picture = (torch.rand(16, 16, 3) * 255).to(torch.uint8).numpy()
    Image.fromarray(picture).save(tmp_path / "a.png")
    model, _ = network("plif")
    save_model_folder(model, tmp_path / "model")
    out = tmp_path / "page"
    assert cli.main(["inspect", str(tmp_path / "model"), str(tmp_path / "a.png"), "--out", str(out)]) == 0
    said = "".join(capsys.readouterr().out.split())
    assert "neurons.png" in said and "neurons.csv" in said
    decay = float(next(row["decay"] for row in read(out / "neurons.csv") if row["layer"] == "layer2.0.bn1"))
    assert decay == pytest.approx(model.layer2[0].bn1.lif.learned.decay.item(), rel=1e-5) and decay != 0.5
