"""Each decomposition gives its operator's values, dtypes and memory formats; on a CPU's plain PyTorch the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gac_kernels import CIFAR, LIFSpec, use_backend
from gac_kernels.decompositions import decomposition_table, registered_decompositions

T, B, C, H = 3, 2, 5, 6
SPECS = {"cifar": CIFAR, "soft": LIFSpec(threshold=0.5, decay=0.25, reset="soft")}
OTHERS = {name: LIFSpec(threshold=0.5, reset="soft", neuron=name) for name in ("ternary", "adaptive")}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def frames(layout: torch.memory_format, *, channels: int = C, scale: float = 1.0) -> Tensor:
    return torch.randn(T * B, channels, H, H).mul_(scale).contiguous(memory_format=layout)


def arguments(name: str, spec: LIFSpec, layout: torch.memory_format) -> list[tuple]:
    """Calls of an operator: with all that it may be given, and with as little as it may be."""
    x, stem = frames(layout), frames(layout)[:B]
    spikes = (frames(layout) > 0).to(torch.int8)
    weight = torch.randint(-128, 128, (C, C, 3, 3), dtype=torch.int8).contiguous(memory_format=layout)
    vectors = [torch.rand(C) + 0.5 for _ in range(4)]
    scale, bias = (torch.randint(-64, 64, (C,)) * 2.0**-12 for _ in range(2))
    wide, side = frames(layout, channels=2), torch.randn(C, 2, 1, 1)
    static, varying = (stem, stem.cos()), [y.unflatten(0, (T, B)) for y in (x, x.cos())]
    rows = torch.randn(T, 7)
    op, forward = spec.op_arguments, spec.forward_arguments if spec.is_lif else ()  # of a LIF alone
    norm = (*vectors, None, 1e-5, T, *op, False)
    values = torch.rand(4, C) * 0.8 + 0.1  # decays and thresholds of two neurons
    return {
        "lif": [
            (x.unflatten(0, (T, B)), None, *op, False, False),
            (rows, rows[0] if spec.neuron != "adaptive" else rows[:2], *op, False, True),
            (x.unflatten(0, (T, B)), None, *op, False, True, values[:2]),
        ],
        "integer_lif": [(x, T, *forward)],
        "norm_lif": [
            (x, None, *norm, False, ""),
            (x, frames(layout), *norm, True, "", *vectors, 1e-3),
            (x, frames(layout), None, vectors[1], None, None, None, 0.0, T, *op, False, True, ""),
            (x, None, *norm, False, "", None, None, None, None, 0.0, False, values[:2]),
        ],
        "gated_lif": [
            *((*pair, torch.randn(B, T), *op) for pair in (static, varying)),
            (*varying, torch.randn(B, T), *op, values[:2]),
        ],
        "gac_fire": [
            *((*pair, torch.randn(B, T), n, *op) for n, pair in enumerate((static, varying))),
            (*static, torch.randn(B, T), False, *op, values),
        ],
        "pad_frames": [(x, 1, 2, True), (x, 2, 0, False)],
        "pool_frames": [(x,)],
        "firing_rate": [(x, T), (spikes, T, torch.float64)],
        "conv_lif": [
            (x, weight.float() / 99, bias, None, T, 2, *forward, False),
            (x, weight.float() / 99, bias, wide, T, 1, *forward, True, side),
        ],
        "spike_conv": [
            (spikes, weight, scale, bias, None, T, 2, *forward, True),
            (spikes, weight, scale, bias, x, T, 1, *forward, True, 2.0**-12),
            (spikes, weight, scale, bias, spikes, T, 1, *forward, False),
            (spikes, weight, scale, bias, wide, T, 1, *forward, True, 2.0**-12, side),
        ],
    }[name]


def check(op, spec: LIFSpec, layout: str, learned: bool = True) -> None:
    decomposition = decomposition_table()[op]
    with use_backend("eager"):
        for given in arguments(decomposition.__name__, spec, FORMATS[layout]):
            if not learned and isinstance(given[-1], Tensor) and given[-1].dim() == 2 and given[-1].shape[1] == C:
                continue  # values (2, C) or (4, C)
            expected, found = op(*given), decomposition(*given)
            assert isinstance(found, tuple) == isinstance(expected, tuple)
            pairs = zip(*((y if isinstance(y, tuple) else (y,)) for y in (expected, found)), strict=True)
            for number, (want, got) in enumerate(pairs):
                torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text, n=number: f"output {n}: {text}")
                assert got.stride() == want.stride(), number


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("op", decomposition_table(), ids=lambda op: op._schema.name.removeprefix("gac_kernels::"))
def test_a_decomposition_is_its_operator(op, spec: str, layout: str) -> None:
    check(op, SPECS[spec], layout)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("spec", OTHERS)
@pytest.mark.parametrize("name", ["lif", "norm_lif", "gated_lif", "gac_fire"])
def test_registered_neurons(name: str, spec: str, layout: str) -> None:
    check(getattr(torch.ops.gac_kernels, name).default, OTHERS[spec], layout, learned=False)


def test_what_a_backward_pass_wants_stays_an_operator() -> None:
    table = {function.__name__: function for function in decomposition_table().values()}
    (call, *_) = arguments("lif", CIFAR, torch.contiguous_format)
    assert table["lif"](*call[:-2], True, False) is NotImplemented
    call = arguments("norm_lif", CIFAR, torch.contiguous_format)[1]
    assert table["norm_lif"](*call, True) is NotImplemented


def test_pytorch_s_table_has_them_within_the_context_only() -> None:
    table, op = torch._decomp.decomposition_table, torch.ops.gac_kernels.lif.default
    with pytest.raises(RuntimeError, match="inside"), registered_decompositions():
        assert table[op] is decomposition_table()[op]
        raise RuntimeError("inside")
    assert op not in table


def test_no_operator_is_in_the_table_of_torch_compile() -> None:
    from torch._inductor.decomposition import select_decomp_table

    assert not decomposition_table().keys() & select_decomp_table().keys()
