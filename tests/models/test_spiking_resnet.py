"""The networks: published sizes, timm's contract with numbers compared, and the equalities that time brings."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from timm.models import _features_fx as timm_fx
from timm.models._features import FeatureHookNet
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from gac_kernels import CIFAR, IMAGENET
from timm_gac import fuse_for_inference, quantize
from timm_gac.inference.early_exit import forward_early_exit
from timm_gac.layers.encoder import DirectCoding, GatedAttentionCoding
from timm_gac.models import SpikingResNet
from timm_gac.models.blocks import MSBlock, SpikingBlock

B, T = 2, 4
PAIRS = ["msresnet18_cifar", "msresnet18", "msresnet34", "spiking_resnet18", "spiking_resnet34", "spiking_resnet19"]


def images(*shape: int, seed: int = 0) -> Tensor:
    shape = shape or (B, 3, 32, 32)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(**kwargs) -> SpikingResNet:
    """A float64 net whose statistics come from one batch, so that every stage spikes in eval mode too."""
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=7, dtype=torch.float64, **kwargs)
    norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images(B, model.in_chans, 32, 32))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


# One net for each combination of block, encoder and dialect that changes the code path.
VARIANTS = {
    "gac_ms": dict(),
    "direct": dict(encoder="direct"),
    "plain_imagenet": dict(block=SpikingBlock, spec=IMAGENET, scaled_init=True, stem_kernel=7),
    "four_stages": dict(layers=(1, 2, 1, 1), channels=(8, 12, 16, 20), strides=(2, 2, 2, 2), global_pool="catavgmax"),
}


@pytest.fixture(params=VARIANTS)
def model(request) -> SpikingResNet:
    return tiny(**VARIANTS[request.param])


def grads_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).pow(2).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "name,num_classes,num_steps,parameters",
    [
        ("gac_msresnet18_cifar", 10, 4, 12_633_178),
        ("gac_msresnet18_cifar", 100, 6, 12_679_368),
        ("msresnet18_cifar", 10, 4, 12_502_090),
        ("gac_msresnet18", 1000, 4, 11_824_824),
        ("gac_msresnet34", 1000, 4, 21_932_984),
    ],
)
def test_parameter_counts_are_those_published(name: str, num_classes: int, num_steps: int, parameters: int) -> None:
    model = timm.create_model(name, num_classes=num_classes, num_steps=num_steps, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", PAIRS)
def test_twins_differ_by_the_gate_alone(name: str) -> None:
    gac, direct = (timm.create_model(prefix + name, device="meta") for prefix in ("gac_", ""))
    gate = {key for key in gac.state_dict() if key.startswith("encoder.")}
    assert gate == {f"encoder.{k}.weight" for k in ("temporal.fc1", "temporal.fc2", "spatial.conv_a", "spatial.conv_b")}
    assert gac.state_dict().keys() - gate == direct.state_dict().keys()
    assert gac.num_steps == direct.num_steps == 4
    cifar = name in ("msresnet18_cifar", "spiking_resnet19")
    assert gac.spec == direct.spec == (CIFAR if cifar else IMAGENET)
    assert gac.num_classes == gac.default_cfg["num_classes"] == (100 if cifar else 1000)
    assert {type(block) for stage in (gac.layer1, gac.layer3) for block in stage} == {
        MSBlock if name.startswith("ms") else SpikingBlock
    }


def test_initialisation_of_both_dialects() -> None:
    torch.manual_seed(0)
    model = timm.create_model("gac_msresnet18")
    for name, parameter in model.named_parameters():
        if name.startswith("layer") and name.endswith("bn2.weight"):
            assert torch.all(parameter == 0), name
        elif parameter.ndim == 1 and name.endswith("weight"):
            assert torch.all(parameter == 0.5), name
        elif parameter.ndim == 4 and parameter.numel() > 30_000:
            fan_out = parameter.shape[0] * parameter[0, 0].numel()
            assert abs(parameter.std().item() / (2 / fan_out) ** 0.5 - 1) < 0.02, name
    for name, parameter in timm.create_model("msresnet18_cifar").named_parameters():
        if parameter.ndim == 1 and "bn" in name:
            assert torch.all(parameter == (1 if name.endswith("weight") else 0)), name


def test_every_stage_spikes(model: SpikingResNet) -> None:
    rates = model.forward_intermediates(images(), intermediates_only=True)[1:]
    for stage, rate in enumerate(rates, start=1):
        assert 0.005 < rate.mean() < 0.8, f"layer{stage}: the tests below would compare zeros"
        torch.testing.assert_close(rate * T, (rate * T).round(), rtol=0, atol=0)


def test_mean_of_the_steps_is_the_forward_pass(model: SpikingResNet) -> None:
    model.reset_classifier(7, "avg")  # the mean commutes with average pooling, not with a maximum
    steps = model.forward_steps(images())
    assert steps.shape == (B, T, 7) and steps.std(1).max() > 1e-6
    torch.testing.assert_close(model(images()), steps.mean(1), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_repeated_frames_equal_the_image(model: SpikingResNet, train: bool) -> None:
    """Hoisting the stem changes no output and no gradient."""
    x, twin = images(), copy.deepcopy(model)
    frames = x.unsqueeze(1).repeat(1, T, 1, 1, 1)
    model.train(train), twin.train(train)
    torch.testing.assert_close(model(x), twin(frames), rtol=1e-10, atol=1e-12)
    assert_same(grads_of(model, x), grads_of(twin, frames), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(model.bn1.running_mean, twin.bn1.running_mean, rtol=1e-11, atol=1e-12)


def test_frames_of_an_event_camera_are_taken_in_order() -> None:
    model = tiny(in_chans=2)
    frames = images(B, T, 2, 32, 32)
    steps = model.forward_steps(frames)
    later = frames.clone()
    later[:, 2:] += 1  # the past does not see the future, except through the gate's pools over time
    model.encoder.temporal.fc2.weight.data.zero_()
    torch.testing.assert_close(model.forward_steps(later)[:, :2], model.forward_steps(frames)[:, :2], rtol=0, atol=0)
    assert not torch.equal(steps[:, 0], steps[:, 1])


def test_wrong_inputs_and_arguments_are_named() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="num_steps = 4"):
        model(images(B, 3, 3, 32, 32))
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model("test_gac_msresnet", no_such_argument=1)
    wrong = [dict(num_steps=0), dict(encoder="rate"), dict(layers=(1, 1)), dict(drop_path_rate=1.0)]
    for kwargs in wrong:
        with pytest.raises(ValueError, match=r"expected .*, got"):
            timm.create_model("test_gac_msresnet", **kwargs)


@pytest.mark.parametrize("change", [lambda model: model, fuse_for_inference, quantize], ids=["float", "folded", "int8"])
@pytest.mark.parametrize("encoder", ["gac", "direct"])
def test_num_steps_of_no_module_changes_after_creation(encoder: str, change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(timm.create_model("test_gac_msresnet", num_classes=7, encoder=encoder))
    modules = {name: module for name, module in model.named_modules() if getattr(module, "num_steps", None) is not None}
    assert len(modules) > 6 and {"", "encoder", "lif"} <= modules.keys()
    for name, module in modules.items():
        for steps in (1, 2, 8, None):
            with pytest.raises(ValueError, match=f"num_steps of .* to stay 4, got {steps}: create the network"):
                module.num_steps = steps
        module.num_steps = 4
        assert module.num_steps == 4, name
    with pytest.raises(ValueError, match=r"spec of .* to stay"):
        model.spec = IMAGENET
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with pytest.raises(ValueError, match="to stay 4"):
        copied.num_steps = 2
    assert torch.equal(copied.eval()(images().float()), model.eval()(images().float()))


def test_an_encoder_of_another_number_of_steps_is_refused() -> None:
    model = tiny()
    for encoder in (GatedAttentionCoding(16, 8, dtype=torch.float64), DirectCoding(2)):
        model.encoder = encoder
        for call in (model, model.forward_steps, model.forward_intermediates):
            with pytest.raises(ValueError, match=f"encoder of 4 time steps, got {encoder.num_steps}"):
                call(images())


def test_head_takes_features_apart(model: SpikingResNet) -> None:
    x, pooled = images(), model.forward_head(model.forward_features(images()), pre_logits=True)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x), rtol=0, atol=0)
    assert model.get_classifier(name_only=True) == "fc"
    rates = model.forward_features(x)
    if model.global_pool.pool_type == "avg":
        torch.testing.assert_close(pooled, rates.mean((2, 3)))
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), pooled, rtol=0, atol=0)
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), rates, rtol=0, atol=0)
    model.reset_classifier(3, "avg")
    assert model.fc.weight.dtype == torch.float64
    torch.testing.assert_close(model(x), model.fc(rates.mean((2, 3))))


def test_dropout_and_stochastic_depth_act_in_training_only() -> None:
    x = images()
    model = tiny(drop_rate=0.5, drop_path_rate=0.9)
    plain = tiny()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    rates = [module.drop_path for module in model.modules() if hasattr(module, "drop_path")]
    assert rates == [0.0, 0.0, 0.0, pytest.approx(0.45), 0.0, pytest.approx(0.9)]
    model.train()
    assert not torch.equal(model(x), model(x))


def test_intermediates_agree_with_everything_else(model: SpikingResNet) -> None:
    x = images()
    features = model.forward_features(x)
    final, taps = model.forward_intermediates(x)
    last = len(model.feature_info) - 1
    torch.testing.assert_close(final, features, rtol=0, atol=0)
    torch.testing.assert_close(taps[-1], features, rtol=0, atol=0)
    stem = model.encoder(model.bn1(model.conv1(x))).mean(0)
    torch.testing.assert_close(taps[0], stem, rtol=0, atol=1e-15)
    for i, (info, tap) in enumerate(zip(model.feature_info, taps, strict=True)):
        assert tap.shape == (B, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
        early, selected = model.forward_intermediates(x, indices=[i], stop_early=True)
        torch.testing.assert_close(selected, [tap], rtol=0, atol=0)
        torch.testing.assert_close(early, tap, rtol=0, atol=0)
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers([i - last - 1]) == [i]
        torch.testing.assert_close(pruned.forward_features(x), tap, rtol=0, atol=0)
        torch.testing.assert_close(pruned(x), tap, rtol=0, atol=0)
        assert pruned.num_features == info["num_chs"]


def test_features_only_is_the_getter_over_firing_rates() -> None:
    backbone = timm.create_model("test_gac_msresnet", features_only=True, dtype=torch.float64)
    model = tiny()
    backbone.model.load_state_dict(model.state_dict(), strict=False)
    taps = model.forward_intermediates(images(), intermediates_only=True)
    torch.testing.assert_close(backbone.eval()(images()), taps, rtol=0, atol=0)
    assert backbone.feature_info.channels() == [16, 24, 32, 48] and backbone.feature_info.reduction() == [1, 1, 2, 4]


@pytest.mark.parametrize("kind", ["hook", "fx", "list", "dict", "Hook", FeatureHookNet])
def test_features_are_rates_or_refused(kind: object) -> None:
    with pytest.raises(ValueError, match=r"expected feature_cls='getter' for firing rates \(B, C, H, W\), got"):
        timm.create_model("test_gac_msresnet", features_only=True, feature_cls=kind)
    backbone = timm.create_model("test_gac_msresnet", features_only=True, feature_cls="getter", out_indices=(1, 3))
    assert [tuple(rates.shape) for rates in backbone(images().float())] == [(B, 24, 32, 32), (B, 48, 8, 8)]


@pytest.mark.parametrize("change", [lambda model: model, fuse_for_inference, quantize], ids=["float", "folded", "int8"])
def test_a_module_named_rate_has_the_last_feature_map(change: Callable[[nn.Module], nn.Module]) -> None:
    model, x, seen = change(tiny().float()), images().float(), []
    handle = model.rate.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits = model(x)
    handle.remove()
    (rates,) = seen
    assert rates.shape == (B, 48, 8, 8) and 0 < rates.mean() < 1
    torch.testing.assert_close(model.fc(rates.mean((2, 3))), logits)
    if not model.inference_only:  # other networks cannot be traced
        extracted = timm_fx.create_feature_extractor(model, ["rate"])(x)["rate"]
        torch.testing.assert_close(extracted, rates)


@pytest.mark.parametrize("change", [lambda model: model, fuse_for_inference, quantize], ids=["float", "folded", "int8"])
def test_extractors_that_cannot_trace_say_what_can(change: Callable[[nn.Module], nn.Module]) -> None:
    model = change(tiny().float())
    for trace in (lambda: create_feature_extractor(model, ["layer3"]), lambda: torch.fx.symbolic_trace(model)):
        with pytest.raises(ValueError, match=r"got Proxy: torch.fx and torchvision's .* features_only=True"):
            trace()


def test_grad_cam_on_the_rates() -> None:
    """As Grad-CAM tools do: activations and gradients at a module by its name."""
    model, x, kept = tiny(), images(), {}

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> None:
        kept["rates"] = output
        output.register_hook(lambda gradient: kept.__setitem__("gradient", gradient))

    model.get_submodule("rate").register_forward_hook(keep)
    logits = model(x)
    logits[:, 3].sum().backward()
    expected = model.fc.weight[3] / (8 * 8)  # of average pooling and a linear layer
    torch.testing.assert_close(kept["gradient"], expected[None, :, None, None].expand_as(kept["rates"]))


def test_images_and_frames_need_not_be_square() -> None:
    """The stages' rates of the left half of a wide image are those of a square one, away from the cut."""
    model, wide = tiny(), images(B, 3, 16, 64)
    for change in (copy.deepcopy, fuse_for_inference, quantize):
        made = change(copy.deepcopy(model))
        logits, steps = made(wide), made.forward_steps(wide)
        assert logits.shape == (B, 7) and steps.shape == (B, T, 7)
        torch.testing.assert_close(steps.mean(1), logits)
        rates = made.forward_features(wide)
        assert rates.shape == (B, 48, 4, 16)
        for kind, x in (("tall", wide.transpose(2, 3)), ("frames", wide.unsqueeze(1).repeat(1, T, 1, 1, 1))):
            out = made.forward_features(x)
            assert out.shape == ((B, 48, 16, 4) if kind == "tall" else rates.shape)
            if kind == "frames":
                torch.testing.assert_close(out, rates)
    backbone = timm.create_model("test_gac_msresnet", features_only=True)
    assert [tuple(r.shape[2:]) for r in backbone(wide.float())] == [(16, 64), (16, 64), (8, 32), (4, 16)]
    overlay = dict(input_size=(3, 16, 64))
    model = timm.create_model("test_gac_msresnet", pretrained_cfg_overlay=overlay)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 16, 64)


