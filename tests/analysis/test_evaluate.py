"""`evaluate` and `calibrate` leave modes and momenta as they were, and refuse logits that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

import timm_gac  # noqa: F401 (registers the models)
from timm_gac.analysis.evaluate import evaluate
from timm_gac.analysis.inspect import inspect_network
from timm_gac.analysis.inspect.figures import choose_trains
from timm_gac.hub import calibrate
from timm_gac.layers.neuron import BatchNormLIF


@pytest.fixture
def model() -> nn.Module:
    """In training mode, with a frozen stem."""
    model = timm.create_model("test_gac_msresnet", num_classes=10, num_steps=2).train()
    model.bn1.eval()
    return model


def failing() -> Iterator[tuple[Tensor, Tensor]]:
    yield torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)
    raise OSError("a worker died")


def test_modes_of_all_modules_are_restored(model: nn.Module) -> None:
    before = [module.training for module in model.modules()]
    with pytest.raises(OSError, match="a worker died"):
        evaluate(model, failing())
    assert [module.training for module in model.modules()] == before
    evaluate(model, [next(failing())])
    assert [module.training for module in model.modules()] == before and not model.bn1.training


@pytest.mark.parametrize("watched", [False, True])
def test_a_first_batch_that_runs_twice_counts_once(
    watched: bool, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it does on a GPU, while its kernels are compiled; not where a hook of one's own would see it twice."""
    batches = [(torch.randn(2, 3, 16, 16), torch.zeros(2, dtype=torch.long)) for _ in range(2)]
    once = evaluate(model, batches)
    calls = list[int]()

    def twice(function: Callable[[], Tensor], device: torch.device) -> Tensor:
        calls.append(1)
        function()
        return function()

    monkeypatch.delenv("TIMM_GAC_COMPILE_AHEAD", raising=False)
    monkeypatch.setattr("timm_gac.analysis.evaluate.compile_ahead", twice)
    if watched:
        model.get_submodule("layer1.0").register_forward_hook(lambda *_: None)
    again = evaluate(model, batches)
    assert len(calls) == (not watched)
    assert again.firing_rates == once.firing_rates and again.loss == once.loss and again.images == 4


def test_calibration_restores_after_an_error(model: nn.Module) -> None:
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm2d, BatchNormLIF))]
    momenta, before = [norm.momentum for norm in norms], [module.training for module in model.modules()]
    with pytest.raises(OSError, match="a worker died"):
        calibrate(model, (images for images, _ in failing()))
    assert [norm.momentum for norm in norms] == momenta and None not in momenta
    assert [module.training for module in model.modules()] == before
    assert not calibrate(model, [next(failing())[0]]).training


def test_logits_that_are_not_finite_are_refused(model: nn.Module) -> None:
    images, labels = next(failing())
    images[0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match="expected finite logits, got a loss of nan"):
        evaluate(model, [(images, labels)])
    with pytest.raises(ValueError, match="expected finite logits, got NaN or infinity"):
        inspect_network(model.eval(), [images])
    model.fc.bias.data[3] = torch.nan
    with pytest.raises(ValueError, match=r"expected finite weights .* in fc\.bias"):
        evaluate(model, [next(failing())])


def test_a_raster_shows_neurons_that_fire_at_every_step() -> None:
    spikes = torch.zeros(4, 100)
    spikes[:, :40] = 1  # at every step
    spikes[1::2, 40:80] = 1  # at every second
    trains = choose_trains(spikes[:, :, None, None], 24)
    assert trains.shape == (4, 24)
    assert trains.float().mean(1).tolist() == pytest.approx([0.5, 1, 0.5, 1], abs=0.05)
    few = torch.zeros(4, 100)
    few[2, 7] = 1
    assert choose_trains(few[:, :, None, None], 24).sum() == 1
