"""Spiking networks as NIR files, the Neuromorphic Intermediate Representation, which other frameworks read.

What is written is the folded network: convolutions with biases, neurons, and edges, of which several into one node are
a sum. Readers differ in what else they understand, so there is nothing else but average pooling.
"""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from ..inference.fold import FoldedBlock, FoldedConv2d, FoldedLIF, FoldedStem, fuse_for_inference
from ..layers.checks import Forwards, why_called
from ..layers.encoder import DirectCoding
from ..layers.neuron import LIF
from ..models.ann_resnet import refuse_ann
from ..models.blocks import Stage
from ..models.network import SpikingResNet
from ..runtime.files import replace_file
from ..runtime.modes import eval_mode
from .nir_check import NIRReport, compare
from .nir_neuron import DT, neuron_node
from .nir_read import read_nir
from .report import check_images, check_network, check_new, with_channels, without_autocast


@without_autocast
@torch.no_grad()
def graph_input(model: Any, x: Tensor) -> Tensor:
    """What the graph of a network takes at each step.

    With gated attention coding that is the gated current, since NIR has neither sigmoid nor product to write the gate
    with; with direct coding the image, the same at every step.

    Args:
        model: The network, folded or not.
        x: Images ``(B, C, H, W)``, or event frames ``(B, T, C, H, W)``.

    Returns:
        ``(T, B, C', H', W')``.

    Examples:
        >>> import timm, timm_gac.export, torch
        >>> model = timm.create_model("test_gac_msresnet").eval()
        >>> timm_gac.export.graph_input(model, torch.zeros(2, 3, 32, 32)).shape
        torch.Size([4, 2, 16, 32, 32])
    """
    with eval_mode(model):
        if not isinstance(model.encoder, DirectCoding):
            return model._encode(x).unflatten(0, (model.num_steps, -1))
        if x.ndim == 5:
            return x.transpose(0, 1)
        return x.unsqueeze(0).expand(model.num_steps, -1, -1, -1, -1)


@without_autocast
def write_nir(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: tuple[int, int, int] | None = None,
    images: Tensor | None = None,
    label_names: tuple[str, ...] = (),
    overwrite: bool = False,
) -> NIRReport:
    """Write a spiking network as a NIR file, read it back and compare the two.

    The graph has the output of one step, ``(classes, 1, 1)``; their mean over the steps are the network's logits.

    Args:
        model: A network of this package, folded or not; it is left as it is.
        path: The file. It appears whole or not at all.
        input_size: Of the images, ``(C, H, W)``; that of its pretrained_cfg by default.
        images: ``(B, C, H, W)``, normalised, to compare on; two of noise by default.
        label_names: Of the classes, for the metadata; those of its pretrained_cfg by default.
        overwrite: Replace the file where there is one.

    Returns:
        How the network in the file differs from this one.

    Raises:
        ValueError: The network has something that NIR cannot hold, or the file is there already.

    Examples:
        >>> import timm, timm_gac.export
        >>> model = timm.create_model("test_gac_msresnet").eval()
        >>> report = timm_gac.export.write_nir(model, "test.nir")  # doctest: +SKIP
    """
    import nir

    path = Path(path)
    check_new(path, overwrite)
    folded = _folded(model)
    if images is not None:
        check_images(folded, images)
    size = _input_size(folded, input_size, images)
    graph = _graph(folded, size, label_names)
    content = io.BytesIO()
    nir.write(content, graph)
    if images is None:
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with replace_file(path) as stream:  # a file that cannot be run does not appear
        stream.write(content.getvalue())
        stream.flush()
        return compare(folded, path, read_nir(stream.name), graph_input(folded, images.to(folded.conv1.weight)))


@without_autocast
def nir_graph(
    model: nn.Module, input_size: tuple[int, int, int] | None = None, label_names: tuple[str, ...] = ()
) -> Any:
    """The ``nir.NIRGraph`` of a network, as `write_nir` writes it; arguments and errors as there."""
    folded = _folded(model)
    return _graph(folded, _input_size(folded, input_size, None), label_names)


