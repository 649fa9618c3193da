"""Networks in NIR files, the Neuromorphic Intermediate Representation, on this package's multi-step neurons."""

from __future__ import annotations

import math
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..layers.neuron import LIF
from .nir_neuron import DT, NEURONS, neuron_spec


class NIRNetwork(nn.Module):
    """A network read from NIR: all time steps at once, neurons by `gac_kernels.lif`.

    Its layers are children, named as in the file with ``_`` for ``.``. Its neurons are `LIF` layers, which the tools of
    this package see; they keep nothing between calls. Several edges into a layer are summed.

    Shape:
        - ``(T, B, ...)`` -> ``(T, B, ...)``, any T and B; ``...`` are `input_shape` and the output's

    Attributes:
        input_shape: Of one sample in one step; None where the file does not tell.
        metadata: Of the graph, as the file has it.
    """

    input_shape: tuple[int, ...] | None

    def __init__(self, graph: Any, dt: float, feeds_vectors: bool = False) -> None:
        super().__init__()
        self.metadata = dict(graph.metadata)
        order, sources = _ordered(graph)
        self._input = _only(graph, "Input")
        self._output = _only(graph, "Output")
        shape = graph.nodes[self._input].input_type["input"]
        self.input_shape = None if shape is None else tuple(int(size) for size in shape)
        # Of each layer its node, child, sources, and the nodes whose values are not needed after it.
        self._plan: list[tuple[str, str, tuple[str, ...], tuple[str, ...]]] = []
        kept = {self._output}
        for name in reversed(order):
            if name != self._input:
                last = tuple(source for source in sources[name] if source not in kept)
                kept.update(last)
                self._plan.insert(0, (name, self._add(name, graph, dt, feeds_vectors), sources[name], last))

    def _add(self, name: str, graph: Any, dt: float, feeds_vectors: bool) -> str:
        child = name.replace(".", "_") or "_"
        while hasattr(self, child):
            child += "_"
        try:
            layer = _layer(name, graph, dt, feeds_vectors)
        except ValueError as error:  # of a spec or a layer, which know no names
            if repr(name) in str(error):
                raise
            raise ValueError(f"expected a node that runs here, got {name!r}: {error}") from error
        self.add_module(child, layer)
        return child

    def forward(self, x: Tensor) -> Tensor:
        """The output of each step, ``(T, B, ...)``."""
        steps = x.shape[:2]
        if x.ndim < 3 or (self.input_shape is not None and x.shape[2:] != self.input_shape):
            shape = "..." if self.input_shape is None else ", ".join(map(str, self.input_shape))
            raise ValueError(f"expected (T, B, {shape}), got {tuple(x.shape)}: give the input of each step")
        self._check_dtype(x)
        values = {self._input: x.flatten(0, 1)}
        for name, child, sources, last in self._plan:
            layer = getattr(self, child)
            total = values[sources[0]]
            for source in sources[1:]:
                if values[source].shape != total.shape:
                    shapes = f"{tuple(total.shape[1:])} and {tuple(values[source].shape[1:])}"
                    raise ValueError(f"expected one shape from all edges into {name!r}, got {shapes}: mend the graph")
                total = total + values[source]
            for source in last:
                del values[source]
            if isinstance(layer, (LIF, NIRNetwork)):
                values[name] = layer(total.unflatten(0, steps)).flatten(0, 1)
            else:
                values[name] = layer(total)
        return values[self._output].unflatten(0, steps)

    def _check_dtype(self, x: Tensor) -> None:
        if torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return
        own = next(self.parameters(), x).dtype
        if own != x.dtype:
            raise ValueError(f"expected x in {own} as the weights are, got {x.dtype}: convert it with .to({own})")


