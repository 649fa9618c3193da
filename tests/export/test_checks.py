"""What the writers of files refuse before the work, and files that fail their check: they do not appear."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_gac import CIFAR, LIF
from timm_gac.export import compile_package, export_program, graph_input, read_nir, write_nir, write_onnx, write_program
from timm_gac.export.report import compare
from timm_gac.hub import calibrate

WRITERS = {"a.onnx": write_onnx, "a.pt2": write_program, "a.nir": write_nir}


def images(batch: int, *frames: int) -> Tensor:
    return torch.randn(batch, *frames, 3, 16, 16, generator=torch.Generator().manual_seed(batch))


def network(**kwargs: object) -> nn.Module:
    """Two steps and one block: exporters take long."""
    arguments = dict(num_classes=7, num_steps=2, layers=(0, 1, 0)) | kwargs
    model = timm.create_model("test_gac_msresnet", **arguments)
    if arguments.get("device") != "meta":
        calibrate(model, [images(8)])
    return model.eval()


def not_finite() -> nn.Module:
    model = network()
    nn.init.constant_(model.fc.bias, float("nan"))
    return model


def made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return network()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DataParallel(network()), r"the network itself, got it inside DataParallel: give its \.module"),
        (lambda: torch.compile(network(), backend="eager"), r"got it inside OptimizedModule: give its \._orig_mod"),
        (lambda: "gac_msresnet18", "expected a spiking network of this package, got str"),
        (nn.Identity, "expected a spiking network of this package, got Identity"),
        (lambda: LIF(CIFAR, 4), "expected a spiking network of this package, got LIF"),
        (lambda: network(device="meta"), "got one on the device 'meta'"),
        (not_finite, r"expected finite weights to export, .* in fc\.bias"),
    ],
)
def test_what_is_no_network_is_one_sentence(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    model = make()
    for name, write in (WRITERS | {"b.pt2": compile_package}).items():
        with pytest.raises(ValueError, match=message):
            write(model, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_arguments_that_make_no_sense(tmp_path: Path) -> None:
    model = network()
    (tmp_path / "file").write_text("mine")
    for name, write in WRITERS.items():
        with pytest.raises(ValueError, match=r"expected images as a torch\.Tensor, got ndarray"):
            write(model, tmp_path / name, images=images(2).numpy())
        with pytest.raises(ValueError, match=rf"expected a folder for '{name}', got the file"):
            write(model, tmp_path / "file" / "folder" / name)
    for write in (write_onnx, write_program, compile_package):
        for count in (0, -1, 1.5, "2", True):
            with pytest.raises(ValueError, match=rf"expected batch_size as an integer >= 1, got {count!r}"):
                write(model, tmp_path / "b.pt2", batch_size=count)
        with pytest.raises(ValueError, match=r"expected frames .* with frames=True, got \(2, 3, 16, 16\)"):
            write(model, tmp_path / "b.pt2", images=images(2), frames=True)
    with pytest.raises(ValueError, match="expected batch_size as an integer"):
        export_program(model, images(2), batch_size=0)
    with pytest.raises(ValueError, match="expected an opset from 20 to 23, got 20"):
        write_onnx(model, tmp_path / "b.onnx", opset="20")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_be_run_does_not_appear(needs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("Unsupported model IR version: 11,\n max supported IR version: 9")

    model = network()
    (tmp_path / "b.pt2").write_text("mine")
    monkeypatch.setattr(needs("onnxruntime"), "InferenceSession", refuse)
    with pytest.raises(ValueError, match=r"ONNX Runtime .* refuses \(Unsupported .* version: 9\): install a newer"):
        write_onnx(model, tmp_path / "a.onnx", images=images(2))
    monkeypatch.setattr(torch.export, "load", refuse)
    with pytest.raises(RuntimeError, match="Unsupported"):
        write_program(model, tmp_path / "b.pt2", images=images(2), overwrite=True)
    monkeypatch.setattr("timm_gac.export.nir_write.read_nir", refuse)
    with pytest.raises(RuntimeError, match="Unsupported"):
        write_nir(model, tmp_path / "a.nir", images=images(2))
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"b.pt2": "mine"}


def test_a_file_computes_in_the_dtype_of_the_weights_under_autocast(needs, tmp_path: Path) -> None:
    needs("onnxruntime")
    model, x = network(), images(2)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        for name, write in WRITERS.items():
            report = write(model, tmp_path / name, images=x)
            assert report.flips == 0 and report.largest_difference < 1e-5, name
        currents = graph_input(model, x)
    assert torch.equal(torch.export.load(tmp_path / "a.pt2").module()(x), expected)
    logits = read_nir(tmp_path / "a.nir")(currents).mean(0).flatten(1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_nan_in_both_answers_is_no_difference_and_in_one_is() -> None:
    x = torch.tensor([[1.0, 2.0], [float("nan"), 0.0]])
    same = compare(Path("a"), "", nn.Identity(), x, torch.clone, None)
    assert same.largest_difference == 0 and same.flips == 0
    other = compare(Path("a"), "", nn.Identity(), x, torch.nan_to_num, None)
    assert other.largest_difference == float("inf")


def test_a_program_of_any_batch_size_is_traced_with_one_image(tmp_path: Path) -> None:
    model = network()
    program = export_program(model, images(1)).module()
    for count in (1, 3):
        assert torch.equal(program(images(count)), model(images(count)))
    fixed = export_program(model, images(4), batch_size=2).module()
    assert torch.equal(fixed(images(2)), model(images(2)))
    with pytest.raises(ValueError, match=r"made in torch\.inference_mode"):
        export_program(made_in_inference_mode(), images(2))


def test_what_nir_cannot_hold_has_a_way_out_and_averages_of_any_name_are_held(tmp_path: Path) -> None:
    for changes in ({"neuron": "ternary"}, {"neuron": "plif_channel"}, {"global_pool": "max"}):
        with pytest.raises(ValueError, match="export to ONNX"):
            write_nir(network(**changes), tmp_path / "a.nir", images=images(2))
    assert not list(tmp_path.iterdir())
    assert write_nir(network(global_pool="fastavg"), tmp_path / "a.nir", images=images(2)).flips == 0