def _folded(model: nn.Module) -> Any:
    """A folded copy of a network on the CPU, in float32 or float64."""
    check_network(model)
    if hasattr(model, "quantization"):
        raise ValueError(
            "expected a floating-point network, got one with 8-bit weights: NIR knows no integers; export the network "
            "that it was made of"
        )
    refuse_ann(model, "a NIR file")
    if not isinstance(model, SpikingResNet):
        raise ValueError(f"expected a spiking network of this package, got {type(model).__name__}: see timm-gac models")
    for name, module in model.named_modules():
        where = name or "the network"
        if is_parametrized(module):
            raise ValueError(
                f"expected plain weights, got {where} with parametrised ones: call timm_gac.fuse_for_inference(model) "
                "first"
            )
        _check(where, module, (type(module).forward,))
    network = copy.deepcopy(model).cpu()
    if network.conv1.weight.dtype != torch.float64:
        network.float()
    return network if network.inference_only else fuse_for_inference(network)


def _check(name: str, module: nn.Module, forwards: Forwards) -> None:
    reason = why_called(module, forwards)
    if reason is not None:
        raise ValueError(
            f"expected {name} as this package makes it, got a {type(module).__name__} that NIR cannot describe, since "
            f"{reason}: remove what was added, or load the weights into a new network"
        )


def _input_size(model: Any, given: tuple[int, int, int] | None, images: Tensor | None) -> tuple[int, int, int]:
    size: Any = given
    if size is None:
        size = getattr(model, "pretrained_cfg", {}).get("input_size") if images is None else tuple(images.shape[-3:])
        size = with_channels(model, size) if images is None and size else size
    if size is None or len(size) != 3 or size[0] != model.in_chans or min(size) < 1:
        raise ValueError(f"expected input_size as ({model.in_chans}, H, W), got {size}: give that of the images")
    if images is not None and tuple(images.shape[-3:]) != tuple(size):
        raise ValueError(f"expected images of the size {tuple(size)}, got {tuple(images.shape)}: give one of the two")
    return size[0], size[1], size[2]


