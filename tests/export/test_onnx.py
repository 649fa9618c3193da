"""ONNX files: what ONNX Runtime computes from them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

import timm_gac.export
from export_networks import T, images, network, small_network
from gac_kernels.decompositions import decomposition_table, registered_decompositions
from timm_gac import quantize
from timm_gac.export import write_onnx


def run_onnx(needs, path: Path, x: Tensor) -> list[Tensor]:
    session = needs("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return [torch.from_numpy(y) for y in session.run(None, {given.name: x.numpy()})]


def nodes(needs, path: Path) -> Counter[str]:
    model = needs("onnx").load(path)
    assert {opset.domain for opset in model.opset_import} <= {""} and not model.functions
    return Counter(node.op_type for node in model.graph.node)


@torch.no_grad()
def test_onnx_runtime_answers_as_the_network(needs, tmp_path: Path) -> None:
    model, path = network(), tmp_path / "a.onnx"
    report = write_onnx(model, path, images=images(4), label_names=("ant", "bee"))
    assert report.flips == 0 and report.largest_difference < 1e-5 and report.images == 4
    assert "BatchNormalization" not in nodes(needs, path)  # folded into the convolutions
    for batch in (1, 5):
        (found,) = run_onnx(needs, path, images(batch))
        torch.testing.assert_close(found, model(images(batch)), rtol=0, atol=1e-5)
    about = {entry.key: entry.value for entry in needs("onnx").load(path).metadata_props}
    assert about["architecture"] == "test_gac_msresnet" and json.loads(about["label_names"]) == ["ant", "bee"]


@torch.no_grad()
def test_float64_frames_and_steps_in_onnx_runtime(needs, tmp_path: Path) -> None:
    # ONNX Runtime has no convolution in float64: they are matrix products, of every stride and padding here.
    model, path = small_network().double(), tmp_path / "a.onnx"
    report = write_onnx(model, path, images=images(2, 2).double(), per_step=True, opset=20)
    assert report.largest_difference < 1e-12 and report.flips == 0
    assert "Conv" not in nodes(needs, path)
    (found,) = run_onnx(needs, path, images(3, 2).double())
    torch.testing.assert_close(found, model.forward_steps(images(3, 2).double()), rtol=0, atol=1e-12)


class Inside(nn.Module):
    """Currents and spikes of all neurons of a network, from the gated current."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, gated: Tensor) -> list[Tensor]:
        membrane, spikes = gated, self.network.lif(gated)
        seen = [spikes]
        for stage in (self.network.layer1, self.network.layer2, self.network.layer3, self.network.layer4):
            for block in stage:
                seen.append(block.conv1(spikes))
                membrane, spikes, _ = block(membrane, spikes)
                seen += [membrane, spikes]
        return seen


@torch.no_grad()
def test_onnx_runtime_computes_the_same_integers_from_the_same_gated_current(needs, tmp_path: Path) -> None:
    model = quantize(network())
    gated = [model._encode(images(batch)) for batch in (2, 5)]
    shapes = ({0: T * torch.export.Dim("batch", min=1)},)
    program = torch.export.export(Inside(model).eval(), (gated[0],), dynamic_shapes=shapes)
    path = tmp_path / "inside.onnx"
    path.write_bytes(timm_gac.export.onnx._serialised(program.run_decompositions(decomposition_table()), 23, {}))
    for x in gated:
        expected, found = Inside(model)(x), run_onnx(needs, path, x)
        assert sum(int(spikes.sum()) for spikes in expected if spikes.dtype == torch.int8) > 1000
        for want, got in zip(expected, found, strict=True):
            assert torch.equal(got, want)
    stored = [entry for entry in needs("onnx").load(path).graph.initializer if entry.data_type == 3]  # int8
    assert len(stored) >= 3  # weights of the 3x3 convolutions; the exporter makes small ones float32


@torch.no_grad()
def test_timm_s_exporter_works_with_the_operators_registered(needs, tmp_path: Path) -> None:
    from timm.utils.onnx import onnx_export

    needs("onnxscript")
    model, path = small_network(), tmp_path / "a.onnx"
    with registered_decompositions():
        onnx_export(model, str(path), example_input=images(2), use_dynamo=True, input_names=["x"])
    (found,) = run_onnx(needs, path, images(2))
    torch.testing.assert_close(found, model(images(2)), rtol=0, atol=1e-5)
