"""The published networks: their state dicts equal the facts, and the fast networks equal them in float64."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import timm_gac  # noqa: F401  (registers the models)
from timm_gac.models import published
from timm_gac.models.published import PublishedNet
from timm_gac.models.spiking_resnet import checkpoint_filter_fn

TOLERANCE = 1e-9  # of the largest value of each tensor compared, in float64

# The state dicts of the published code: tensors, parameters, and the SHA-256 of the sorted lines "name shape alias".
# fmt: off
FACTS = {
    ("gac_msresnet18_cifar", 4, 10):
        (415, 12633178, "58470153b200a9292165301b63db6872cf764a2882ad8692efcf2c6536bf17be"),
    ("gac_msresnet18_cifar", 6, 100):
        (415, 12679368, "349df50fec504d89f627b8292da82c5df981d3d1e340ec9ba0d02d41bda9f677"),
    ("gac_msresnet18", 4, 1000):
        (134, 11824824, "835aa3fb00115dd42952b2122f2a46e57a4c4633c38e7bf952f40085d30ecaec"),
    ("gac_msresnet34", 4, 1000):
        (230, 21932984, "0aae687b98d18ecf5c7c72e7acb015d7629c75a520b9d6338a6990897fc72766"),
    ("msresnet18_cifar", 4, 10):
        (411, 12502090, "9abdac6fd093311e00459da05be540cf70bf78764f88745aab6a0fd0a2433d1b"),
}
# fmt: on
FACTS_FILE = Path(__file__).parents[3] / "shared" / "design" / "published_state_dicts.json"


@dataclass(frozen=True)
class Case:
    """A network at a size that two cores can run in float64."""

    name: str
    num_steps: int
    num_classes: int
    size: int
    batch: int

    def published(self, seed: int = 0) -> PublishedNet:
        """The published network with random weights and statistics, such that neurons of every layer fire."""
        torch.manual_seed(seed)
        net = PublishedNet(self.name, self.num_classes, self.num_steps)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0.0, 0.3)
                nn.init.normal_(module.running_mean, 0.0, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        return net.double()

    def fast(self, file: Path) -> nn.Module:
        """The registered model with the weights of a published checkpoint."""
        return timm.create_model(
            self.name,
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(file), num_classes=self.num_classes),
            num_classes=self.num_classes,
            num_steps=self.num_steps,
            dtype=torch.float64,
        )

    def images(self, seed: int = 1) -> Tensor:
        """Images: (B, 3, H, W)."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch, 3, self.size, self.size, generator=generator, dtype=torch.float64)


CIFAR_GAC = Case("gac_msresnet18_cifar", 4, 10, size=10, batch=2)
CIFAR_DIRECT = Case("msresnet18_cifar", 4, 10, size=10, batch=2)
IMAGENET_18 = Case("gac_msresnet18", 4, 20, size=40, batch=2)
IMAGENET_34 = Case("gac_msresnet34", 4, 20, size=33, batch=2)
CIFAR_T6 = Case("gac_msresnet18_cifar", 6, 100, size=9, batch=1)
# Not the CIFAR dialect: gated spikes are below 1, its threshold, so one step cannot fire the first block's neuron.
IMAGENET_T1 = Case("gac_msresnet18", 1, 7, size=33, batch=1)
EVALUATED = [CIFAR_GAC, CIFAR_DIRECT, IMAGENET_18, IMAGENET_34, CIFAR_T6, IMAGENET_T1]
TRAINED = [CIFAR_GAC, CIFAR_DIRECT, IMAGENET_18, IMAGENET_34]


def layout(net: nn.Module) -> dict[str, dict[str, object]]:
    """Shape of every tensor by name, and the first name of the same tensor (not told for the scalar counters)."""
    first: dict[int, str] = {}
    facts: dict[str, dict[str, object]] = {}
    for name, tensor in net.state_dict().items():
        facts[name] = {"shape": list(tensor.shape)}
        original = first.setdefault(tensor.data_ptr(), name)
        if original != name and tensor.ndim > 0:
            facts[name]["same_tensor_as"] = original
    return facts


def save(net: nn.Module, file: Path, dtype: torch.dtype = torch.float64, prefix: str = "", wrapper: str = "") -> Path:
    """Write a checkpoint as the published code does: every name, shared tensors shared."""
    cast: dict[int, Tensor] = {}
    state = {}
    for name, tensor in net.state_dict().items():
        converted = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[prefix + name] = cast.setdefault(tensor.data_ptr(), converted)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, file)
    return file


def assert_equal(actual: Tensor, expected: Tensor, label: str) -> None:
    """Equal to `TOLERANCE` of the largest expected value, which must not be 0."""
    assert actual.shape == expected.shape, label
    scale, error = expected.abs().max().item(), (actual - expected).abs().max().item()
    assert scale > 0, f"{label}: nothing to compare, all zero"
    assert error <= TOLERANCE * scale, f"{label}: error {error:.3e} of {scale:.3e}"


