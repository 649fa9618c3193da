"""Traces networks for a GPU that need not be there, and prints which Triton kernels a compiler would find in them.

    python embedding_child.py folded|int8|float ...

Tensors are fake and claim to lie on a GPU; one line of JSON a network: the kernels in order with what each writes, how
many operators of this package are left, and whether the batch size is still free.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import timm
import torch
import triton
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._functorch.aot_autograd import aot_export_module
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

import timm_gac
from gac_kernels.embedding import embedded_kernels

GPU = torch.device("cuda", 0)


class Driver:
    """Says that there is an H100."""

    def get_current_target(self) -> GPUTarget:
        """For what kernels are compiled."""
        return GPUTarget("cuda", 90, 32)


class Tuple(nn.Module):
    """A module that returns its output in a tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """The output."""
        return (self.module(x),)


def on_gpu(module: nn.Module, fake: FakeTensorMode) -> None:
    """Replace all tensors of a module, in place, by fake ones on a GPU."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, t in list(held.items()):
                if t is not None:
                    new = torch.empty_strided(t.size(), t.stride(), dtype=t.dtype, device=GPU)
                    held[name] = nn.Parameter(new, requires_grad=False) if held is part._parameters else new


@torch.no_grad()
def main(*kinds: str) -> None:
    device: Any = torch.cuda
    device.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    device.get_device_capability = lambda *_: (9, 0)
    triton.runtime.driver.set_active(Driver())
    for kind in kinds:
        model = timm.create_model("test_gac_msresnet", num_classes=7, num_steps=3).eval()
        network: Any = {"folded": timm_gac.fuse_for_inference, "int8": timm_gac.quantize}.get(kind, lambda m: m)(model)
        images = torch.randn(2, 3, 32, 32)
        program = torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        graph = program.module(check_guards=False)
        for node in list(graph.graph.nodes):
            if "_assert_tensor_metadata" in str(node.target):
                graph.graph.erase_node(node)
        graph.recompile()
        fake, fixed = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), DimDynamic.STATIC
        free: Any = StatelessSymbolicContext([DimDynamic.DYNAMIC, fixed, fixed, fixed], constraint_sizes=[None] * 4)
        x = fake.from_tensor(images, symbolic_context=free, source=ConstantSource("x"))
        with fake, embedded_kernels():
            on_gpu(graph, fake)
            traced, _ = aot_export_module(
                Tuple(graph), [x.to(GPU)], trace_joint=False, decompositions=select_decomp_table()
            )
        launches = [node for node in traced.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        kernels = []
        for node in launches:
            kernel: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
            kernels.append([getattr(kernel, "fn", kernel).__name__, sorted(node.kwargs["tensors_to_clone"])])
        left = sum("gac_kernels" in str(node.target) for node in traced.graph.nodes)
        output = next(node for node in traced.graph.nodes if node.op == "output").args[0][0]
        line = {"kernels": kernels, "left": left, "free": isinstance(output.meta["val"].shape[0], torch.SymInt)}
        sys.stdout.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
