"""Options of the benchmarks. Methods import what they need, so that help needs no PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as bench_ops
    from . import session as bench_session

BATCH_NORMS = ("local", "sync")


def _values(config: object, name: str) -> tuple[Any, ...]:
    """What a field holds: one value, or a tuple of several."""
    value = getattr(config, name)
    return value if isinstance(value, tuple) else (value,)


def check_choices(config: object, **choices: Iterable[str]) -> None:
    """Refuse values that are not among the choices of their field."""
    for name, allowed in choices.items():
        if unknown := set(_values(config, name)) - set(allowed):
            raise ValueError(f"expected {name} out of {list(allowed)}, got {sorted(unknown)}: choose among these")


def check_positive(config: object, *names: str) -> None:
    """Refuse numbers below 1 in these fields."""
    for name in names:
        if min(_values(config, name)) < 1:
            raise ValueError(f"expected {name} >= 1, got {getattr(config, name)}: give a positive number")


def on_cuda(device: str) -> bool:
    """Whether a device's name stands for CUDA on this machine."""
    from ..runtime.device import device_type

    return device_type(device) == "cuda"


def own_image_size(model: str) -> int:
    """Side of the images of a registered model or of a model folder."""
    import timm

    from ..hub import read_config

    if Path(model).is_dir():
        return int(read_config(Path(model))["pretrained_cfg"]["input_size"][-1])
    return int(timm.get_pretrained_cfg_value(model, "input_size")[-1])


def check_model(model: str, folders: bool = True) -> None:
    """Refuse what is no registered spiking network and, where ``folders`` are taken, no folder."""
    import timm

    from ..hub.config import is_ann

    if model in timm.list_models(module="spiking_resnet") or (folders and Path(model).is_dir()):
        return
    if is_ann(model):
        raise ValueError(
            f"expected a spiking network for a benchmark, got {model}, an ANN without spikes and time steps: name a "
            "spiking one of `timm-gac models`"
        )
    instead = ", or name a folder" if folders else ""
    raise ValueError(f"expected a model of this package, got {model!r}: `timm-gac models` lists them{instead}")


@dataclass(frozen=True)
class KernelBenchConfig:
    """Options of `bench_kernels`: every combination of the tuples is run, then baselines on some of them.

    Args:
        ops: Out of ``lif``, ``lif_learned`` (a decay and a threshold a channel), ``gac_encode``, ``gated_lif``.
        dtypes: Out of ``float32``, ``bfloat16``.
        memory_formats: Out of ``contiguous``, ``channels_last``.
        num_steps: Numbers of time steps.
        specs: Out of ``cifar``, ``imagenet``.
        size: Neuron-steps per case: the largest batch B is taken with T * B * C * H * W <= size.
        frame: C, H and W.
        baselines: Whether to time the reference, the compiled reference and SpikingJelly too.
        baseline_num_steps: Number of time steps of the baselines, which run contiguous only.
        target_ms: Timed milliseconds per measurement.
        time_budget_s: Start no further case after so many seconds; 0 is no limit. The rest is still written.
        quick: A smaller size, T = 4 and short measurements, for a first look.
        csv: File to append the rows to.
        png: File for the bar chart.
        commit: The source's commit, for the rows; found out where empty.
        device: auto (CUDA where there is one, else the CPU), or such as cpu or cuda:1.
    """

    ops: tuple[str, ...] = ("lif", "gac_encode", "gated_lif")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    memory_formats: tuple[str, ...] = ("contiguous", "channels_last")
    num_steps: tuple[int, ...] = (2, 4, 6, 8)
    specs: tuple[str, ...] = ("cifar", "imagenet")
    size: int = 134_217_728
    frame: tuple[int, int, int] = (128, 32, 32)
    baselines: bool = True
    baseline_num_steps: int = 4
    target_ms: float = 60.0
    time_budget_s: float = 0.0
    quick: bool = False
    csv: Path | None = None
    png: Path | None = None
    commit: str = ""
    device: str = "auto"

    def __post_init__(self) -> None:
        from .ops import CHECKED, MEMORY_FORMATS, OPS, SPECS

        check_choices(self, ops=OPS, dtypes=CHECKED, memory_formats=MEMORY_FORMATS, specs=SPECS)

    def cases(self) -> list[tuple[str, bench_ops.Case]]:
        """Pairs of provider and case in the order they run: own ops first, then the slower baselines."""
        from .ops import BASELINES, Case

        axes = (self.ops, self.specs, self.dtypes, self.memory_formats, self.num_steps)
        own = [("timm_gac", Case(*values)) for values in itertools.product(*axes)]
        if not self.baselines:
            return own
        axes = (self.ops, self.specs, self.dtypes, ("contiguous",), (self.baseline_num_steps,))
        shared = [Case(*values) for values in itertools.product(*axes)]
        return own + [(provider, case) for case in shared for provider in BASELINES]