@torch.no_grad()
def _check_shapes(network: NIRNetwork) -> None:
    """Run zeros of the shape that the file tells, so that a node which does not fit is named when the file is read."""
    if network.input_shape is None:
        return
    seen: list[tuple[str, tuple[int, ...]]] = []
    hooks = [
        getattr(graph, child).register_forward_pre_hook(_noting(name, seen))
        for graph in network.modules()
        if isinstance(graph, NIRNetwork)
        for name, child, _, _ in graph._plan
    ]
    try:
        dtype = next(network.parameters(), torch.zeros(())).dtype
        network(torch.zeros(1, 1, *network.input_shape, dtype=dtype))
    except RuntimeError as error:
        name, shape = seen[-1]
        raise ValueError(
            f"expected nodes that fit each other, got {shape} at {name!r}, which does not take it ({error}): mend the "
            "graph, or the shape of its input"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _noting(name: str, seen: list[tuple[str, tuple[int, ...]]]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        folded = 2 if isinstance(module, (LIF, NIRNetwork)) else 1  # (T, B, ...), or (T*B, ...)
        seen.append((name, tuple(inputs[0].shape[folded:])))

    return note


def read_nir(source: str | Path | Any, dt: float | None = None) -> NIRNetwork:
    """Read a network from a NIR file, of this package or of another framework.

    It takes LIF and IF neurons with one set of constants a layer, CubaLIF whose synapse forgets within a step, Conv1d,
    Conv2d, Linear, Affine, Scale, AvgPool2d, SumPool2d and Flatten, sums (several edges into a node) and graphs in a
    graph. Of a Flatten, axes count from the first of a sample, as NIR has it; one before a Linear or Affine, which take
    vectors, flattens all axes, however its writer counted, also where neurons or a Scale stand between.

    Args:
        source: The file, or a ``nir.NIRGraph``.
        dt: Length of a time step, in the unit of the file's time constants. By default what the metadata says, else
            1e-4 seconds as in snnTorch and SpikingJelly; of frameworks that count time in steps, such as sinabs, 1.0.

    Returns:
        The network, with weights that can be trained: in float64 if all of the file's are, else in float32.

    Raises:
        ValueError: The file is no NIR, or has a node that does not run here or does not fit what comes before it, a
            cycle, or neurons that differ within a layer; the message names the node.

    Examples:
        >>> import timm_gac.export
        >>> network = timm_gac.export.read_nir("network.nir")  # doctest: +SKIP
        >>> outputs = network(currents)  # (T, B, ...)  # doctest: +SKIP
    """
    import nir

    graph = source if isinstance(source, nir.NIRNode) else _read(Path(source))
    if not isinstance(graph, nir.NIRGraph):
        raise ValueError(f"expected a graph, got a {type(graph).__name__}: wrap it with nir.NIRGraph.from_list")
    dt = graph.metadata.get("dt", DT) if dt is None else dt
    try:
        step = float(dt)
    except (TypeError, ValueError):
        step = math.nan
    if not 0.0 < step < math.inf:
        raise ValueError(f"expected dt > 0, got {dt!r}: give the length of a time step, such as {DT}")
    network = NIRNetwork(graph, step)
    if any(parameter.dtype != torch.float64 for parameter in network.parameters()):
        network.float()
    _check_shapes(network)
    return network


def _read(path: Path) -> Any:
    import nir

    if not path.is_file():
        raise ValueError(f"expected a NIR file, got {str(path)!r}, which is none: check the path")
    try:
        return nir.read(path, type_check=False)  # what has no shapes is no error here
    except Exception as error:  # h5py and nir raise what they come across: OSError, KeyError, TypeError, AssertionError
        raise ValueError(
            f"expected {path} to hold a NIR graph, got what nir cannot read ({error}): write it anew"
        ) from error


def _ordered(graph: Any) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """The nodes in an order in which each comes after its sources, and the sources of each."""
    sources: dict[str, tuple[str, ...]] = {name: () for name in graph.nodes}
    for start, end in graph.edges:
        for name in (start, end):
            if name not in sources:
                raise ValueError(
                    f"expected edges between nodes, got one at {name!r}, which is none: write the file anew"
                )
        if start in sources[end]:
            raise ValueError(f"expected one edge from {start!r} to {end!r}, got two: write the file anew")
        sources[end] += (start,)
    for name, before in sources.items():
        if not before and type(graph.nodes[name]).__name__ != "Input":
            raise ValueError(f"expected an edge into {name!r}, got none: connect it to the input or remove it")
    try:
        return list(TopologicalSorter(sources).static_order()), sources
    except CycleError as error:
        way = " -> ".join(map(repr, error.args[1]))
        raise ValueError(
            f"expected a graph without cycles, got {way}: recurrent connections do not run here, where a layer "
            "computes all steps at once; run the file in snnTorch or SpikingJelly"
        ) from None


def _only(graph: Any, kind: str) -> str:
    names = [name for name, node in graph.nodes.items() if type(node).__name__ == kind]
    if len(names) != 1:
        raise ValueError(
            f"expected one node of kind {kind}, got {len(names)} {names}: write a graph of one input and output"
        )
    return names[0]


def _layer(name: str, graph: Any, dt: float, vectors: bool) -> nn.Module:
    node = graph.nodes[name]
    kind = type(node).__name__
    if kind == "NIRGraph":
        return NIRNetwork(node, dt, _feeds_vectors(name, graph, vectors))
    if kind == "Output":
        return nn.Identity()
    if kind in NEURONS:
        return LIF(neuron_spec(name, node, dt))
    if kind == "Flatten" and _feeds_vectors(name, graph, vectors):
        return nn.Flatten()
    if kind not in _LAYERS:
        known = ", ".join(sorted([*_LAYERS, *NEURONS]))
        raise ValueError(
            f"expected nodes out of {known}, got {name!r} of kind {kind}: it does not run here; "
            "replace it, or run the file in the framework that wrote it"
        )
    return _LAYERS[kind](name, node)


def _feeds_vectors(name: str, graph: Any, outside: bool) -> bool:
    """Whether what a node puts out gets to a node of vectors as it is: at once, or behind elementwise ones.

    ``outside`` is the answer for what leaves the graph.
    """
    for end in [end for start, end in graph.edges if start == name]:
        node = graph.nodes[end]
        kind = type(node).__name__
        if kind in ("Affine", "Linear"):
            return True
        if kind == "NIRGraph":
            found = _feeds_vectors(_only(node, "Input"), node, _feeds_vectors(end, graph, outside))
        elif kind == "Output":
            found = outside
        else:
            found = kind in ("Scale", *NEURONS) and _feeds_vectors(end, graph, outside)
        if found:
            return True
    return False


def _parameter(value: Any) -> nn.Parameter:
    array = np.array(value)  # a copy, which may be written to
    return nn.Parameter(torch.from_numpy(array if array.dtype == np.float64 else array.astype(np.float32)))


def _integers(value: Any, count: int) -> tuple[int, ...]:
    return tuple(int(one) for one in np.broadcast_to(np.asarray(value), (count,)))


def _bias(name: str, node: Any, weight: Tensor) -> Any:
    """The bias of a node, None where it has none."""
    if getattr(node, "bias", None) is None:
        return None
    bias = _parameter(node.bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"expected the bias of {name!r} as ({weight.shape[0]},), got {tuple(bias.shape)}: write the file anew"
        )
    return bias


def _convolution(name: str, node: Any) -> nn.Module:
    weight = _parameter(node.weight)
    axes = weight.ndim - 2
    kind: Any = nn.Conv1d if type(node).__name__ == "Conv1d" else nn.Conv2d
    if axes != (1 if kind is nn.Conv1d else 2):
        raise ValueError(
            f"expected the weight of {name!r} with {4 - (kind is nn.Conv1d)} axes, got {tuple(weight.shape)}: "
            "write the file anew"
        )
    strides = _integers(node.stride, axes)
    if isinstance(node.padding, str) and node.padding == "same" and any(stride != 1 for stride in strides):
        raise ValueError(f"expected padding in numbers for the stride {strides} of {name!r}, got 'same': give it so")
    groups = int(node.groups)
    layer = kind(
        weight.shape[1] * groups,
        weight.shape[0],
        tuple(weight.shape[2:]),
        stride=strides,
        padding=node.padding if isinstance(node.padding, str) else _integers(node.padding, axes),
        dilation=_integers(node.dilation, axes),
        groups=groups,
        bias=False,
        device="meta",  # without initial values
    )
    layer.weight = weight
    layer.bias = _bias(name, node, weight)
    return layer


def _linear(name: str, node: Any) -> nn.Module:
    weight = _parameter(node.weight)
    if weight.ndim != 2:
        raise ValueError(
            f"expected the weight of {name!r} as (outputs, inputs), got {tuple(weight.shape)}: it does not run here"
        )
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    layer.bias = _bias(name, node, weight)
    return layer


def _pool(name: str, node: Any) -> nn.Module:
    window = {field: _integers(getattr(node, field), 2) for field in ("kernel_size", "stride", "padding")}
    if window == {"kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0)}:
        return nn.Identity()
    height, width = window["padding"]
    outside: list[nn.Module] = []
    if any(2 * pad > size for pad, size in zip(window["padding"], window["kernel_size"], strict=True)):
        # PyTorch pools at most half of a window of padding; zeros before it are the same.
        outside, window["padding"] = [nn.ZeroPad2d((width, width, height, height))], (0, 0)
    pool = nn.AvgPool2d(**window, divisor_override=1 if type(node).__name__ == "SumPool2d" else None)  # type: ignore[arg-type]
    return nn.Sequential(*outside, pool) if outside else pool


def _flatten(name: str, node: Any) -> nn.Module:
    start, end = int(node.start_dim), int(node.end_dim)
    return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)  # behind the batch


class _Scale(nn.Module):
    """``x * scale``, elementwise."""

    def __init__(self, name: str, node: Any) -> None:
        super().__init__()
        self.scale = _parameter(node.scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


_LAYERS: dict[str, Callable[[str, Any], nn.Module]] = {
    "Affine": _linear,
    "AvgPool2d": _pool,
    "Conv1d": _convolution,
    "Conv2d": _convolution,
    "Flatten": _flatten,
    "Linear": _linear,
    "Scale": _Scale,
    "SumPool2d": _pool,
}
