"""Checkpoints in the published layouts, in ours, and of another number of steps."""

import logging
import pickle
import re

import pytest
import timm
import torch
from torch import Tensor

from timm_gac import fuse_for_inference
from timm_gac.inference.quantize import quantize
from timm_gac.layers.encoder import GatedAttentionCoding, resample_temporal_weight
from timm_gac.models.checkpoint import canonical_name, checkpoint_filter_fn
from timm_gac.models.published import PublishedNet

# name, steps, classes, and the number of entries that the published code's file of this network has
PUBLISHED = [
    ("gac_msresnet18_cifar", 4, 10, 415),
    ("gac_msresnet18_cifar", 6, 100, 415),
    ("gac_msresnet18", 4, 1000, 134),
    ("gac_msresnet34", 4, 1000, 230),
    ("msresnet18_cifar", 4, 10, 411),
]


def published_state_dict(name: str, num_steps: int, num_classes: int, dtype: torch.dtype = torch.float32) -> dict:
    """Random values under the published names; aliases share them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        net = PublishedNet(name, num_classes, num_steps)
    shared, values = {}, {}
    for key, value in net.state_dict(keep_vars=True).items():
        if id(value) not in shared:
            shared[id(value)] = torch.rand(value.shape, dtype=dtype) if value.is_floating_point() else torch.tensor(3)
        values[key] = shared[id(value)]
    return values


def create(name: str, file, num_classes: int, **kwargs) -> torch.nn.Module:
    overlay = dict(file=str(file), num_classes=kwargs.pop("source_classes", num_classes))
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=num_classes, **kwargs)


@pytest.mark.parametrize("name,num_steps,num_classes,entries", PUBLISHED)
@pytest.mark.parametrize("parallel", [True, False], ids=["data_parallel", "bare"])
def test_published_layout_loads(tmp_path, name, num_steps, num_classes, entries, parallel) -> None:
    dtype, prefix = (torch.float32, "module.") if parallel else (torch.float64, "")
    if name == "gac_msresnet34" and not parallel:
        pytest.skip("gac_msresnet18 has the same layout")
    source = published_state_dict(name, num_steps, num_classes, dtype)
    assert len(source) == entries
    file = tmp_path / "published.pth"
    named = {prefix + key: value for key, value in source.items()}
    torch.save({"state_dict": named, "epoch": 1} if prefix else named, file)
    model = create(name, file, num_classes, num_steps=num_steps, dtype=dtype)
    loaded = model.state_dict()
    assert {canonical_name(key) for key in source} == loaded.keys()
    for key, value in source.items():
        target = loaded[canonical_name(key)]
        torch.testing.assert_close(target, value.reshape(target.shape), rtol=0, atol=0, msg=key)


def test_canonical_names() -> None:
    for name, expected in {
        "conv2_x.0.shortcut.1.bn.weight": "layer1.0.downsample.1.weight",
        "conv5_x.2.conv1.weight": "layer4.2.conv1.weight",
        "conv1.1.bn.running_mean": "bn1.running_mean",
        "conv1.0.weight": "conv1.weight",
        "conv1_s.bn.seqbn.module.bias": "bn1.bias",
        "layer2.1.conv2_s.layer.module.weight": "layer2.1.conv2.weight",
        "layer2.0.downsample.bn.seqbn.module.running_var": "layer2.0.downsample.1.running_var",
        "fc1_s.layer.module.bias": "fc.bias",
        "encoding.TA.sharedMLP.2.weight": "encoder.temporal.fc2.weight",
    }.items():
        assert canonical_name(name) == expected
    for name in timm.create_model("gac_msresnet34", device="meta").state_dict():
        assert canonical_name(name) == name


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "net", None])
def test_our_own_layout_loads_wrapped_or_bare(tmp_path, wrapper: str | None) -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_gac_msresnet", num_classes=5)
    state = model.state_dict()
    torch.save({wrapper: state} if wrapper else state, tmp_path / "ours.pth")
    loaded = create("test_gac_msresnet", tmp_path / "ours.pth", 5).state_dict()
    for key, value in state.items():
        torch.testing.assert_close(loaded[key], value, rtol=0, atol=0, msg=key)


def test_aliases_that_contradict_are_refused() -> None:
    source = published_state_dict("gac_msresnet18_cifar", 4, 10)
    model = timm.create_model("gac_msresnet18_cifar", num_classes=10, device="meta")
    alias = "layer1.0.conv1_s.layer.module.weight"
    source[alias] = source[alias] + 1
    with pytest.raises(ValueError, match=re.escape("layer1.0.conv1.weight")):
        checkpoint_filter_fn(source, model)


def test_another_classifier_is_left_to_timm(tmp_path) -> None:
    source = published_state_dict("gac_msresnet18_cifar", 4, 10)
    torch.save(source, tmp_path / "ten.pth")
    model = create("gac_msresnet18_cifar", tmp_path / "ten.pth", 3, source_classes=10)
    assert model.fc.weight.shape == (3, 512)
    torch.testing.assert_close(model.conv1.weight.detach(), source["conv1.weight"], rtol=0, atol=0)


def test_code_in_a_pickle_is_never_run(tmp_path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": {"conv1.weight": Payload()}}, tmp_path / "evil.pth")
    with pytest.raises((RuntimeError, pickle.UnpicklingError), match=r"weights_only|Weights only"):
        create("test_gac_msresnet", tmp_path / "evil.pth", 5)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("new", [2, 3, 6, 8])
def test_another_number_of_steps_is_resampled_with_a_log_line(tmp_path, caplog, new: int) -> None:
    torch.manual_seed(2)
    source = timm.create_model("test_gac_msresnet", num_classes=5, num_steps=4)
    for fc in (source.encoder.temporal.fc1, source.encoder.temporal.fc2):
        fc.weight.data.uniform_(0.5, 1.0)
    torch.save(source.state_dict(), tmp_path / "four.pth")
    with caplog.at_level(logging.WARNING, logger="timm_gac"):
        model = create("test_gac_msresnet", tmp_path / "four.pth", 5, num_steps=new)
    assert "Resampled encoder.temporal.fc1.weight" in caplog.text
    torch.testing.assert_close(model.layer2[0].conv1.weight, source.layer2[0].conv1.weight, rtol=0, atol=0)
    pools = torch.tensor([[0.3], [1.2]])

    def scores(net: torch.nn.Module) -> Tensor:
        return net.encoder.temporal(pools.expand(-1, net.num_steps), 2 * pools.expand(-1, net.num_steps)).mean(1)

    torch.testing.assert_close(scores(model), scores(source), rtol=0.1, atol=0)  # m keeps its size


@pytest.mark.parametrize("how", ["checkpoint_path", "load_checkpoint", "load_state_dict", "assign", "parallel"])
def test_every_way_of_loading_resamples(tmp_path, caplog, how: str) -> None:
    torch.manual_seed(3)
    state = timm.create_model("test_gac_msresnet", num_classes=5, num_steps=4).state_dict()
    file = tmp_path / "four.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    before = {name: value.clone() for name, value in state.items()}
    with caplog.at_level(logging.WARNING, logger="timm_gac"):
        if how == "checkpoint_path":
            model = timm.create_model("test_gac_msresnet", num_classes=5, num_steps=6, checkpoint_path=str(file))
        else:
            model = timm.create_model("test_gac_msresnet", num_classes=5, num_steps=6)
            if how == "load_checkpoint":
                timm.models.load_checkpoint(model, str(file))
            elif how == "parallel":
                torch.nn.DataParallel(model).load_state_dict({f"module.{name}": v for name, v in state.items()})
            else:
                model.load_state_dict(state, assign=how == "assign")
    assert caplog.text.count("Resampled") == 2
    assert all(torch.equal(value, before[name]) for name, value in state.items())  # what was given is left alone
    for name, value in model.state_dict().items():
        expected = before[name] if "temporal" not in name else resample_temporal_weight(before[name], value.shape)
        assert torch.equal(value.cpu(), expected), name  # DataParallel puts the network on a GPU where there is one
    own = GatedAttentionCoding(16, num_steps=2)  # in a network of one's own too
    own.load_state_dict({name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")})
    assert torch.equal(own.temporal.fc1.weight, resample_temporal_weight(state["encoder.temporal.fc1.weight"], (1, 2)))


def test_temporal_weights_that_are_of_no_number_of_steps_are_refused() -> None:
    model = timm.create_model("test_gac_msresnet", num_classes=5)
    state = model.state_dict()
    for wrong in ((3, 4), (2, 5), (9, 9)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(state | {"encoder.temporal.fc1.weight": torch.zeros(wrong)})


@pytest.mark.parametrize("change", [fuse_for_inference, quantize])
def test_weights_of_folded_and_quantised_networks_are_refused(tmp_path, change) -> None:
    torch.save(change(timm.create_model("test_gac_msresnet", num_classes=5)).state_dict(), tmp_path / "changed.pth")
    kind, remedy = ("quantised", "load_model") if change is quantize else ("folded", "fuse_for_inference")
    for classes in (5, 3):  # with another classifier timm does not load strictly
        with pytest.raises(ValueError, match=f"with batch norms, got those of a {kind} one: .*{remedy}"):
            create("test_gac_msresnet", tmp_path / "changed.pth", classes, source_classes=5)


def test_resampling_a_constant_keeps_the_layers_output() -> None:
    weight = torch.full((2, 4), 0.25, dtype=torch.float64)
    resampled = resample_temporal_weight(weight, (3, 6))
    torch.testing.assert_close(resampled, torch.full((3, 6), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(resample_temporal_weight(weight, (2, 4)), weight)
