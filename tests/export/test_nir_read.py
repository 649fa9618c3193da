"""NIR files of other frameworks on this package's neurons: layers by their equations, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import nir
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gac_kernels import LIFSpec
from timm_gac.export import read_nir
from timm_gac.inference.record import record_spikes

DT = 1e-4


def lif(count: int | tuple[int, ...] = 4, **changes: float) -> nir.LIF:
    constants = dict(tau=2e-4, r=2.0, v_leak=0.0, v_threshold=1.0, v_reset=0.0) | changes
    return nir.LIF(**{name: np.full(count, value) for name, value in constants.items()})


def chain(*nodes: nir.NIRNode, shape: tuple[int, ...] = (4,)) -> nir.NIRGraph:
    """A graph of an input of this shape, nodes and an output, without checks of shapes."""
    ends = nir.Input(np.array(shape)), nir.Output(np.array(shape))
    return nir.NIRGraph.from_list(ends[0], *nodes, ends[1], type_check=False)


def saved(graph: nir.NIRGraph, folder: Path) -> Path:
    nir.write(folder / "graph.nir", graph)
    return folder / "graph.nir"


def euler(node: nir.NIRNode, x: np.ndarray, dt: float) -> np.ndarray:
    """Spikes of a neuron by forward Euler steps of its equation, in float64."""
    v, out = np.zeros_like(x[0]), []
    for current in x:
        slope = node.r * current if isinstance(node, nir.IF) else ((node.v_leak - v) + node.r * current) / node.tau
        v = v + dt * slope
        out.append(v > node.v_threshold)
        v = np.where(out[-1], node.v_reset, v)
    return np.stack(out)


@pytest.mark.parametrize(
    ("node", "dt"),
    [
        (lif(), None),
        (lif(tau=4e-4 / 3, r=4 / 3, v_threshold=0.5), None),
        (
            lif(tau=1e-3, r=1.0, v_threshold=0.07),
            None,
        ),  # an input counts dt/tau times, as in Norse
        (lif(tau=3.0, r=1.0, v_threshold=0.3), 1.0),  # time in steps, as sinabs has it
        (lif(tau=DT, r=1.0), None),
        (nir.IF(r=np.full(4, 1e4), v_threshold=np.full(4, 1.5), v_reset=np.zeros(4)), None),
        (nir.IF(r=np.ones(4), v_threshold=np.full(4, 1.5), v_reset=np.zeros(4)), 1.0),
        (lif(1), None),  # one constant for all, as snnTorch writes it
    ],
)
def test_neurons_follow_their_equation(node: nir.NIRNode, dt: float | None, tmp_path: Path) -> None:
    x = torch.randn(12, 5, 4, dtype=torch.float64) + 0.3
    spikes = read_nir(saved(chain(node), tmp_path), dt=dt)(x)
    expected = euler(node, x.numpy(), dt or DT)
    np.testing.assert_array_equal(spikes.numpy(), expected)
    assert 0.05 < expected.mean() < 0.95


def test_a_membrane_at_its_threshold_does_not_fire() -> None:
    x = torch.tensor([1.0, 0.5, 0.75, 0.1]).view(4, 1, 1)  # membranes 1, 1, 1.25 and, after the reset, 0.1
    assert read_nir(chain(lif(1), shape=(1,)))(x).flatten().tolist() == [0, 0, 1, 0]


def cuba(**changes: float) -> nir.CubaLIF:
    constants = dict(tau_syn=DT, tau_mem=2e-4, r=2.0, v_leak=0.0, v_threshold=1.0, v_reset=0.0, w_in=0.5) | changes
    return nir.CubaLIF(**{name: np.full(4, value) for name, value in constants.items()})


def test_a_synapse_that_forgets_at_once_is_none() -> None:
    x = torch.randn(8, 3, 4).double()
    assert torch.equal(read_nir(chain(cuba()))(x), read_nir(chain(lif()))(0.5 * x))


def array(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


CONV = dict(stride=(2, 1), padding=(1, 0), dilation=1, groups=2, bias=array(4), input_shape=(6, 7))
KERNEL = array(4, 2, 3, 3)
VECTOR = torch.from_numpy(array(4))


@pytest.mark.parametrize(
    ("nodes", "shape", "expected"),
    [
        ([nir.Linear(weight=array(3, 4))], (4,), lambda x: x @ torch.from_numpy(array(3, 4)).T),
        ([nir.Affine(weight=array(3, 3), bias=np.ones(3))], (3,), lambda x: x @ torch.from_numpy(array(3, 3)).T + 1),
        ([nir.Scale(scale=array(4))], (4,), lambda x: x * VECTOR),
        (
            [nir.Conv2d(weight=KERNEL, **CONV)],
            (4, 6, 7),
            lambda x: F.conv2d(x, torch.from_numpy(KERNEL), VECTOR, (2, 1), (1, 0), 1, 2),
        ),
        (
            [nir.Conv2d(weight=KERNEL, **CONV | dict(stride=1, padding="same", groups=1))],
            (2, 6, 7),
            lambda x: F.conv2d(x, torch.from_numpy(KERNEL), VECTOR, padding="same"),
        ),
        (
            [nir.Conv1d(9, KERNEL[..., 0], 2, 1, 1, 1, array(4))],
            (2, 9),
            lambda x: F.conv1d(x, torch.from_numpy(KERNEL[..., 0]), VECTOR, 2, 1),
        ),
        (
            [nir.AvgPool2d(np.array([2, 3]), np.array([2, 2]), np.array([1, 1]))],
            (2, 6, 7),
            lambda x: F.avg_pool2d(x, (2, 3), (2, 2), (1, 1)),
        ),
        (
            [nir.SumPool2d(np.array([2, 3]), np.array([2, 2]), np.array([1, 1]))],
            (2, 6, 7),
            lambda x: F.avg_pool2d(x, (2, 3), (2, 2), (1, 1)) * 6,
        ),
        ([nir.Flatten(np.array([2, 3, 4]), 0, 1)], (2, 3, 4), lambda x: x.flatten(1, 2)),
        # The first axis counts from the batch here, as PyTorch has it: a Linear takes vectors all the same.
        (
            [nir.Flatten(np.array([3, 4]), 1, -1), nir.Linear(weight=array(3, 12))],
            (3, 4),
            lambda x: x.flatten(1) @ torch.from_numpy(array(3, 12)).T,
        ),
        # More padding than half of a window, which PyTorch's pools refuse.
        (
            [nir.SumPool2d(np.array([2, 1]), np.array([2, 2]), np.array([3, 1]))],
            (2, 6, 7),
            lambda x: F.avg_pool2d(F.pad(x, (1, 1, 3, 3)), (2, 1), 2) * 2,
        ),
        ([chain(nir.Scale(scale=array(4)), lif())], (4,), None),
    ],
)
def test_layers(nodes: list[nir.NIRNode], shape: tuple[int, ...], expected, tmp_path: Path) -> None:
    x = torch.randn(3, 2, *shape, dtype=torch.float64)
    found = read_nir(saved(chain(*nodes, shape=shape), tmp_path))(x)
    if expected is None:
        wanted = read_nir(chain(nir.Scale(scale=array(4)), lif()))(x)
    else:
        wanted = expected(x.flatten(0, 1)).unflatten(0, (3, 2))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_flatten_gives_vectors_behind_neurons_and_out_of_a_graph_too() -> None:
    """The first axis counts from the batch, as snnTorch and SpikingJelly have it."""
    flatten, linear = nir.Flatten(np.array([3, 4]), 1, -1), nir.Linear(weight=array(3, 12))
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64)
    expected = torch.from_numpy(euler(lif(12), x.flatten(2).numpy(), DT)).double() @ linear_weight(linear)
    inner = chain(flatten, lif(12), shape=(3, 4))
    for nodes in ((flatten, lif(12), linear), (inner, linear), (flatten, chain(lif(12), linear, shape=(12,)))):
        found = read_nir(chain(*nodes, shape=(3, 4)))(x)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert read_nir(inner)(x).shape == (5, 2, 3, 4)  # nothing says that vectors are wanted


def linear_weight(node: nir.Linear) -> torch.Tensor:
    return torch.from_numpy(node.weight).T


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (chain(nir.Linear(array(3, 5))), r"got \(4,\) at 'linear', which does not take it \(mat1 and mat2"),
        (chain(nir.Conv2d(weight=KERNEL, **CONV), shape=(3, 6, 7)), r"got \(3, 6, 7\) at 'conv2d', which does not"),
        (chain(chain(nir.Scale(array(3)))), r"got \(4,\) at 'scale', which does not take it"),
        (chain(nir.Affine(array(4, 4), np.ones(3))), r"expected the bias of 'affine' as \(4,\), got \(3,\)"),
        (
            chain(nir.Conv2d(weight=KERNEL, **CONV | dict(bias=np.ones(2))), shape=(4, 6, 7)),
            r"expected the bias of 'conv2d' as \(4,\), got \(2,\)",
        ),
        (
            chain(nir.Conv2d(weight=KERNEL, **CONV | dict(padding="same")), shape=(4, 6, 7)),
            r"expected padding in numbers for the stride \(2, 1\) of 'conv2d', got 'same'",
        ),
    ],
)
def test_nodes_that_do_not_fit_are_named_when_the_file_is_read(graph: nir.NIRGraph, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_nir(graph)


def test_an_input_of_another_dtype_is_one_sentence() -> None:
    network = read_nir(chain(nir.Linear(weight=array(4, 4)), lif()))
    with pytest.raises(ValueError, match=r"expected x in torch\.float64 as the weights are, got torch\.float32"):
        network(torch.zeros(2, 1, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert network.float()(torch.zeros(2, 1, 4)).shape == (2, 1, 4)


def test_edges_into_a_node_are_summed_and_weights_learn(tmp_path: Path) -> None:
    nodes = {
        "in": nir.Input(np.array([4])),
        "keys": nir.Linear(weight=array(4, 4)),  # a name that nn.Module's containers keep for themselves
        "a.b": lif(),
        "a_b": nir.Scale(scale=np.full(4, 0.5)),
        "out": nir.Output(np.array([4])),
    }
    edges = [("in", "keys"), ("in", "a.b"), ("keys", "a.b"), ("a.b", "a_b"), ("in", "a_b"), ("a_b", "out")]
    network = read_nir(saved(nir.NIRGraph(nodes, edges), tmp_path))
    x = torch.randn(6, 2, 4, dtype=torch.float64)
    with record_spikes(network) as recording:
        out = network(x)
    spikes = euler(nodes["a.b"], (x + x @ torch.from_numpy(array(4, 4)).T).numpy(), DT)
    (found,) = recording.spikes.values()
    np.testing.assert_array_equal(found.view_as(x).detach().numpy(), spikes)
    torch.testing.assert_close(out, 0.5 * (torch.from_numpy(spikes).double() + x), rtol=0, atol=0)
    out.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())
    with pytest.raises(ValueError, match=r"expected \(T, B, 4\), got \(6, 2, 5\)"):
        network(torch.zeros(6, 2, 5))


def graph_of(edges: str, **nodes: nir.NIRNode) -> nir.NIRGraph:
    """A graph with an output and edges such as "in>lif lif>out"."""
    return nir.NIRGraph(
        nodes | {"out": nir.Output(np.array([4]))}, [tuple(edge.split(">")) for edge in edges.split()], type_check=False
    )


IN = nir.Input(np.array([4]))


def uneven(**values: list[float]) -> nir.LIF:
    node = lif()
    for name, value in values.items():
        setattr(node, name, np.array(value))
    return node


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (
            graph_of("in>lif lif>back back>lif lif>out", **{"in": IN}, lif=lif(), back=nir.Linear(array(4, 4))),
            r"expected a graph without cycles, got '(lif|back)' -> .*: recurrent connections do not run here",
        ),
        (
            graph_of("a>lif b>lif lif>out", a=IN, b=IN, lif=lif()),
            r"expected one node of kind Input, got 2 \['a', 'b'\]",
        ),
        (
            chain(uneven(v_threshold=[1, 1, 2, 1])),
            "expected one v_threshold for all neurons of 'lif', got 2 different ones from 1 to 2",
        ),
        (chain(uneven(tau=[2e-4, 3e-4, 2e-4, 2e-4])), "expected one tau for all neurons of 'lif'"),
        (chain(lif(v_reset=-0.5)), "expected v_reset = 0 in 'lif', got -0.5"),
        (chain(lif(v_leak=0.1)), "expected v_leak = 0 in 'lif', got 0.1"),
        (chain(lif(tau=5e-5)), r"expected a time constant of at least dt = 0.0001 in 'lif', got 5e-05: give the dt"),
        (chain(lif(r=-2.0)), "expected a resistance above 0 in 'lif', got an input factor of -1"),
        (chain(lif(v_threshold=0.0)), "got 'lif': expected a finite threshold > 0, got 0.0"),
        (chain(cuba(tau_syn=1e-3)), "expected tau_syn = dt = 0.0001 in 'cubalif'"),
        (chain(nir.LI(tau=np.ones(4), r=np.ones(4), v_leak=np.zeros(4))), "got 'li' of kind LI: it does not run here"),
        (chain(nir.Delay(delay=np.ones(4))), "expected nodes out of Affine, AvgPool2d, .*, got 'delay' of kind Delay"),
        (
            chain(nir.Linear(weight=array(2, 3, 4))),
            r"expected the weight of 'linear' as \(outputs, inputs\), got \(2, 3, 4\)",
        ),
        (graph_of("a>out", a=IN, lif=lif()), "expected an edge into 'lif', got none"),
        (lif(), "expected a graph, got a LIF"),
    ],
)
def test_what_does_not_run_is_refused_by_name(graph: nir.NIRNode, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_nir(graph)


def test_sums_of_two_shapes_are_refused_and_dtypes_made_one() -> None:
    wide = nir.Affine(array(4, 4).astype(np.float32), np.zeros(4))  # a bias in float64, as other writers leave it
    network = read_nir(graph_of("in>wide in>narrow wide>out", **{"in": IN}, wide=wide, narrow=nir.Linear(array(1, 4))))
    assert network(torch.zeros(2, 3, 4)).dtype == torch.float32
    edges = "in>wide in>narrow wide>out narrow>out"
    graph = graph_of(edges, **{"in": IN}, wide=wide, narrow=nir.Linear(array(1, 4)))
    with pytest.raises(ValueError, match=r"one shape from all edges into 'out', got \((1|4),\) and \((1|4),\)"):
        read_nir(graph)
    with pytest.raises(ValueError, match="expected dt > 0, got 'soon'"):
        read_nir(graph_of("in>wide wide>out", **{"in": IN}, wide=wide), dt="soon")  # type: ignore[arg-type]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is none: check the path"):
        read_nir(tmp_path / "missing.nir")
    path = saved(chain(nir.Linear(weight=array(4, 4)), lif()), tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"expected .*graph\.nir to hold a NIR graph, got what nir cannot read"):
        read_nir(path)


def images(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1)) * 3


def test_a_network_of_snntorch(needs, tmp_path: Path) -> None:
    snn = needs("snntorch")
    needs("nirtorch")
    from snntorch.export_nir import export_to_nir

    def neuron(*shape: int) -> nn.Module:  # their export wants constants in the shape of the layer
        constants = dict(beta=torch.full(shape, 0.8), threshold=torch.full(shape, 0.15))
        return snn.Leaky(**constants, reset_mechanism="zero", reset_delay=False, init_hidden=True)

    theirs = nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        neuron(6, 8, 8),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 8, 3, bias=False),
        neuron(8, 2, 2),
        nn.Flatten(),
        nn.Linear(8 * 2 * 2, 10),
        neuron(10),
    )
    frames = images(9, 4, 2, 16, 16)
    path = saved(export_to_nir(theirs, frames[0], ignore_dims=[0]), tmp_path)
    for layer in theirs:
        if isinstance(layer, snn.Leaky):
            layer.reset_mem()
    with torch.no_grad():
        expected = torch.stack([theirs(frame) for frame in frames])
        found = read_nir(path)(frames)
    assert 0.05 < expected.mean() < 0.95
    assert torch.equal(found, expected)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="SpikingJelly needs Python 3.11")
def test_a_network_of_spikingjelly(needs, tmp_path: Path) -> None:
    needs("spikingjelly"), needs("nirtorch")
    from spikingjelly.activation_based import functional, layer, neuron
    from spikingjelly.activation_based.nir_exchange import export_to_nir

    theirs = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1),
        neuron.LIFNode(tau=1.6, decay_input=False, v_threshold=0.4),
        layer.AvgPool2d(2),
        layer.Conv2d(6, 8, 3),
        neuron.LIFNode(tau=3.0, v_threshold=0.1),
        layer.Flatten(),
        layer.Linear(8 * 9, 10),
        neuron.IFNode(v_threshold=0.4),
    )
    frames = images(9, 4, 2, 10, 10)
    path = saved(export_to_nir(theirs, frames[0]), tmp_path)
    functional.reset_net(theirs)
    with torch.no_grad():
        expected = torch.stack([theirs(frame) for frame in frames])
        network = read_nir(path)
        found = network(frames)
    assert 0.05 < expected.mean() < 0.95
    assert torch.equal(found, expected)
    thresholds = [module.spec.threshold for module in network.modules() if hasattr(module, "spec")]
    assert thresholds == pytest.approx([0.4, 0.3, 0.4])  # of the second, input counts 1/3


def test_surrogates_come_from_metadata_or_are_the_default() -> None:
    node = lif()
    assert read_nir(chain(node)).get_submodule("lif").spec == LIFSpec(threshold=1.0, decay=0.5)
    node.metadata = {"surrogate": "atan", "surrogate_width": 2.0, "detach_reset": np.bool_(True)}
    assert read_nir(chain(node)).get_submodule("lif").spec == LIFSpec(1.0, 0.5, "atan", 2.0, True)
