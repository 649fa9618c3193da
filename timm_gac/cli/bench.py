"""``timm-gac bench kernels`` and ``timm-gac bench model``."""

from __future__ import annotations

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
    loop+compile (torch.compile), spikingjelly+compile+graph. Networks: timm_gac; timm_gac_packed (packed spikes);
    timm_gac_fused (batch norm folded) and timm_gac_int8 (quantised), for inference; convolutions, the network's
    convolutions alone; ann, timm's ResNet of the same shape on T batches; and with the same weights the baselines
    spikingjelly, loop and published.

    Example: timm-gac bench model --model gac_msresnet18_cifar --modes infer --csv model.csv

    Args:
        config: What to time.
    """
    from ..bench import model as bench_model

    return bench_model.show_results(*bench_model.bench_model(config))


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
