"""`LIF` and `BatchNormLIF` against their plain compositions, number by number."""

import pytest
import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn

from gac_kernels import CIFAR, IMAGENET, LIFSpec, lif_reference
from timm_gac.layers.batch_statistics import batch_statistics, counter_beside
from timm_gac.layers.neuron import LIF, BatchNormLIF, MembraneBatchNormLIF
from warm import WarmPython

SPECS = pytest.mark.parametrize("spec", [CIFAR, IMAGENET], ids=["cifar", "imagenet"])
T, B, C, H, W = 3, 4, 5, 6, 7


def current(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained_pair(spec: LIFSpec, **kwargs) -> tuple[BatchNormLIF, nn.BatchNorm2d]:
    """A module under test and the batch norm with the same random parameters."""
    torch.manual_seed(0)
    fused, plain = BatchNormLIF(C, spec, dtype=torch.float64, **kwargs), nn.BatchNorm2d(C, dtype=torch.float64)
    nn.init.uniform_(plain.weight, 0.5, 1.5), nn.init.normal_(plain.bias)
    plain.running_mean.normal_(), plain.running_var.uniform_(0.5, 2.0)
    fused.load_state_dict(plain.state_dict())
    return fused, plain


@SPECS
def test_lif_folded_equals_unfolded_equals_reference(spec: LIFSpec) -> None:
    x = current(T, B, C, H, W)
    expected = lif_reference(x, spec)
    assert 0.05 < expected.mean() < 0.95
    torch.testing.assert_close(LIF(spec)(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(LIF(spec, T)(x.flatten(0, 1)), expected.flatten(0, 1), rtol=0, atol=0)


def test_lif_names_what_it_expects() -> None:
    with pytest.raises(ValueError, match="num_steps=3"):
        LIF(num_steps=3)(torch.zeros(4, 2))
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="num_steps"):
            LIF(num_steps=wrong)


@SPECS
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no_residual"])
def test_batch_norm_lif_is_its_composition(spec: LIFSpec, train: bool, with_residual: bool) -> None:
    fused, plain = trained_pair(spec, num_steps=T)
    fused.train(train), plain.train(train)
    inputs = [current(T * B, C, H, W, seed=seed).requires_grad_() for seed in (1, 2)[: 1 + with_residual]]
    twins = [x.detach().clone().requires_grad_() for x in inputs]
    actual = fused(*inputs)
    membrane = plain(twins[0]) + (twins[1] if with_residual else 0)
    expected = lif_reference(membrane.unflatten(0, (T, B)), spec).flatten(0, 1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grad = current(T * B, C, H, W, seed=3)
    actual.backward(grad), expected.backward(grad)
    for name, a, b in [("x", inputs[0], twins[0]), ("residual", inputs[-1], twins[-1])]:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(fused.get_parameter(name).grad, parameter.grad, rtol=1e-12, atol=1e-12)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(fused.get_buffer(name), buffer, rtol=1e-14, atol=1e-14)


def test_membrane_comes_back_beside_the_spikes() -> None:
    fused, plain = trained_pair(CIFAR, num_steps=T)
    module = MembraneBatchNormLIF(C, CIFAR, T, dtype=torch.float64)
    module.load_state_dict(plain.state_dict())
    x, residual = current(T * B, C, H, W, seed=1), current(T * B, C, H, W, seed=2)
    membrane, spikes = module(x, residual)
    torch.testing.assert_close(membrane, plain(x) + residual, rtol=0, atol=1e-14)
    torch.testing.assert_close(spikes, fused(x, residual), rtol=0, atol=0)


def test_time_as_an_axis_of_its_own() -> None:
    folded, plain = trained_pair(CIFAR, num_steps=T)
    unfolded = BatchNormLIF(C, CIFAR, dtype=torch.float64)
    unfolded.load_state_dict(plain.state_dict())
    x = current(T, B, C, H, W)
    torch.testing.assert_close(unfolded(x).flatten(0, 1), folded(x.flatten(0, 1)), rtol=0, atol=0)
    with pytest.raises(ValueError, match="num_steps"):
        folded(x)
    with pytest.raises(ValueError, match="num_steps"):
        unfolded(x.flatten(0, 1))


@pytest.mark.parametrize("kwargs", [dict(momentum=None), dict(affine=False), dict(track_running_stats=False)])
def test_options_of_batch_norm(kwargs: dict) -> None:
    module, plain = MembraneBatchNormLIF(C, CIFAR, T, **kwargs), nn.BatchNorm2d(C, **kwargs)
    for train in (True, True, False):
        module.train(train), plain.train(train)
        x = current(T * B, C, H, W, seed=int(train)).float()
        torch.testing.assert_close(module(x)[0], plain(x), rtol=1e-5, atol=1e-6)
    assert module.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_on_another_device_counts(momentum: float | None) -> None:
    other = "cuda" if torch.cuda.is_available() else "meta"  # as timm's unfreeze leaves it: on a GPU it is on the CPU
    norms = [nn.BatchNorm2d(C, momentum=momentum) for _ in range(2)]
    counter = norms[0].num_batches_tracked = norms[0].num_batches_tracked.to(other)
    x = current(T * B, C, H, W).float()
    if momentum is None and other == "meta":  # whose values are not known
        assert counter_beside(x, counter) is None and counter_beside(x, None) is None
        return
    found = [batch_statistics(norm, x, norm._buffers) for norm in norms]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert torch.equal(norms[0].running_mean, norms[1].running_mean) and norms[1].num_batches_tracked == 1
    assert counter is norms[0].num_batches_tracked and (other == "meta" or counter == 1)


def test_drop_path_drops_a_sample_at_all_steps() -> None:
    torch.manual_seed(0)
    module = MembraneBatchNormLIF(C, CIFAR, T, drop_path=0.5)
    x, batch = current(T * 64, C, 2, 2).float(), 64
    membrane = module(x)[0].unflatten(0, (T, batch))
    kept = membrane.abs().sum((0, 2, 3, 4)) > 0
    assert 16 < kept.sum() < 48
    expected = 2 * nn.BatchNorm2d(C)(x).unflatten(0, (T, batch)) * kept[:, None, None, None]
    torch.testing.assert_close(membrane, expected, rtol=1e-5, atol=1e-6)
    module.eval()
    assert module(x)[0].unflatten(0, (T, batch)).abs().sum((0, 2, 3, 4)).min() > 0


def test_channels_last_gives_the_same() -> None:
    fused, _ = trained_pair(IMAGENET, num_steps=T)
    fused.eval()
    x, residual = current(T * B, C, H, W, seed=1), current(T * B, C, H, W, seed=2)
    expected = fused(x, residual)
    channels_last = fused(x.to(memory_format=torch.channels_last), residual)
    torch.testing.assert_close(channels_last, expected, rtol=0, atol=0)
    assert channels_last.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "convert", [nn.SyncBatchNorm.convert_sync_batchnorm, convert_sync_batchnorm], ids=["torch", "timm"]
)
def test_sync_batch_norm_conversion_keeps_the_neuron(convert) -> None:
    fused, plain = trained_pair(CIFAR, num_steps=T)
    x = current(T * B, C, H, W)
    expected = fused(x)
    fused.load_state_dict(plain.state_dict())
    converted = convert(fused)
    assert isinstance(converted, BatchNormLIF) and isinstance(converted.norm, nn.SyncBatchNorm)
    assert converted.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(converted(x), expected, rtol=0, atol=0)


SYNC_SCRIPT = """
import os, sys, torch, torch.distributed as dist
from torch import nn
from timm_gac.layers.neuron import MembraneBatchNormLIF
other = os.fork()
rank = int(other == 0)
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=2)
torch.manual_seed(0)
whole, plain = torch.randn(2 * 5, 3, 4, 4, dtype=torch.float64), nn.BatchNorm2d(3, dtype=torch.float64)
nn.init.uniform_(plain.weight), nn.init.normal_(plain.bias)
module = MembraneBatchNormLIF(3, num_steps=1, dtype=torch.float64)
module.load_state_dict(plain.state_dict())
module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
part = slice(0, 4) if rank == 0 else slice(4, 10)  # shares of different size
x, twin = whole[part].clone().requires_grad_(), whole.clone().requires_grad_()
grad = torch.randn_like(whole)
y, expected = module(x)[0], plain(twin)
(y * grad[part]).sum().backward(), (expected * grad).sum().backward()
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
close(y, expected[part]), close(x.grad, twin.grad[part])
close(module.running_mean, plain.running_mean), close(module.running_var, plain.running_var)
for name, parameter in plain.named_parameters():
    total = module.get_parameter(name).grad
    dist.all_reduce(total)
    close(total, parameter.grad)
assert module.num_batches_tracked == 1
dist.destroy_process_group()
if rank == 0:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
"""


def test_sync_batch_norm_of_two_processes_equals_one_of_the_whole_batch(warm_python: WarmPython, tmp_path) -> None:
    done = warm_python(["-c", SYNC_SCRIPT, str(tmp_path / "store")])
    assert done.returncode == 0, done.stderr
