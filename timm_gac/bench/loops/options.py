"""Options of the benchmark of training loops. Methods import what they need, so that help needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import check_choices, check_model, check_positive, on_cuda, own_image_size

if TYPE_CHECKING:
    from ..session import Case

ANCHOR = "step/timm_gac"  # measured in every call; `of_graphed_step` compares with it
# Loop, network, and what is done to the network, in the order they run: those that compile come last.
ENTRIES = (
    *(ANCHOR, "step/timm_gac_packed", "step/timm_gac_8bit"),
    *("plain/timm_gac", "plain/timm_gac+graphed", "plain/timm_gac_packed", "plain/timm_gac_packed+graphed"),
    *("plain/timm_gac_8bit", "plain/timm_gac_8bit+graphed"),
    *("plain/spikingjelly", "plain/spikingjelly_memopt"),
    *("accelerate/timm_gac", "accelerate/timm_gac+graphed", "accelerate/spikingjelly"),
    *("timm/timm_gac", "timm/timm_gac+graphed", "timm/spikingjelly"),
    *("trainer/timm_gac", "trainer/timm_gac+graphed", "trainer/spikingjelly"),
    *("lightning/timm_gac", "lightning/timm_gac+graphed", "lightning/spikingjelly"),
    *("loader/npz", "loader/folder"),
    *("plain/timm_gac+compile", "plain/timm_gac_8bit+compile", "plain/ann+compile"),
    *("plain/spikingjelly+compile", "plain/spikingjelly+compile_no_layout"),
    *("accelerate/spikingjelly+compile", "timm/timm_gac+compile", "plain/timm_gac+reduce_overhead"),
)


@dataclass(frozen=True)
class LoopBenchConfig:
    """Options of `bench_loops`.

    An entry is ``LOOP/NETWORK`` or ``LOOP/NETWORK+WAY``. Loops: ``step``, a whole step as one CUDA graph (GraphedStep);
    ``plain``, forward, backward and SGD; ``accelerate``, that of examples/finetune.py; ``timm``, timm's train.py;
    ``trainer``, transformers' Trainer; ``lightning``, its Trainer; ``loader``, this package's loader alone. Networks:
    ``timm_gac``, ``timm_gac_packed``, ``timm_gac_8bit``, ``ann``, ``spikingjelly``, ``spikingjelly_memopt``, as in
    `bench model`. Ways: ``graphed``, `timm_gac.graphed`; ``compile``, torch.compile; ``compile_no_layout``, with
    Inductor's layout_optimization=False; ``reduce_overhead``, torch.compile(mode="reduce-overhead").

    Args:
        model: A registered model of this package, or a model folder.
        batch: Images a step.
        image_size: Height and width of the images; 0 is the model's own.
        num_steps: Time steps T.
        precision: ``bfloat16`` (autocast) or ``float32``.
        only: Entries to run: names, loops, or patterns such as ``'*/timm_gac*'``; all where left out. The graphed step
            of ``timm_gac`` runs in any case where there is a GPU.
        seconds: Seconds to time each loop.
        epochs: Short epochs of a compiled network before it is timed, with a smaller last batch and evaluation.
        timm_train: Path of train.py in a clone of pytorch-image-models, for the loop ``timm``: wheels do not have it.
        entry_limit_s: Give up an entry after so many seconds, compilation included; 0 is no limit.
        time_budget_s: Start no further entry after so many seconds; 0 is no limit.
        again: Measure entries too that the CSV has from the same commit, settings and device.
        csv: File to append each row to as soon as it is measured. Given again, entries in it are not measured again.
        png: File for the bar chart.
        commit: The source's commit, for the rows; found out where empty.
        device: auto (CUDA where there is one, else the CPU), cuda or cpu. CUDA_VISIBLE_DEVICES chooses the GPU.
    """

    model: str = "gac_msresnet18_cifar"
    batch: int = 128
    image_size: int = 0
    num_steps: int = 4
    precision: str = "bfloat16"
    only: tuple[str, ...] = ()
    seconds: float = 3.0
    epochs: int = 3
    timm_train: Path | None = None
    entry_limit_s: float = 180.0
    time_budget_s: float = 0.0
    again: bool = False
    csv: Path | None = None
    png: Path | None = None
    commit: str = ""
    device: str = "auto"

    def __post_init__(self) -> None:
        import torch

        from ... import models  # noqa: F401 (registers them)

        check_choices(self, precision=("bfloat16", "float32"), device=("auto", "cuda", "cpu"))
        check_positive(self, "num_steps", "epochs")
        if self.batch < 2:
            raise ValueError(f"expected batch >= 2, got {self.batch}: the last batch of an epoch is to be smaller")
        if self.seconds <= 0:
            raise ValueError(f"expected seconds > 0, got {self.seconds}: give a time such as 3")
        for pattern in self.only:
            if not any(_matches(entry, pattern) for entry in ENTRIES):
                raise ValueError(
                    f"expected an entry such as 'plain/timm_gac+graphed', got {pattern!r}: give one of "
                    f"{list(ENTRIES)}, a loop or a pattern"
                )
        if self.timm_train is not None and not self.timm_train.is_file():
            raise ValueError(
                f"expected timm's train.py, got {str(self.timm_train)!r}, which is no file: check the path"
            )
        check_model(self.model)
        if on_cuda(self.device) and torch.cuda.device_count() > 1:
            raise ValueError(
                f"expected one GPU, got {torch.cuda.device_count()}, which some loops would all use: set "
                "CUDA_VISIBLE_DEVICES=0"
            )

    def case(self) -> Case:
        """The settings that all entries share."""
        from ..session import Case

        return Case(
            model=self.model,
            mode="train",
            precision=self.precision,
            num_steps=self.num_steps,
            batch=self.batch,
            image_size=self.image_size or own_image_size(self.model),
        )

    def entries(self) -> list[str]:
        """The entries in the order they run; CUDA graphs of whole steps need a GPU."""
        wanted = [name for name in ENTRIES if not self.only or any(_matches(name, pattern) for pattern in self.only)]
        if not on_cuda(self.device):
            return [name for name in wanted if not name.startswith("step/") or self.only]
        return [ANCHOR, *(name for name in wanted if name != ANCHOR)]


def _matches(entry: str, pattern: str) -> bool:
    return pattern == entry.partition("/")[0] or fnmatchcase(entry, pattern)
