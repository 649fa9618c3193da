"""Damaged model folders: each is loaded as it says, or refused by one sentence; none takes gigabytes, none is verified.

By hand: ``python tests/hub/fuzz_folders.py 1000 [SEED]``. A short part runs in test_fuzz.py.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch

from timm_gac.hub import (
    PublishConfig,
    load_model,
    prepare_folder,
    save_model_folder,
    save_quantized,
    verify,
    write_golden,
)

LONG = "k" * 500_000
ODD: list[Any] = [
    *(None, True, -1, 0, 1, 2, 1024, 10**6, 10**12, 10**300, -0.5, 0.5, 1e308, float("nan"), float("inf")),
    *("", "x", "[/x]", "\x1b[2J", "\ud800", "/etc/passwd", "../x", "None", "16", LONG),
    *([], [1], [0, 0, 0], [3, 4096, 4096], [3, 1, 1], [1, 16, 16], ["a"] * 3, [[]] * 9, [float("nan")] * 3, [0.0] * 3),
    *({}, {"a": 1}, {"source": 3}, {"scheme": "x"}, {"strict": LONG, "ann": None}, {LONG: LONG}),
]
ARGS = {
    "num_steps": (1, 3, 512, 1024, 10**9),
    "in_chans": (1, 4, 4096),
    "layers": ([1, 1, 1], [256, 256, 256], [1, 1], [0, 0, 0]),
    "channels": ([8192] * 3, [8, 8, 8], [24, 32]),
    "stem_width": (1, 4096),
    "stem_kernel": (1, 2, 3, 7, 31),
    "strides": ([8, 8, 8], [1, 1, 1], [1, 2, 2, 2]),
    "global_pool": ("max", "catavgmax", "", "fast", None),
    "spec": ({}, {"threshold": float("nan")}, "x"),
    "encoder": ("direct", "gac", "x"),
    "block": ("SpikingBlock", "MSBlock", "os.system"),
    "checkpoint_path": ("/etc/passwd",),
    "pretrained_cfg": ({"file": "/etc/passwd"},),
    "device": ("cuda:9",),
    LONG: (1,),
}
CFG = (
    *("input_size", "test_input_size", "mean", "std", "crop_pct", "interpolation", "crop_mode", "num_classes", "tag"),
    *("file", "url", "hf_hub_id", "state_dict", "custom_load", "label_offset", "first_conv", "classifier", "license"),
    *("label_names", "pool_size", "source", "architecture", "notes", LONG),
)
TOP = (
    *("architecture", "dtype", "num_classes", "num_features", "model_args", "pretrained_cfg", "label_names", "format"),
    *("quantization", "global_pool", "license_name", "license_link", "label_descriptions", LONG),
)


def make_folders(root: Path) -> list[Path]:
    """Whole folders of a float and a quantised network, with golden tensors and what a run measures."""
    torch.manual_seed(0)
    overlay = {"input_size": (3, 16, 16)}
    model = timm.create_model("test_gac_msresnet", num_classes=3, num_steps=2, pretrained_cfg_overlay=overlay)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(8, 3, 16, 16) * 1.2)
    folders = [save_model_folder(model.eval(), root / "float"), save_quantized(model, root / "int8")]
    numbers = {name: {"strict": 1.0, "paper": 1.0, "ann": 2.0} for name in ("energy_mj", "of_ann", "macs", "acs")}
    energy = {"model": "test_gac_msresnet", "num_steps": 2, "images": 4, "trained": True, "weights": "x"} | numbers
    for folder in folders:
        write_golden(folder)
        (folder / "eval.json").write_text(json.dumps({"top1": 0.5, "images": 4, "data": "cifar100"}))
        (folder / "energy.json").write_text(json.dumps(energy))
    return folders


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_bytes())
    change(content)
    file.write_text(json.dumps(content))


def odd_field(draw: random.Random, folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update({draw.choice(TOP): draw.choice(ODD)}))


def odd_argument(draw: random.Random, folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        for name in draw.sample(list(ARGS), draw.randint(1, 3)):
            config["model_args"][name] = draw.choice((*ARGS[name], draw.choice(ODD)))

    edit_json(folder / "config.json", change)


def odd_pretrained_cfg(draw: random.Random, folder: Path) -> None:
    edit_json(
        folder / "config.json",
        lambda config: config["pretrained_cfg"].update({draw.choice(CFG): draw.choice(ODD) for _ in range(2)}),
    )


def missing_field(draw: random.Random, folder: Path) -> None:
    def change(config: dict[str, Any]) -> None:
        inner = draw.choice([config, config, config["model_args"], config["pretrained_cfg"]])
        inner.pop(draw.choice(list(inner)))

    edit_json(folder / "config.json", change)


def odd_measurement(draw: random.Random, folder: Path) -> None:
    keys = (
        "top1",
        "top5",
        "images",
        "data",
        "dataset",
        "firing_rates",
        "top1_per_step",
        "ece",
        "parts",
        "stored_dtype",
    )
    edit_json(folder / "eval.json", lambda content: content.update({draw.choice(keys): draw.choice(ODD)}))


def odd_energy(draw: random.Random, folder: Path) -> None:
    keys = ("model", "num_steps", "images", "trained", "weights", "energy_mj", "of_ann", "macs", "acs", "costs")
    edit_json(folder / "energy.json", lambda content: content.update({draw.choice(keys): draw.choice(ODD)}))


def some_file(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(file for file in folder.iterdir() if file.is_file()))


def cut(draw: random.Random, folder: Path) -> None:
    file = some_file(draw, folder)
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def flip_anywhere(draw: random.Random, folder: Path) -> None:
    file = some_file(draw, folder)
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice((1, 1, 10, 1000))):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def flip_header(draw: random.Random, folder: Path) -> None:
    file = folder / draw.choice(("model.safetensors", "golden.safetensors"))
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    content[draw.randrange(draw.choice((8, length)))] = draw.randrange(256)
    file.write_bytes(content)


def rubbish(draw: random.Random, folder: Path) -> None:
    some_file(draw, folder).write_bytes(
        draw.choice((b"", b"[" * 100_000, draw.randbytes(999), b"null", b'"x"', b"1e999"))
    )


def missing_file(draw: random.Random, folder: Path) -> None:
    some_file(draw, folder).unlink()


def strange_file(draw: random.Random, folder: Path) -> None:
    file = some_file(draw, folder)
    file.unlink()
    draw.choice(
        (file.mkdir, lambda: file.symlink_to(file), lambda: os.mkfifo(file), lambda: file.symlink_to("/dev/null"))
    )()


def odd_tensor(draw: random.Random, folder: Path) -> None:
    file = folder / draw.choice(("model.safetensors", "golden.safetensors", "model.safetensors"))
    tensors = safetensors.torch.load_file(file)
    name = draw.choice(sorted(tensors))
    value = tensors[name]
    real = value.is_floating_point()
    changes: list[Callable[[], Any]] = [
        lambda: None,
        lambda: value.flatten(),
        lambda: value[None],
        lambda: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value[None],
        lambda: value.new_zeros(0),
        lambda: value.to(draw.choice((torch.int8, torch.bool, torch.float64, torch.bfloat16, torch.int64))),
        lambda: value + 1 if value.dtype != torch.bool else value,
        lambda: torch.full_like(value, draw.choice((torch.nan, torch.inf, -torch.inf, -1.0))) if real else value,
        lambda: torch.where(torch.rand(value.shape) < 0.01, torch.nan, value) if real else value,
        lambda: torch.zeros(draw.choice(((2000, 3, 16, 16), (4, 3, 500, 500), (1, 1, 1, 1)))),
    ]
    changed = draw.choice(changes)()
    tensors.pop(name)
    if changed is not None:
        tensors[draw.choice((name, name, name, "other", LONG[:60_000]))] = changed.contiguous()
    metadata = {"weights_sha256": "0"} if draw.random() < 0.5 else None
    safetensors.torch.save_file(tensors, file, metadata)


KINDS = (
    *(odd_field, odd_argument, odd_pretrained_cfg, missing_field, odd_measurement, odd_energy, cut, flip_anywhere),
    *(flip_header, rubbish, missing_file, strange_file, odd_tensor, odd_tensor),
)


def content_of(file: Path) -> bytes | None:
    return file.read_bytes() if file.is_file() else None


def use(folder: Path, weights: bytes, scratch: Path) -> None:
    """Load, verify and prepare a folder; ValueErrors of these pass."""
    load_model(folder)
    try:
        if verify(folder).passed and content_of(folder / "model.safetensors") != weights:
            raise AssertionError("changed weights were verified")
    except ValueError as error:
        check_sentence(error)
    prepare_folder(folder, scratch, PublishConfig("me/x", dry_run=True))


def check_sentence(error: ValueError) -> None:
    text = str(error)
    if len(text) > 500 or not text.startswith("expected ") or "got" not in text or "\n" in text:
        raise AssertionError(f"no sentence of under 500 characters: {text[:600]!r}") from error


def run(count: int, seed: int, root: Path) -> tuple[Counter[str], list[str]]:
    """Damage and use ``count`` folders; outcomes by kind, and what went wrong."""
    folders, outcomes, failures = make_folders(root), Counter[str](), list[str]()
    weights = {folder: (folder / "model.safetensors").read_bytes() for folder in folders}
    for case in range(count):
        draw = random.Random(f"{seed} {case}")
        torch.manual_seed(case)
        kind, whole = KINDS[case % len(KINDS)], draw.choice(folders)
        folder, out = root / "damaged", root / "out"
        for used in (folder, out):
            shutil.rmtree(used, ignore_errors=True)
        shutil.copytree(whole, folder)
        kind(draw, folder)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        outcome = "passed"
        try:
            use(folder, weights[whole], out)
        except ValueError as error:
            outcome = "refused"
            try:
                check_sentence(error)
            except AssertionError as wrong:
                outcome = "failed"
                failures.append(f"case {case} {kind.__name__}: {wrong}")
        except Exception as error:
            outcome = "failed"
            failures.append(f"case {case} {kind.__name__}: {type(error).__name__}: {str(error)[:600]}")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if grown > 1024 or time.monotonic() - started > 60:
            outcome = "failed"
            failures.append(f"case {case} {kind.__name__}: {grown} MB more, {time.monotonic() - started:.0f} s")
        outcomes[f"{kind.__name__} {outcome}"] += 1
    return outcomes, failures


def main() -> int:
    """Run by hand; 1 where something went wrong."""
    count, seed = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    with tempfile.TemporaryDirectory() as root:
        outcomes, failures = run(count, seed, Path(root))
    for name, number in sorted(outcomes.items()):
        sys.stdout.write(f"{number:6}  {name}\n")
    sys.stdout.write("\n".join([*failures, f"{count} folders, {len(failures)} failures", ""]))
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
