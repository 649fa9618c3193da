"""The searches for launch parameters, as far as they go without a GPU: options, candidates, and a GPU's file."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import tyro

from gac_kernels import batch_stats, norm_lif, tuning, use_backend
from gac_kernels.norm import launch

pytest.importorskip("triton", reason="the searches time with Triton")

from timm_gac.bench.tune import convolutions, network, neuron, shared


def test_options() -> None:
    line = "--ops lif_fwd lif_bwd --dtypes bfloat16 --steps 4 --share 1 --update"
    given = tyro.cli(neuron.NeuronSearch, args=line.split())
    assert given == neuron.NeuronSearch(True, (4,), ("lif_fwd", "lif_bwd"), ("bfloat16",), share=1)
    given = tyro.cli(network.NetworkSearch, args=["gac_msresnet18_cifar", "--steps", "2", "4", "--batch", "64"])
    assert given == network.NetworkSearch("gac_msresnet18_cifar", steps=(2, 4), batch=64)
    given = tyro.cli(convolutions.ConvolutionSearch, args=["gac_msresnet18_cifar", "--dtype", "float16", "--share=0"])
    assert given == convolutions.ConvolutionSearch("gac_msresnet18_cifar", dtype="float16", share=0)


@pytest.mark.parametrize("module", [neuron, network, convolutions], ids=lambda module: module.__name__.split(".")[-1])
def test_help_says_how_to_call_it(module, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "--update" in shown and f"python -m {module.__name__}" in shown


def test_candidates_are_parameters_that_a_launch_has() -> None:
    for op in neuron.NeuronSearch().ops:
        found = list(neuron.candidates(op, neuron.ELEMENTS_PER_THREAD))
        assert found and all(config.keys() == tuning.DEFAULTS[op].keys() for config in found)
    for family in network.KERNELS.values():
        assert network.members(family)
        for config in network.candidates(family):
            assert config.keys() < tuning.DEFAULTS[family].keys()
    assert all(config.keys() == tuning.DEFAULTS["conv_lif_hopper"].keys() for config in convolutions.candidates())


def test_layers_of_a_network() -> None:
    layers = convolutions.layers_of("test_gac_msresnet", 16)
    assert len(layers) == len(set(layers)) > 1
    assert {layer.stride for layer in layers} <= {1, 2} and any(layer.residual for layer in layers)


def test_parameters_in_use(monkeypatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setitem(tuning.DEFAULTS, "lif_fwd", tuning.DEFAULTS["lif_fwd"])
    before = tuning.launch_config("lif_fwd", 4, 4, device)
    shared.use("lif_fwd", {"BLOCK": 64, "num_warps": 2})
    assert tuning.launch_config("lif_fwd", 4, 4, device) == {"BLOCK": 64, "num_warps": 2} != before
    tuning.launch_config.cache_clear()


def test_every_launch_is_recorded_and_takes_new_parameters(monkeypatch) -> None:
    monkeypatch.setitem(tuning.DEFAULTS, "norm_lif_fwd", tuning.DEFAULTS["norm_lif_fwd"])
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    launched: list[str] = []
    with use_backend("triton"):
        for config in (None, tuning.DEFAULTS["norm_lif_fwd"] | {"TILE": 64}):
            if config is not None:
                shared.use("norm_lif_fwd", config)
            for _ in range(2):
                mean, var = batch_stats(x)
                norm_lif(x, mean=mean, var=var, num_steps=2, batch_stats=True)
        before = launch._forward.cache_info().currsize
        with network.record_launches(launched):
            for _ in range(2):
                mean, var = batch_stats(x)
                norm_lif(x, mean=mean, var=var, num_steps=2, batch_stats=True).sum().backward()
    one = ["batch_stats", "norm_lif_fwd", "norm_lif_bwd_reduce", "norm_lif_bwd_apply"]
    assert launched == 2 * one and launch._forward.cache_info().currsize == before == 1
    shared.use("norm_lif_fwd", tuning.DEFAULTS["norm_lif_fwd"])
    assert launch._forward.cache_info().currsize == 0


def test_results_join_those_of_the_gpu(tmp_path, monkeypatch) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    shared.update({"lif_fwd": {"2:4": {"BLOCK": 1}}, "gac_fwd": {"2": {"BLOCK": 2}}})
    path = shared.update({"lif_fwd": {"2:8": {"BLOCK": 3}, "2:4": {"BLOCK": 4}}})
    assert path == tmp_path / "configs" / "Some_GPU.json"
    expected = {"gac_fwd": {"2": {"BLOCK": 2}}, "lif_fwd": {"2:4": {"BLOCK": 4}, "2:8": {"BLOCK": 3}}}
    assert json.loads(path.read_text()) == expected


def test_processes_that_compile(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["search"])
    shared.compile_in_processes("platform", 2)  # a module that takes any option
    with pytest.raises(SystemExit, match="expected all candidates to compile"):
        shared.compile_in_processes("json.tool", 1)  # and one that refuses --share