class _Graph:
    """A NIR graph that grows by nodes, each with edges from its sources."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self._shapes: dict[str, tuple[int, ...]] = {}  # of one sample

    def add(self, name: str, node: Any, shape: tuple[int, ...], *sources: str) -> str:
        self.nodes[name], self._shapes[name] = node, shape
        self.edges += [(source, name) for source in sources]
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def convolve(self, name: str, conv: nn.Conv2d, source: str) -> str:
        """A convolution; readers want a bias, so one without gets zeros."""
        import nir

        if conv.padding_mode != "zeros":
            raise ValueError(f"expected {name} padded with zeros, got {conv.padding_mode}: NIR has no other padding")
        weight = conv.weight.detach().numpy()
        node = nir.Conv2d(
            input_shape=self.shape(source)[1:],
            weight=weight,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=np.zeros_like(weight[:, 0, 0, 0]) if conv.bias is None else conv.bias.detach().numpy(),
        )
        return self.add(name, node, tuple(int(n) for n in node.output_type["output"]), source)

    def fire(self, name: str, neuron: nn.Module, *sources: str) -> str:
        """Neurons that integrate the sum of their sources."""
        _check(name, neuron, (LIF.forward,))
        assert isinstance(neuron, LIF)
        shape = self.shape(sources[0])
        spec = neuron.spec if neuron.learned is None else neuron.learned.fixed(neuron.spec)
        if spec is None:
            raise ValueError(
                f"expected one decay and threshold a layer, got one a channel in {name}: a layer read from NIR has "
                "one, train with neuron='plif', or export to ONNX or a .pt2 file"
            )
        return self.add(name, neuron_node(name, spec, shape), shape, *sources)

    def average(self, name: str, window: tuple[int, int], *sources: str) -> str:
        """Average pooling; with a window of (1, 1) the sum of the sources under a name of its own."""
        import nir

        channels, height, width = self.shape(sources[0])
        node = nir.AvgPool2d(kernel_size=np.array(window), stride=np.array(window), padding=np.array((0, 0)))
        return self.add(name, node, (channels, height // window[0], width // window[1]), *sources)


def _graph(model: Any, input_size: tuple[int, int, int], label_names: tuple[str, ...]) -> Any:
    import nir

    graph = _Graph()
    direct = isinstance(model.encoder, DirectCoding)
    if direct:
        _check("conv1", model.conv1, (FoldedStem.forward,))
        shape: tuple[int, ...] = input_size
    else:
        shape = tuple(graph_input(model, model.conv1.weight.new_zeros(1, *input_size)).shape[2:])
    membrane = graph.add("input", nir.Input(input_type=np.array(shape)), shape)
    if direct:
        membrane = graph.convolve("conv1", model.conv1, membrane)
    plain = isinstance(model.lif, nn.Identity)  # blocks without membrane shortcuts have no neuron before them
    spikes = membrane if plain else graph.fire("lif", model.lif, membrane)
    for stage_name, stage in model.named_children():
        for index, block in enumerate(stage if isinstance(stage, Stage) else ()):
            membrane, spikes = _add_block(graph, f"{stage_name}.{index}", block, membrane, spikes)
    last = _add_classifier(graph, model, spikes)
    graph.add("output", nir.Output(output_type=np.array(graph.shape(last))), graph.shape(last), last)
    return nir.NIRGraph(graph.nodes, graph.edges, metadata=_metadata(model, input_size, label_names))


def _add_block(graph: _Graph, name: str, block: Any, membrane: str, spikes: str) -> tuple[str, str]:
    """The nodes of a residual block; returns those that hold its membrane and its spikes."""
    _check(name, block, (FoldedBlock.forward,))
    for part in (1, 2):
        _check(f"{name}.conv{part}", getattr(block, f"conv{part}"), (FoldedConv2d.forward,))
        _check(f"{name}.bn{part}", getattr(block, f"bn{part}"), (FoldedLIF.forward,))
    hidden = graph.fire(f"{name}.lif1", block.bn1.lif, graph.convolve(f"{name}.conv1", block.conv1, spikes))
    current = (graph.convolve(f"{name}.conv2", block.conv2, hidden), membrane)
    if block.downsample is not None:
        current = (current[0], graph.convolve(f"{name}.downsample", block.downsample[0], membrane))
    if block.bn2.keep_membrane:  # the next block needs the sum too: as edges, sums of sums would grow with the depth
        membrane = graph.average(f"{name}.add", (1, 1), *current)
        return membrane, graph.fire(f"{name}.lif2", block.bn2.lif, membrane)
    spikes = graph.fire(f"{name}.lif2", block.bn2.lif, *current)
    return spikes, spikes


def _add_classifier(graph: _Graph, model: Any, spikes: str) -> str:
    """Average pooling and linear layer as one convolution over the whole feature map.

    It takes spikes, not averages, and needs no Flatten, about whose axes readers disagree.
    """
    pool, classifier = model.global_pool.pool_type, model.fc
    _check("fc", classifier, (nn.Linear.forward, nn.Identity.forward))
    _, height, width = graph.shape(spikes)
    if pool not in ("", "avg", "fastavg"):
        raise ValueError(
            f"expected global_pool='avg', got {pool!r}, which NIR does not know: train with 'avg', or export to ONNX"
        )
    if isinstance(classifier, nn.Identity):
        return graph.average("global_pool", (height, width), spikes) if pool else spikes
    weight = classifier.weight[:, :, None, None].expand(-1, -1, height, width) / (height * width)
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], (height, width), bias=False, device="meta")
    conv.weight, conv.bias = nn.Parameter(weight), classifier.bias
    return graph.convolve("fc", conv, spikes)


def _metadata(model: Any, input_size: tuple[int, int, int], label_names: tuple[str, ...]) -> dict[str, Any]:
    """What else a reader wants to know; neurons have their surrogate in their own metadata."""
    cfg = getattr(model, "pretrained_cfg", {})
    direct = isinstance(model.encoder, DirectCoding)
    metadata = {
        "model": ".".join(filter(None, (cfg.get("architecture"), cfg.get("tag")))) or type(model).__name__,
        "encoder": type(model.encoder).__name__,
        "input": "the image, at every step" if direct else "the encoder's output",
        "num_steps": model.num_steps,
        "dt": DT,
        "image_size": np.array(input_size),
    }
    for key in ("mean", "std"):
        if cfg.get(key):
            metadata[key] = np.array(cfg[key])
    names = label_names or tuple(cfg.get("label_names") or ())
    if names:
        metadata["label_names"] = json.dumps(list(names), ensure_ascii=False)
    return metadata
