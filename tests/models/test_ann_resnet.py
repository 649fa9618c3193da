"""ANNs of the spiking networks' shapes: they are timm's ResNet, come back from a folder, and refuse what is spiking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from timm_gac import cli
from timm_gac.analysis.agreement import compare_formats
from timm_gac.analysis.evaluate import evaluate
from timm_gac.analysis.inspect import inspect_network
from timm_gac.energy import EnergyMeter
from timm_gac.hub import check_config, load_model, open_network, prepare_folder, read_config, save_model_folder, verify
from timm_gac.hub.config import complete_args, count_weights
from timm_gac.hub.prepare import PublishConfig
from timm_gac.inference.early_exit import forward_early_exit
from timm_gac.inference.fold import fuse_for_inference
from timm_gac.inference.predict import predict
from timm_gac.inference.quantize import quantize
from timm_gac.models import ANNResNet
from timm_gac.models.ann_resnet import ann_like
from timm_gac.models.build import registered_names

TWINS = {
    "ann_resnet18_cifar": "msresnet18_cifar",
    "ann_resnet18": "msresnet18",
    "ann_resnet34": "msresnet34",
    "ann_resnet19": "spiking_resnet19",
    "test_ann_resnet": "test_gac_msresnet",
}


def tiny(**changes: object) -> ANNResNet:
    """A network whose running statistics and weights differ from the initial ones in every layer."""
    torch.manual_seed(0)
    model = timm.create_model("test_ann_resnet", num_classes=4, **changes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, std=0.1)
    return model.eval()


def test_every_one_has_a_spiking_twin_of_its_shape() -> None:
    assert registered_names("*ann_*") == sorted(TWINS)
    for name, twin in TWINS.items():
        ann, like = (
            timm.create_model(name, device="meta"),
            ann_like(timm.create_model(twin, device="meta")),
        )
        shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (ann, like)]
        assert shapes[0] == shapes[1], name
        assert ann.changed_args() == {} and ann.num_steps == 1
        spiking = timm.create_model(twin, device="meta")
        sizes = [
            sorted(tuple(conv.weight.shape) for conv in network.modules() if is_3x3(conv)) for network in (ann, spiking)
        ]
        assert sizes[0] == sizes[1], name


def is_3x3(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)


@pytest.mark.parametrize("depth", [18, 34])
def test_with_timms_stem_it_is_timms_network(depth: int) -> None:
    timms, ann = timm.create_model(f"resnet{depth}").eval(), timm.create_model(f"ann_resnet{depth}").eval()
    ann.load_state_dict(timms.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ann(images), timms(images))


def test_steps_features_and_pruning_agree() -> None:
    model, images = tiny(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.forward_steps(images), model(images)[:, None])
        final, features = model.forward_intermediates(images)
        assert len(features) == 4 and torch.equal(final, features[-1])
        assert torch.equal(model.forward_head(final), model(images))
        for info, feature in zip(model.feature_info, features, strict=True):
            assert feature.shape[1:] == (info["num_chs"], 16 // info["reduction"], 16 // info["reduction"])
        last = model.forward_intermediates(images, 1, intermediates_only=True)
        assert len(last) == 1 and torch.equal(last[0], final)
        kept, whole = model.prune_intermediate_layers([3], prune_head=False), model(images)
        assert kept == [3] and whole.shape == (2, 4)
        model.prune_intermediate_layers([1])
        assert torch.equal(model.forward_features(images), features[1]) and model.num_classes == 0


@pytest.mark.parametrize("last", [0, 1, 2])
def test_a_pruned_network_is_rebuilt_and_stored(last: int, tmp_path: Path) -> None:
    model, images = tiny().eval(), torch.randn(2, 3, 16, 16)
    width = model.feature_info[last]["num_chs"]
    model.prune_intermediate_layers([last])
    assert model.model_args()["layers"] == [1] * last + [0] * (3 - last) and model.num_features == width
    with torch.no_grad():
        expected = model(images)
        assert expected.shape[1] == width
        rebuilt = ANNResNet(**model.model_args()).eval()
        rebuilt.load_state_dict(model.state_dict())
        assert torch.equal(rebuilt(images), expected)
        assert torch.equal(load_model(save_model_folder(model, tmp_path / "pruned"))(images), expected)
    rebuilt.reset_classifier(5, "avg")
    assert rebuilt(images).shape == (2, 5)
    assert len(rebuilt.feature_info) == last + 1


def test_stages_left_out_have_a_classifier_that_fits() -> None:
    model = tiny(layers=[1, 1, 0], dtype=torch.float64, global_pool="max").eval()
    assert model.fc.in_features == 32 and model.global_pool.pool_type == "max"
    assert model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).shape == (2, 4)


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    images, gradients = torch.randn(4, 3, 16, 16), []
    for enable in (False, True):
        model = tiny().train()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)


CHANGES = dict(in_chans=1, global_pool="max", drop_rate=0.25, drop_path_rate=0.125, layers=(1, 2, 1), stem_width=24)


def test_a_folder_holds_it_and_timm_reads_it(tmp_path: Path) -> None:
    for number, changes in enumerate(({}, CHANGES)):
        model, images = tiny(**changes), torch.randn(2, changes.get("in_chans", 3), 16, 16)
        folder = save_model_folder(model, tmp_path / str(number))
        config = read_config(folder)
        assert config["architecture"] == "test_ann_resnet" and "num_steps" not in config["model_args"]
        args = complete_args(config)
        convolutions = sum(p.numel() for p in model.parameters() if p.ndim == 4 and p.shape[-1] == 3)
        assert count_weights(args) == convolutions + model.fc.weight.numel()
        for loaded in (load_model(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()):
            assert isinstance(loaded, ANNResNet) and loaded.model_args() == model.model_args()
            with torch.no_grad():
                assert torch.equal(loaded(images), model(images))
    opened = open_network(str(folder))
    assert opened.trained and opened.network.num_steps == 1


def test_foreign_arguments_are_refused(tmp_path: Path) -> None:
    config = json.loads((save_model_folder(tiny(), tmp_path / "a") / "config.json").read_text())
    for name, value in (("num_steps", 4), ("gate", "full"), ("encoder", "gac"), ("block", "MSBlock")):
        with pytest.raises(ValueError, match=f"arguments of an ANN among .*, got '{name}'"):
            check_config(config | {"model_args": {name: value}})
    with pytest.raises(ValueError, match=r"layers of at most 33,554,432 values.*got 67,108,864"):
        check_config(config | {"model_args": {"stem_width": 4096}, "pretrained_cfg": {"input_size": [3, 128, 128]}})
    for changes, message in (
        (dict(strides=(1, 1, 2)), "strides 1 or 2 of the first stage"),
        (dict(strides=(3, 2, 2)), "strides 1 or 2 of the first stage"),
        (dict(layers=(1, 0, 1)), "no stage without blocks"),
        (dict(layers=(1, 1, 1, 1)), "of one length"),
        (dict(stem_width=0), "stem_width as an integer"),
    ):
        with pytest.raises(ValueError, match=message):
            timm.create_model("test_ann_resnet", **changes)
    with pytest.raises(ValueError, match="no num_steps for test_ann_resnet"):
        open_network("test_ann_resnet", num_steps=4)


@pytest.mark.parametrize("argument", [{"num_steps": 4}, {"gate": "full"}, {"neuron": "plif"}], ids=str)
def test_what_only_spiking_networks_have_is_refused_in_a_sentence(argument: dict[str, Any]) -> None:
    name, value = next(iter(argument.items()))
    with pytest.raises(ValueError, match=f"expected no {name} for test_ann_resnet.* got {name}={value}: leave it out"):
        timm.create_model("test_ann_resnet", **argument)
    assert timm.create_model("test_ann_resnet", num_steps=None).num_steps == 1  # timm takes None for left out


def test_it_is_evaluated_as_one_step() -> None:
    model, images, labels = tiny(), torch.randn(6, 3, 16, 16), torch.arange(6) % 4
    result = evaluate(model, [(images, labels)])
    with torch.no_grad():
        logits = model(images).double()
    assert result.top1_per_step == (result.top1,) and result.firing_rates == {}
    assert result.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item())
    assert [answer.steps for answer in predict(model, images)] == [1] * 6


REFUSALS = {
    "estimate of energy": EnergyMeter,
    "folding and quantising": quantize,
    "folding": fuse_for_inference,
    "early exit": lambda model: forward_early_exit(model, torch.zeros(1, 3, 16, 16), 0.9),
    "record of spikes": lambda model: inspect_network(model, [torch.zeros(1, 3, 16, 16)]),
    "spikes begin to differ": lambda model: compare_formats(model, [], ("float32", "bfloat16")),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_wants_spikes_refuses_it_in_a_sentence(what: str) -> None:
    with pytest.raises(ValueError, match=rf"expected a spiking network for .*{what}.*, got test_ann_resnet, an ANN"):
        REFUSALS[what](tiny())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model_folder(tiny(), tmp_path / "ann")


@pytest.mark.parametrize(
    "arguments",
    [
        ["energy", "ANN", "--data", "digits"],
        ["anytime", "ANN", "--data", "digits"],
        ["inspect", "ANN", "digits"],
        ["gate", "ANN", "--data", "digits"],
        ["compare", "ANN", "--data", "digits"],
        ["quantize", "ANN", "OUT"],
        ["export", "ANN", "OUT.nir"],
        ["export", "ANN", "OUT.onnx", "--frames"],
        ["bench", "model", "--model", "ANN", "--num-steps", "1"],
    ],
)
def test_commands_refuse_it(
    arguments: list[str], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [word.replace("ANN", str(folder)).replace("OUT", str(tmp_path / "out")) for word in arguments]
    assert cli.main(given) == 2
    assert "expected a spiking network for " in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["onnx", "pt2"])
def test_files_for_other_programs_answer_as_it_does(suffix: str, folder: Path, tmp_path: Path) -> None:
    from timm_gac import export

    write = {"onnx": export.write_onnx, "pt2": export.write_program}[suffix]
    for per_step in (False, True):
        report = write(load_model(folder), tmp_path / f"{per_step}.{suffix}", per_step=per_step)
        assert report.images == 8 and report.flips == 0 and report.largest_difference < 1e-5


def test_its_card_speaks_of_no_spikes(folder: Path, tmp_path: Path) -> None:
    prepare_folder(folder, tmp_path / "out", PublishConfig(repo_id="org/ann", dataset="cifar100"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "An ordinary ResNet (`test_ann_resnet`, an ANN)" in card
    assert f"| parameters | {sum(p.numel() for p in tiny().parameters()):,} |" in card
    assert "neuromorphic" not in card and "T =" not in card and "forward_steps" not in card and "membrane" not in card
    assert verify(tmp_path / "out").passed