@pytest.mark.parametrize("change", [lambda model: model, fuse_for_inference, quantize], ids=["float", "folded", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@torch.no_grad()
def test_what_is_not_finite_in_an_image_shows(value: float, change: Callable[[nn.Module], nn.Module]) -> None:
    """In all outputs of that sample, and in no other's."""
    model, x = change(tiny().float()), images().float()
    frames = x.unsqueeze(1).repeat(1, T, 1, 1, 1)
    for given in (x, frames):
        broken = given.clone()
        broken.view(-1)[5] = value  # of the first sample
        calls = (
            lambda x: [model(x), model.forward_features(x), model.forward_steps(x)],
            lambda x: model.forward_intermediates(x, intermediates_only=True),
        )
        for call in calls:
            for out, right in zip(call(broken), call(given), strict=True):
                assert out[0].isnan().all() and torch.equal(out[1], right[1])
        rows, right = (forward_early_exit(model, x, 0.9) for x in (broken, given))
        assert len(rows[0]) == T and rows[0].isnan().all() and torch.equal(rows[1], right[1])


@pytest.mark.parametrize("train", [True, False])
def test_a_broken_image_shows_and_poisons_nothing(train: bool) -> None:
    model, x = tiny().train(train), images()
    x[0, 0, 2, 3] = float("nan")
    assert model(x)[0].isnan().all() and model.forward_features(x)[0].isnan().all()
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert model.eval()(images()).isfinite().all()
    half = tiny().to(torch.float16)
    assert half(torch.full((1, 3, 8, 8), 6e4, dtype=torch.float16)).isfinite().all()  # large is no infinity


def test_names_of_classes_leave_with_the_classifier() -> None:
    overlay = dict(num_classes=3, label_names=["a", "b", "c"])
    model = timm.create_model("test_gac_msresnet", pretrained_cfg_overlay=overlay)
    assert model.num_classes == 3 and model.pretrained_cfg["label_names"] == ["a", "b", "c"]
    model.reset_classifier(3)
    assert "label_names" not in model.pretrained_cfg and "label_names" not in model.default_cfg


def test_parameter_groups_follow_depth() -> None:
    model = tiny()
    groups = timm.models.group_parameters(model, model.group_matcher())
    assert [sorted({n.split(".")[0] for n in names}) for names in groups.values()] == [
        ["bn1", "conv1", "encoder"],
        ["layer1"],
        ["layer2"],
        ["layer3"],
        ["fc"],
    ]
    names = {"temporal.fc1", "temporal.fc2", "spatial.conv_a", "spatial.conv_b"}
    assert model.no_weight_decay() == {f"encoder.{name}.weight" for name in names}
    assert timm.create_model("msresnet18_cifar").no_weight_decay() == set()


def test_checkpointing_changes_no_gradient(model: SpikingResNet) -> None:
    model.train()
    expected = grads_of(model, images())
    model.set_grad_checkpointing()
    assert_same(grads_of(model, images()), expected, rtol=0, atol=0)


def test_compiled_nets_equal_the_eager_one() -> None:
    model = tiny()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(grads_of(compiled._orig_mod, images()), expected := grads_of(model, images()), rtol=0, atol=0)
    model.zero_grad()
    compiled(images()).pow(2).sum().backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected, rtol=1e-9, atol=1e-11)


def test_sixteen_bit_and_channels_last() -> None:
    model, x = tiny().float(), images().float()
    expected = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(x.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)
    half = model.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16 and torch.isfinite(half).all()
    assert (half.float() - expected).abs().mean() < 0.5 * expected.abs().mean()