@dataclass(frozen=True)
class ModelBenchConfig:
    """Options of `bench_model`: every provider runs on every combination of mode, precision and number of steps.

    A provider is a network and how it is launched, such as ``timm_gac``, ``timm_gac+graph`` (the whole step as one CUDA
    graph), ``loop+compile`` (torch.compile), ``spikingjelly+compile+graph`` or ``spikingjelly+compile_no_layout``
    (Inductor's layout_optimization=False). Networks: ``timm_gac``;
    ``timm_gac_packed`` (packed spikes, training); ``timm_gac_8bit`` (training in 8 bits, on GPUs with float8 tensor
    cores); ``timm_gac_fused`` (batch norm folded, inference); ``timm_gac_int8`` (quantised, inference; float parts in
    the precision); ``convolutions``, the convolutions alone as a lower bound of
    time; ``ann``, timm's ResNet of the same shape on T batches; ``spikingjelly`` and ``loop``, the time-major network
    with SpikingJelly's functional LIF or a plain loop; ``spikingjelly_memopt``, with SpikingJelly's memory optimiser
    too (training); ``timm_gac_plif``, with a learned decay and threshold a layer, and ``spikingjelly_plif``, with
    SpikingJelly's parametric LIF, whose decay is learned (training); ``published``, the published algorithm step by
    step.

    Args:
        model: A registered model of this package, or a model folder, quantised or not.
        modes: Out of ``train``, ``infer``.
        precisions: Out of ``float32``, ``tf32``, ``bfloat16``, ``float16`` (autocast); the first and third on a CPU.
        num_steps: Numbers of time steps T; several make a curve.
        providers: Which to run, in this order; all that apply where left out.
        train_batch: Images a training step.
        infer_batch: Images an inference step.
        image_size: Height and width of the images; 0 is the model's own.
        steps: Steps to time, in up to 10 blocks.
        provider_limit_s: Give up a provider after so many seconds, compilation included; 0 is no limit.
        time_budget_s: Start no further provider after so many seconds; 0 is no limit. The rest is still written.
        profile: Profile a step of ``timm_gac`` by kind of kernel; JSON beside the CSV.
        csv: File to append the rows to.
        png: File for the chart.
        commit: The source's commit, for the rows; found out where empty.
        device: auto (CUDA where there is one, else the CPU), or such as cpu or cuda:1.
    """

    model: str = "gac_msresnet18_cifar"
    modes: tuple[str, ...] = ("train", "infer")
    precisions: tuple[str, ...] = ("bfloat16",)
    num_steps: tuple[int, ...] = (4,)
    providers: tuple[str, ...] = ()
    train_batch: int = 128
    infer_batch: int = 512
    image_size: int = 0
    steps: int = 50
    provider_limit_s: float = 120.0
    time_budget_s: float = 0.0
    profile: bool = False
    csv: Path | None = None
    png: Path | None = None
    commit: str = ""
    device: str = "auto"

    def __post_init__(self) -> None:

        from ..runtime.dtypes import AUTOCAST
        from .networks import COMPILERS, NETWORKS
        from .steps import MODES

        check_choices(self, modes=MODES, precisions=AUTOCAST)
        for provider in self.providers:
            network, *launch = provider.split("+")
            launches = [[], ["graph"], *([way, *graph] for way in COMPILERS for graph in ([], ["graph"]))]
            if network not in NETWORKS or launch not in launches:
                raise ValueError(
                    f"expected a provider such as 'timm_gac+graph', got {provider!r}: give one of {list(NETWORKS)}, "
                    "alone or followed by +compile, +compile_no_layout, +graph or +compile+graph"
                )
        for name in ("modes", "precisions", "num_steps"):
            if not getattr(self, name):
                raise ValueError(f"expected at least one of {name}, got none: leave the option out for its default")
        check_positive(self, "train_batch", "infer_batch", "steps", "num_steps")
        check_model(self.model)
        cuda_only = {"tf32", "float16"} & set(self.precisions)
        if cuda_only and not on_cuda(self.device):
            raise ValueError(f"expected float32 or bfloat16 on a CPU, got {sorted(cuda_only)}: choose one of these")

    def profile_path(self) -> Path | None:
        """File for the profiles, beside the CSV; None without profiles or CSV."""
        return self.csv.with_suffix(".profile.json") if self.csv and self.profile else None

    def cases(self) -> list[bench_session.Case]:
        """The combinations in the order they run."""
        from .session import Case

        size = self.image_size or own_image_size(self.model)
        batch = {"train": self.train_batch, "infer": self.infer_batch}
        axes = itertools.product(self.modes, self.precisions, self.num_steps)
        return [
            Case(
                model=self.model,
                mode=mode,
                precision=precision,
                num_steps=num_steps,
                batch=batch[mode],
                image_size=size,
            )
            for mode, precision, num_steps in axes
        ]

    def providers_of(self, case: bench_session.Case) -> list[str]:
        """The providers of a case in the order they run; by default those that compile last."""
        from .networks import LAUNCHES

        if self.providers:
            return list(self.providers)
        training = ("timm_gac_packed", "timm_gac_8bit", "timm_gac_plif", "spikingjelly_memopt", "spikingjelly_plif")
        inference = ("timm_gac_fused", "timm_gac_int8")
        skip = inference if case.mode == "train" else training
        kept = {network: launches for network, launches in LAUNCHES.items() if network not in skip}
        found = [network + launch for network, launches in kept.items() for launch in launches]
        on_gpu = on_cuda(self.device)  # and the kernels of 8 bits, which say themselves where a GPU is too old
        found = [name for name in found if on_gpu or not ("graph" in name or "8bit" in name)]
        return sorted(found, key=lambda name: "compile" in name)