@pytest.fixture
def firing_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Mean firing rate of every neuron layer of the published networks run in a test, in order."""
    rates: list[float] = []
    fire = published.fire

    def recorded(x: Tensor, spec: published.LIFSpec) -> Tensor:
        spikes = fire(x, spec)
        rates.append(spikes.detach().mean().item())
        return spikes

    monkeypatch.setattr(published, "fire", recorded)
    return rates


def assert_every_layer_fires(rates: list[float], case: Case) -> None:
    """One rate for each neuron layer, each well away from 0 and 1: the comparison is not one of silent networks."""
    blocks = sum(published.NETWORKS[case.name.removeprefix("gac_")][1])
    assert len(rates) == 2 * blocks + 1 + case.name.startswith("gac_")
    assert all(0.01 < rate < 0.99 for rate in rates), rates


@pytest.mark.parametrize("key", FACTS, ids=str)
def test_state_dict_has_the_published_layout(key: tuple[str, int, int]) -> None:
    name, num_steps, num_classes = key
    net = PublishedNet(name, num_classes, num_steps)
    lines = sorted(f"{n} {tuple(f['shape'])} {f.get('same_tensor_as', '')}" for n, f in layout(net).items())
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert (len(lines), sum(p.numel() for p in net.parameters()), digest) == FACTS[key]


@pytest.mark.skipif(not FACTS_FILE.is_file(), reason="the full list is not beside this checkout; its digests are")
def test_state_dict_equals_every_published_fact() -> None:
    facts = json.loads(FACTS_FILE.read_text())
    assert len(facts) == len(FACTS)
    for name, fact in facts.items():
        net = PublishedNet(name.rpartition("_t")[0], fact["num_classes"], fact["num_steps"])
        assert layout(net) == fact["state_dict"], name


@pytest.mark.parametrize("case", EVALUATED, ids=lambda case: f"{case.name}-t{case.num_steps}")
def test_eval_logits_equal(case: Case, tmp_path: Path, firing_rates: list[float]) -> None:
    net = case.published().eval()
    fast = case.fast(save(net, tmp_path / "published.pth")).eval()
    with torch.no_grad():
        assert_equal(fast(case.images()), net(case.images()), "logits")
    assert_every_layer_fires(firing_rates, case)


@pytest.mark.parametrize(
    ("dtype", "prefix", "wrapper"),
    [(torch.float32, "", ""), (torch.float32, "module.", "state_dict"), (torch.float64, "module.", "")],
    ids=str,
)
@pytest.mark.parametrize("case", [CIFAR_GAC, IMAGENET_18], ids=lambda case: case.name)
def test_eval_logits_equal_from_any_file(
    case: Case, dtype: torch.dtype, prefix: str, wrapper: str, tmp_path: Path
) -> None:
    net = case.published(seed=2)
    fast = case.fast(save(net, tmp_path / "published.pth.tar", dtype, prefix, wrapper)).eval()
    net = net.to(dtype).double().eval()
    with torch.no_grad():
        assert_equal(fast(case.images()), net(case.images()), "logits")


@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.name)
def test_train_loss_gradients_and_statistics_equal(case: Case, tmp_path: Path, firing_rates: list[float]) -> None:
    net = case.published().train()
    before = net.state_dict()["bn1.bn.running_var" if "cifar" in case.name else "conv1.1.bn.running_var"].clone()
    fast = case.fast(save(net, tmp_path / "published.pth")).train()
    target = torch.arange(case.batch) % case.num_classes
    losses, image_grads = [], []
    for model in (net, fast):
        images = case.images().requires_grad_()
        loss = F.cross_entropy(model(images), target)
        loss.backward()
        losses.append(loss.detach())
        image_grads.append(images.grad)
    assert_every_layer_fires(firing_rates, case)
    assert_equal(losses[1], losses[0], "loss")
    assert_equal(image_grads[1], image_grads[0], "gradient of the image")

    # The published gradients, under the published names, go through the filter that renames checkpoints.
    owners = {id(p): p for p in net.parameters()}
    grads = {name: p.grad for name, p in net.named_parameters(remove_duplicate=False) if id(p) in owners}
    renamed = checkpoint_filter_fn({**net.state_dict(), **grads}, fast)
    parameters = dict(fast.named_parameters())
    assert len(parameters) == len(owners)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert_equal(parameter.grad, renamed[name].reshape(parameter.shape), f"gradient of {name}")

    statistics = checkpoint_filter_fn(net.state_dict(), fast)
    for name, buffer in fast.named_buffers():
        expected = statistics[name]
        if name == "bn1.running_var":
            # Repeating an image T times changes no variance, only its unbiased factor n / (n - 1): one step of the
            # running average with n = B·H·W here, T·B·H·W there.
            n = case.batch * (case.size if "cifar" in case.name else (case.size + 1) // 2) ** 2
            repeated = n * case.num_steps
            step = (expected - 0.9 * before) * ((repeated - 1) / repeated) * (n / (n - 1))
            expected = 0.9 * before + step
        assert_equal(buffer.double(), expected.double(), name)


def test_unknown_name_says_which_exist() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*msresnet34.*got 'resnet18'"):
        PublishedNet("resnet18")
