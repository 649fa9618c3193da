"""timm's train.py, run as it is in a process of its own, and fed with the data set that lies on the device.

Only what the script asks timm for is replaced: ``create_model`` gives the benchmark's network, ``create_dataset`` and
``create_loader`` the resident batches. Loop, optimiser, schedule, autocast, logging, evaluation and checkpoint are
timm's.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from ..harness import Row
from ..networks import Unavailable
from ..session import Case, Session
from .clock import Clock, ResidentBatches, reset_memory
from .entries import graphed_network, reasons_for_eager, resident_set, split_entry, training_is_checked
from .ours import LR, Settings, choose_algorithms

OPTIMIZER = "SGD of timm"


def measure_script(
    case: Case, device: torch.device, entry: str, script: Path | None, seconds: float, limit_s: float
) -> Row:
    """Fields of the row of an entry whose loop is ``timm``.

    Args:
        case: Its settings.
        device: Where it computes.
        entry: Its name.
        script: Path of train.py; None is not given.
        seconds: Seconds to time it.
        limit_s: Give it up after so many seconds.

    Raises:
        RuntimeError: The script failed; the message is the last line of its errors.
        Unavailable: There is no script.
    """
    if script is None:
        raise Unavailable("the script is in a clone of pytorch-image-models: give --timm-train PATH")
    if split_entry(entry)[2] == "graphed" and device.type != "cuda":
        raise Unavailable("CUDA graphs need a CUDA device")
    with tempfile.TemporaryDirectory() as folder:
        task = {"case": asdict(case), "device": device.type, "entry": entry, "seconds": seconds, "folder": folder}
        command = [sys.executable, "-m", __name__, json.dumps(task | {"script": str(script)})]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(limit_s, 1e6), env=environment)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"not done within {limit_s:.0f} s") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(lines[-1] if lines else f"status {done.returncode}")
        row: Row = json.loads((Path(folder) / "row.json").read_text())
    return row


def arguments_of(case: Case, device: str, folder: str, classes: int, way: str) -> list[str]:
    """What the script is called with."""
    given: dict[str, object] = {
        "--data-dir": folder,
        "--model": case.model,
        "--num-classes": classes,
        "--batch-size": case.batch,
        "--lr": LR,
        "--warmup-epochs": 0,
        "--epochs": 1,
        "--workers": 0,
        "--device": device,
        "--output": folder,
    }
    amp = ["--amp", "--amp-dtype", "bfloat16"] if case.precision == "bfloat16" else []
    compiled = ["--torchcompile"] if way == "compile" else []
    return [str(word) for pair in given.items() for word in pair] + ["--channels-last", *amp, *compiled]


def run_script(task: dict[str, Any]) -> Row:
    """Run the script in this process; ``task`` is what `measure_script` writes."""
    import timm.data
    import timm.models

    case, device = Case(**task["case"]), torch.device(task["device"])
    _, name, way = split_entry(task["entry"])
    session = Session(case, device, steps=1)
    network, clock = session.build(name), Clock(device, task["seconds"])
    images, labels = resident_set(session)
    torch.backends.cudnn.benchmark = True  # as the script does
    settings = Settings(device, case.precision, case.batch)
    choose_algorithms(network, images[: case.batch], labels[: case.batch], settings)
    reset_memory(device)
    dataset = ResidentBatches(images, labels, case.batch)

    def create_model(*args: object, **kwargs: object) -> Any:
        return graphed_network(network, device) if way == "graphed" else network

    def create_dataset(*args: object, **kwargs: object) -> Any:
        return dataset

    def create_loader(dataset: ResidentBatches, *args: object, is_training: bool = False, **kwargs: object) -> Any:
        return dataset.loader(clock) if is_training else DataLoader(dataset, batch_size=None)

    replaced: Any = timm.models
    replaced.create_model = create_model
    replaced = timm.data
    replaced.create_dataset, replaced.create_loader = create_dataset, create_loader
    script, classes = task["script"], session.model.num_classes
    sys.argv = [script, *arguments_of(case, device.type, task["folder"], classes, way)]
    sys.path.insert(0, str(Path(script).resolve().parent))
    with reasons_for_eager() as notes, training_is_checked(network):
        runpy.run_path(script, run_name="__main__")
    return clock.row(case.batch) | {"optimizer": OPTIMIZER, "status": "ok", "note": "; ".join(notes)}


if __name__ == "__main__":
    import timm_gac.models  # noqa: F401 (registers them)

    given = json.loads(sys.argv[1])
    (Path(given["folder"]) / "row.json").write_text(json.dumps(run_script(given)))