@dataclass(frozen=True)
class ScalingConfig:
    """Options of `measure_scaling`: every provider runs with every kind of batch norm.

    Args:
        model: A registered model of this package.
        processes: Number of processes that train together; 0 is one for each GPU, two on a CPU.
        providers: Out of ``ddp``, ``all_reduce``, ``all_reduce+graph``; all that apply where left out.
        batch_norms: ``local``, statistics of each process; ``sync``, statistics over all processes.
        batch: Images per step and process.
        image_size: Height and width of the images; 0 is the model's own.
        num_steps: Time steps T.
        precision: ``float32``, ``tf32`` or ``bfloat16`` (autocast).
        steps: Steps to time, in up to 10 blocks.
        check: Only compare gradients.
        csv: File to append each row to as soon as it is measured.
        commit: The source's commit, for the rows; found out where empty.
        device: auto (CUDA where there is one, else the CPU), cuda or cpu.
    """

    model: str = "gac_msresnet18_cifar"
    processes: int = 0
    providers: tuple[str, ...] = ()
    batch_norms: tuple[str, ...] = BATCH_NORMS
    batch: int = 128
    image_size: int = 0
    num_steps: int = 4
    precision: str = "bfloat16"
    steps: int = 100
    check: bool = False
    csv: Path | None = None
    commit: str = ""
    device: str = "auto"

    def __post_init__(self) -> None:
        import torch

        from .processes import PROVIDERS

        check_choices(self, providers=PROVIDERS, batch_norms=BATCH_NORMS, device=("auto", "cuda", "cpu"))
        check_choices(self, precision=("float32", "tf32", "bfloat16"))
        check_positive(self, "batch", "num_steps", "steps")
        check_model(self.model, folders=False)
        if self.size < 2 or (self.on_cuda and self.size > torch.cuda.device_count()):
            raise ValueError(
                f"expected at least 2 processes and a GPU for each, got {self.size} and "
                f"{torch.cuda.device_count()}: run it where there are more, or give --device cpu to try it out"
            )
        if not self.on_cuda and any("graph" in provider for provider in self.providers):
            raise ValueError("expected CUDA devices for a graph, got cpu: leave all_reduce+graph out")

    @property
    def on_cuda(self) -> bool:
        """Whether to run on GPUs."""
        return on_cuda(self.device)

    @property
    def size(self) -> int:
        """Number of processes that train together."""
        import torch

        return self.processes or (torch.cuda.device_count() if self.on_cuda else 2)

    def combinations(self) -> list[tuple[str, str]]:
        """Pairs of provider and batch norm in the order they run."""
        from .processes import PROVIDERS

        providers = self.providers or tuple(p for p in PROVIDERS if self.on_cuda or "graph" not in p)
        return [(provider, norm) for provider in providers for norm in self.batch_norms]


@dataclass(frozen=True)
class CurveConfig:
    """Options of `compare_curves`: one training run for each backend and seed.

    Args:
        model: A registered model of this package.
        data: Small images as for ``timm-gac train``: ``digits``, an .npz file, ``torch/cifar100``.
        data_dir: Folder of a timm data set.
        image_size: Height and width to resize to.
        num_steps: Time steps T.
        steps: Training steps of a run.
        batch: Images a step.
        lr: Peak learning rate of SGD with Nesterov momentum, reached after 10 % of the steps.
        precision: ``float32`` or ``bfloat16`` (autocast).
        fused: Backend of the fused runs.
        seeds: Seeds of weights and order; at least two, for their spread.
        window: Number of steps to average curves over before they are compared.
        csv: File to append every loss to.
        png: File for the chart.
        device: auto (CUDA where there is one, else the CPU), or such as cpu or cuda:1.
    """

    model: str = "gac_msresnet18_cifar"
    data: str = "digits"
    data_dir: str = ""
    image_size: int = 32
    num_steps: int = 4
    steps: int = 300
    batch: int = 64
    lr: float = 0.05
    precision: str = "bfloat16"
    fused: str = "triton"
    seeds: tuple[int, ...] = (0, 1, 2)
    window: int = 20
    csv: Path | None = None
    png: Path | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2:
            raise ValueError(f"expected at least two seeds, got {self.seeds}: curves are compared with their spread")
        if not 1 <= self.window <= self.steps:
            raise ValueError(
                f"expected 1 <= window <= steps, got {self.window} and {self.steps}: give a smaller window"
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"expected precision float32 or bfloat16, got {self.precision!r}: choose one of these")
