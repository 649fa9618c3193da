"""``timm-gac bench kernels`` and ``timm-gac bench model``."""

from __future__ import annotations

from ..bench.loops.options import LoopBenchConfig
from ..bench.options import CurveConfig, KernelBenchConfig, ModelBenchConfig, ScalingConfig
from .sources import Options


def kernels(config: Options[KernelBenchConfig]) -> int:
    """Time each kernel that passes its check against its baselines.

    Status 1 where a kernel fails its check. The copy bandwidth of the same run stands beside each time.

    Example: timm-gac bench kernels --quick --device cpu

    Args:
        config: What to time.
    """
    from ..bench import kernels as benchmark

    return benchmark.show_results(benchmark.bench_kernels(config))


def model(config: Options[ModelBenchConfig]) -> int:
    """Time a whole network against its baselines.

    A provider is a network and how it is launched: timm_gac, timm_gac+graph (the whole step as one CUDA graph),
    loop+compile (torch.compile), spikingjelly+compile+graph, +compile_no_layout (Inductor's layout_optimization=False).
    Networks: timm_gac; timm_gac_packed (packed spikes); timm_gac_fused (batch norm folded) and timm_gac_int8
    (quantised), for inference; convolutions, the network's convolutions alone; ann, timm's ResNet of the same shape on
    T batches; and with the same weights the baselines spikingjelly, spikingjelly_memopt, loop and published.

    Example: timm-gac bench model --model gac_msresnet18_cifar --modes infer --csv model.csv

    Args:
        config: What to time.
    """
    from ..bench import model as bench_model

    return bench_model.show_results(*bench_model.bench_model(config))


def loops(config: Options[LoopBenchConfig]) -> int:
    """Time training in the loops that people have.

    The plain loop, one CUDA graph a step, timm_gac.graphed, torch.compile, packed spikes, accelerate, timm's train.py,
    transformers' Trainer and Lightning, with this package's network and SpikingJelly's, all fed from one data set on
    the device; and this package's loaders alone. A loop that fails, or whose library is missing, is a row that says so.
    Rows go to the CSV as they are measured, and a second call goes on where the first one ended.

    Example: timm-gac bench loops --only plain accelerate --csv results/loops.csv

    Args:
        config: What to time.
    """
    from ..bench.loops import bench

    return bench.show_results(bench.bench_loops(config))


def scaling(config: Options[ScalingConfig]) -> int:
    """Measure how training scales over the GPUs of one host.

    Gradients of several processes are first compared with those of one, in float64.

    Example: timm-gac bench scaling --csv scaling.csv

    Args:
        config: What to time.
    """
    from ..bench import scaling as bench_scaling

    return bench_scaling.run(config)


def curves(config: Options[CurveConfig]) -> int:
    """Compare loss curves of fused and plain training over seeds.

    Status 1 where the loss of fused training leaves the spread of plain training over seeds at more than 5 % of the
    steps.

    Example: timm-gac bench curves --data digits --steps 100

    Args:
        config: What to train.
    """
    from ..bench import curves as bench_curves

    return bench_curves.run(config)
