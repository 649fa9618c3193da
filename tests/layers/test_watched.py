"""Tools of PyTorch and timm that find, freeze, convert, watch or replace modules, in training too."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import warnings

import pytest
import timm
import torch
from timm.layers import convert_splitbn_model
from timm.utils import freeze, unfreeze
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import update_bn

from timm_gac import (
    CIFAR,
    LIF,
    BatchNormLIF,
    GatedAttentionCoding,
    LIFSpec,
    fuse_for_inference,
    parameter_groups,
    quantize,
)
from timm_gac.analysis.evaluate import evaluate
from timm_gac.layers.checks import _LOGGED, may_skip, why_called
from timm_gac.layers.convolution import SpikeConv2d, convolve

T = 2


def network(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_gac_msresnet", num_classes=5, num_steps=T, **kwargs)
    nn.init.constant_(model.bn1.weight, 3.0)  # so that the neuron behind the encoder fires
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def moved(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_each_module_that_is_watched_alone_is_called_once(train: bool, packed: bool) -> None:
    model = network().train(train)
    model.set_spike_packing(packed)
    for name, module in model.named_modules():
        if not name or (isinstance(module, nn.Sequential) and not len(module)):
            continue
        calls: list[str] = []

        def before(module: nn.Module, inputs: object, calls: list[str] = calls) -> None:
            calls.append("pre")

        def after(module: nn.Module, inputs: object, output: object, calls: list[str] = calls) -> None:
            calls.append("forward")

        handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
        with torch.set_grad_enabled(packed):
            model(images())
        for handle in handles:
            handle.remove()
        # The temporal attention scores the average and the maximum of a frame.
        assert calls == ["pre", "forward"] * (2 if "temporal.fc" in name else 1), name


@pytest.mark.parametrize("name", ["layer1.0.bn2", "layer1.0.bn2.lif", "layer1.0.bn1.norm", "layer1.0.downsample.1"])
def test_full_backward_hooks_see_gradients_in_training(name: str) -> None:
    model, seen = network().train(), []
    module = model.get_submodule(name)
    module.register_full_backward_hook(lambda module, inputs, outputs: seen.append(outputs[-1].shape))
    model(images()).sum().backward()
    assert len(seen) == 1


def test_watching_changes_nothing_but_speed() -> None:
    plain, watched = network().train(), network().train()
    for module in watched.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
    for model in (plain, watched):
        model(images()).square().sum().backward()
    for (name, a), b in zip(plain.named_parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(plain.buffers(), watched.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_one_line_says_why_a_module_is_called(caplog: pytest.LogCaptureFixture) -> None:
    norm, x = BatchNormLIF(3, num_steps=T), torch.randn(2 * T, 3, 2, 2)
    forwards = (LIF.forward,)
    assert may_skip(norm.lif, forwards) and why_called(norm.lif, forwards) is None
    norm.lif.register_forward_hook(lambda module, inputs, output: None)
    assert not may_skip(norm.lif, forwards) and "has hooks" in str(why_called(norm.lif, forwards))
    with caplog.at_level(logging.INFO, "timm_gac"):
        norm(x), norm(x)
    assert [record.message.startswith("LIF is called") for record in caplog.records] == [True]
    assert norm.lif in _LOGGED


@pytest.mark.parametrize("momentum", [0.1, None], ids=["moving", "cumulative"])
@pytest.mark.parametrize("watched", [False, True], ids=["fused", "called"])
def test_no_running_statistic_takes_what_is_not_finite(watched: bool, momentum: float | None) -> None:
    model = network().train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
            if watched:
                module.register_forward_hook(lambda module, inputs, output: None)
    before, broken = state_of(model), images()
    broken[0, 0, 3, 3] = float("nan")
    model(broken)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert torch.equal(model.bn1.running_mean, before["bn1.running_mean"])  # the stem mixes all channels of the image
    model(images())
    assert {"bn1.running_mean", "layer1.0.bn1.running_var", "layer1.0.downsample.1.running_mean"} <= set(
        moved(model, before)
    )


def test_weights_that_are_not_finite_are_refused_where_nothing_would_show_them() -> None:
    model = network().eval()
    with torch.no_grad():
        model.layer2[0].bn1.weight[0] = float("nan")
    assert model(images()).isfinite().all()
    for use in (fuse_for_inference, quantize, lambda model: evaluate(model, [(images(), torch.zeros(3).long())])):
        with pytest.raises(ValueError, match=r"expected finite weights to .* in layer2\.0\.bn1\.weight"):
            use(model)


def test_a_neuron_of_ones_own_in_the_place_of_lif_runs() -> None:
    class Silent(LIF):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros_like(x)

    norm = BatchNormLIF(3, num_steps=T)
    norm.lif = Silent()
    assert "a forward of its own" in str(why_called(norm.lif, (LIF.forward,)))
    assert not norm(3 * torch.ones(2 * T, 3, 2, 2).cumsum(0)).any()


def test_norms_are_found_frozen_and_thawed_as_others_are() -> None:
    model = network().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            for parameter in module.parameters():
                parameter.requires_grad = False
    before = state_of(model)
    model(images()).sum().backward()
    assert moved(model, before) == []
    assert all(p.grad is None for name, p in model.named_parameters() if ".bn" in name and p.ndim == 1)
    model.train()
    model(images())
    assert {name.rsplit(".", 1)[-1] for name in moved(model, before)} == {
        "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip


def test_options_of_the_norm_are_one_thing() -> None:
    module = BatchNormLIF(3, eps=1e-3, momentum=0.3, num_steps=T)
    module.norm.momentum = None
    assert (module.eps, module.momentum, module.num_features) == (1e-3, None, 3)
    module.momentum = 0.2
    assert module.norm.momentum == 0.2
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).double()):
        assert same.norm.weight is same.weight and same.norm.running_mean is same.running_mean
        assert list(same.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
        assert [name for name, _ in same.named_parameters()] == ["weight", "bias"]


def test_update_bn_averages_all_norms() -> None:
    model = network().train()
    model(images() * 5 + 3)
    right, batches = copy.deepcopy(model), [images(4), images(2) * 2]
    norms = [module for module in right.modules() if isinstance(module, (_BatchNorm, BatchNormLIF))]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in batches:
            right(batch)
    update_bn(batches, model)
    for name, value in right.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=lambda m, n=name: f"{n}: {m}")
    assert {norm.momentum for norm in model.modules() if isinstance(norm, BatchNormLIF)} == {0.1}


def test_timm_freezes_and_unfreezes() -> None:
    model = network().eval()
    keys, expected = set(model.state_dict()), model(images()).detach()
    fused = {key for key in keys if ".bn" in key}
    freeze(model)
    assert fused <= set(model.state_dict()) <= keys
    assert not any(parameter.requires_grad for parameter in model.parameters())
    before = state_of(model.train())
    torch.testing.assert_close(model(images()), expected)
    assert moved(model, before) == []
    unfreeze(model)
    assert all(parameter.requires_grad for parameter in model.parameters()) and set(model.state_dict()) == keys
    model.train()(images()).sum().backward()
    assert not torch.equal(model.state_dict()["layer1.0.bn1.running_var"], before["layer1.0.bn1.running_var"])
    with pytest.raises(ValueError, match=r"SplitBatchNorm2d.*do without --split-bn"):
        convert_splitbn_model(model)


def test_frozen_norms_keep_their_scale() -> None:
    norm = freeze_batch_norm_2d(BatchNormLIF(3, num_steps=T).train())
    assert isinstance(norm, BatchNormLIF) and not norm.weight.requires_grad
    norm.norm.register_forward_hook(lambda module, inputs, output: None)
    x = torch.randn(2 * T, 3, 2, 2)
    expected = BatchNormLIF(3, num_steps=T).eval()(x)
    assert torch.equal(norm(x), expected)


def test_another_norm_in_its_place_runs() -> None:
    norm = BatchNormLIF(4, num_steps=T)
    norm.norm = nn.GroupNorm(2, 4)
    x = torch.randn(2 * T, 4, 3, 3)
    expected = LIF(CIFAR, T)(nn.GroupNorm(2, 4)(x))
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_replaced_and_parametrised_convolutions_train(packed: bool) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    replaced = network().train()
    for name, old in list(replaced.named_modules()):
        if isinstance(old, nn.Conv2d) and name.startswith("layer"):
            new = Doubled(old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=False)
            new.load_state_dict({"weight": old.weight / 2})
            parent, _, child = name.rpartition(".")
            setattr(replaced.get_submodule(parent), child, new)
    normed = network().train()
    for name, conv in list(normed.named_modules()):
        if isinstance(conv, nn.Conv2d) and name.startswith("layer"):
            parametrizations.weight_norm(conv)
    expected = network().train()
    for model in (expected, replaced, normed):
        model.set_spike_packing(packed)
    right = expected(images())
    for model in (replaced, normed):
        logits = model(images())
        torch.testing.assert_close(logits, right, rtol=1e-3, atol=1e-4)
        logits.sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "layer1" in name)


def test_a_spike_convolution_takes_the_arguments_of_conv2d() -> None:
    conv = SpikeConv2d(4, 6, 3, 1, 1, num_steps=T)
    down = type(conv)(conv.in_channels, 2, conv.kernel_size, conv.stride, conv.padding, bias=False)  # as LoRA does
    up = type(conv)(2, conv.out_channels, (1, 1), (1, 1), groups=conv.groups, bias=True)
    x = torch.randn(2 * T, 4, 5, 5)
    assert up(down(x)).shape == conv(x).shape and conv.bias is None
    biased = SpikeConv2d(4, 6, 3, padding=1, padding_mode="reflect", bias=True)
    assert torch.equal(convolve(biased, x, torch.empty(0, dtype=torch.uint8)), biased(x))


@pytest.mark.parametrize("drop_path", [0.0, 0.3], ids=["", "drop_path"])  # PyTorch's own norm on shortcuts then
@pytest.mark.parametrize("momentum", [0.1, None], ids=["momentum", "cumulative"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_checkpointing_updates_statistics_once(reentrant: bool, momentum: float | None, drop_path: float) -> None:
    plain = network(drop_path_rate=drop_path).train()
    for module in plain.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum
    checked = copy.deepcopy(plain)
    checked.set_grad_checkpointing(True)
    before = timm.layers.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(reentrant)
    try:
        for model in (plain, checked):
            torch.manual_seed(0)
            model(images().requires_grad_()).square().sum().backward()
    finally:
        timm.layers.set_reentrant_ckpt(before)
    assert moved(checked, plain.state_dict()) == []
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), checked.parameters(), strict=True))


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_of_linear_layers() -> None:
    model = network().eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert quantised(images()).shape == model(images()).shape


def test_swapped_axes_and_wrong_specs_are_sentences() -> None:
    with pytest.raises(ValueError, match="swap its first two axes"):
        network()(torch.zeros(T, 3, 3, 8, 8))
    with pytest.raises(ValueError, match="swap its first two axes"):
        GatedAttentionCoding(3, T)(torch.zeros(5, T, 3, 4, 4))
    with pytest.raises(ValueError, match=r"got \(3, 8, 8\): give an image its batch axis"):
        network()(torch.zeros(3, 8, 8))
    for wrong in (lambda: LIF(0.5), lambda: LIF(tau=2.0)):
        with pytest.raises(ValueError, match=r"expected spec as a LIFSpec.*LIFSpec\(decay=0.5"):
            wrong()
    for wrong in (lambda: LIF("cifar"), lambda: BatchNormLIF(3, 0.5), lambda: GatedAttentionCoding(3, T, 0.5)):
        with pytest.raises(ValueError, match="LIFSpec"):
            wrong()
    assert LIF(LIFSpec(decay=0.25)).spec.decay == 0.25


class LearnedThreshold(LIF):
    def __init__(self) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.ones(3, 1, 1))


def test_parameter_groups_spare_gate_neurons_norms_and_biases() -> None:
    model = network()
    decayed, spared = parameter_groups(model, 1e-3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (1e-3, 0.0)
    assert {names[id(p)] for p in decayed["params"]} == {
        name for name, p in model.named_parameters() if p.ndim > 1 and not name.startswith("encoder.")
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    own = nn.Sequential(nn.Conv2d(3, 3, 1), LearnedThreshold(), GatedAttentionCoding(3, T))
    assert [p.shape for p in parameter_groups(own, 1e-3)[0]["params"]] == [own[0].weight.shape]
    own[0].weight.requires_grad_(False)
    assert parameter_groups(own, 1e-3)[0]["params"] == []
    with pytest.raises(ValueError, match="weight_decay of at least 0"):
        parameter_groups(own, -1.0)


def test_a_gate_may_have_a_rate_of_its_own_which_schedulers_scale() -> None:
    model = network()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    plain = parameter_groups(model, 1e-3)
    assert parameter_groups(model, 1e-3, gate_lr=1.0) == plain and not [group for group in plain if "lr" in group]
    decayed, others, gate = parameter_groups(model, 1e-3, lr=0.2, gate_lr=0.1)
    assert decayed == plain[0] | {"lr": 0.2} and (others["weight_decay"], others["lr"]) == (0.0, 0.2)
    assert {names[id(p)] for p in gate["params"]} == {name for name in names.values() if name.startswith("encoder.")}
    assert (gate["weight_decay"], gate["lr"]) == (0.0, pytest.approx(0.02))
    found = [p for group in (decayed, others, gate) for p in group["params"]]
    assert len(found) == len({id(p) for p in found}) == len(names)
    optimizer = torch.optim.SGD([decayed, others, gate])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.1, 0.01])
    model.encoder.requires_grad_(False)
    for changes, message in (
        (dict(lr=0.1, gate_lr=0.1), "a gate that learns with gate_lr=0.1, got none"),
        (dict(gate_lr=0.1), "lr with gate_lr=0.1, a factor of it, got none"),
        (dict(lr=-0.1), "lr of at least 0, got -0.1"),
        (dict(lr=0.1, gate_lr=math.nan), "gate_lr of at least 0, got nan"),
        (dict(lr=0.1, gate_lr=True), "gate_lr of at least 0, got True"),
        (dict(gate_lr=None), "gate_lr of at least 0, got None"),
    ):
        with pytest.raises(ValueError, match=message):
            parameter_groups(model, 1e-3, **changes)


@pytest.mark.parametrize("copied", [False, True], ids=["original", "copy"])
def test_plain_weight_decay_on_a_gate_warns_once(copied: bool) -> None:
    model = copy.deepcopy(network()) if copied else network()
    model(images()).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.optim.SGD(model.parameters(), lr=0.0).step()
        torch.optim.AdamW(parameter_groups(model, 0.1), lr=0.0).step()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=5e-4)
    with pytest.warns(UserWarning, match="no weight decay on GatedAttentionCoding.*parameter_groups"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
