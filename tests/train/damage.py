"""Damage to checkpoints and kills of trainers, at random from a seed; by hand: ``python tests/train/damage.py``.

What is right: a damaged checkpoint is refused in one sentence, or it is as good as before; a killed run ends with the
weights and the table of an undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from timm_gac.train import checkpoints
from timm_gac.train.run import Run

Damage = Callable[[random.Random, Path], None]
ODD: tuple[Any, ...] = (None, True, -1, 1e400, float("nan"), "x", [], {}, [1], {"a": 1}, 2**70, "9" * 600)


def flip_bit(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(rng: random.Random, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def append(rng: random.Random, file: Path) -> None:
    file.write_bytes(file.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def overwrite(rng: random.Random, file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = rng.randrange(len(content))
    content[start : start + 64] = rng.randbytes(len(content[start : start + 64]))
    file.write_bytes(content)


def delete(rng: random.Random, file: Path) -> None:
    file.unlink()


def nest(rng: random.Random, file: Path) -> None:
    depth = rng.choice((1000, 100_000))
    text = file.read_bytes() if file.suffix == ".json" else b'{"format": "timm_gac.train/2"}'
    file.write_bytes(text.rstrip()[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}")


def _seal(folder: Path, state: dict, tensors: dict | None = None) -> None:
    """Write a checkpoint with right hashes: what only somebody with intent writes."""
    if tensors is not None:
        content = save(tensors)
        (folder / checkpoints.TENSORS).write_bytes(content)
        state["sha256"] = hashlib.sha256(content).hexdigest()
    state.pop("state_sha256", None)
    state["state_sha256"] = checkpoints._state_hash(state)
    (folder / checkpoints.STATE).write_text(json.dumps(state))


def change_entry(rng: random.Random, file: Path) -> None:
    state = json.loads((file.parent / checkpoints.STATE).read_text())
    name = rng.choice([name for name in state if name != "data"])
    if rng.random() < 0.3:
        del state[name]
    else:
        state[name] = rng.choice(ODD)
    _seal(file.parent, state)


def change_tensor(rng: random.Random, file: Path) -> None:
    folder = file.parent
    state, tensors = json.loads((folder / checkpoints.STATE).read_text()), load_file(folder / checkpoints.TENSORS)
    name = rng.choice(sorted(tensors))
    kind = rng.randrange(5)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[name] = torch.zeros(3, 1, 2)
    elif kind == 2:
        tensors[rng.choice(("optimizer.x.y", "optimizer.99999.a", "optimizer.-5.a", "rng.0.cpu", "ema.", "a"))] = (
            tensors.pop(name).clone()
        )
    elif kind == 3 and tensors[name].is_floating_point():
        tensors[name] = torch.full_like(tensors[name], rng.choice((float("nan"), float("inf"))))
    else:
        tensors[name] = tensors[name].to(torch.float64 if tensors[name].is_floating_point() else torch.int16)
    _seal(folder, state, tensors)


DAMAGES: tuple[Damage, ...] = (
    flip_bit,
    cut,
    append,
    overwrite,
    delete,
    nest,
    change_entry,
    change_entry,
    change_tensor,
)


def fuzz(run: Run, seed: int, count: int) -> Counter[str]:
    """Damage the newest checkpoint of a run ``count`` times and resume each.

    Returns:
        How often it was refused in a sentence and how often it was read, by kind of damage.

    Raises:
        AssertionError: It was refused otherwise, or read with other weights though its tensor file was damaged.
    """
    rng, outcomes = random.Random(seed), Counter[str]()
    good = checkpoints.latest_checkpoint(run.options.out / "checkpoints")
    assert good is not None
    for number in range(count):
        with tempfile.TemporaryDirectory() as folder:
            bad = Path(shutil.copytree(good, Path(folder) / good.name))
            damage = rng.choice(DAMAGES)
            file = bad / rng.choice((checkpoints.TENSORS, checkpoints.STATE))
            damage(rng, file)
            what = f"{number}: {damage.__name__} of {file.name}"
            try:
                run._resume(bad)
            except ValueError as error:
                assert str(error).startswith("expected ") and len(str(error)) < 500, f"{what}: {error}"
                assert "\n" not in str(error), f"{what}: {error}"
                outcomes[f"{damage.__name__}: refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
            else:
                assert damage in (change_entry, change_tensor), f"{what}: read"
                outcomes[f"{damage.__name__}: read"] += 1
                run._resume(good)
    return outcomes


def rows(out: Path) -> list[tuple[str, ...]]:
    """What metrics.csv says of each epoch, without times."""
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return [
            tuple(row[name] for name in ("epoch", "step", "train_loss", "train_match"))
            for row in csv.DictReader(stream)
        ]


def kill(given: Callable[[Path, list[str]], list[str]], folder: Path, seed: int, count: int) -> Counter[str]:
    """Kill a trainer ``count`` times at random moments and resume it, until it is done; then compare.

    Args:
        given: Makes the command line of an output folder and further options.
        folder: For the runs.
        seed: Of the moments.
        count: Number of kills.
    """
    from children import Child

    rng, done = random.Random(seed), Counter[str]()
    whole = Child(given(folder / "whole", []), folder / "errors")
    assert whole.wait() == 0, whole.stderr()
    out, more = folder / "killed", list[str]()
    while done["kills"] < count:
        before = checkpoints.latest_checkpoint(out / "checkpoints")
        child = Child(given(out, more), folder / "errors")
        while child.running() and checkpoints.latest_checkpoint(out / "checkpoints") == before:
            time.sleep(0.01)
        time.sleep(rng.random())
        number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            child.send(number)
        status = child.wait()
        if status == 0:  # it was done before
            done["done early"] += 1
            break
        assert status in (-signal.SIGKILL, 128 + signal.SIGTERM), child.stderr()
        done["kills"] += 1
        more = ["--resume"] if checkpoints.latest_checkpoint(out / "checkpoints") else []
    last = Child(given(out, more), folder / "errors")
    assert last.wait(600) == 0, last.stderr()
    first, second = (
        load_file(checkpoints.latest_checkpoint(folder / name / "checkpoints") / checkpoints.TENSORS)
        for name in ("whole", "killed")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert rows(folder / "whole") == rows(out), (rows(folder / "whole"), rows(out))
    return done


def main() -> None:
    """Both, with their counts on standard output."""
    import numpy as np

    from timm_gac.train import Recipe
    from timm_gac.train.loop import RunOptions, Trainer

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, labels = Path(name), np.arange(64) % 4
        images = np.random.default_rng(0).integers(0, 255, (64, 3, 8, 8)).astype(np.uint8)
        npz = folder / "d.npz"
        np.savez(npz, x_train=images, y_train=labels, x_test=images[:16], y_test=labels[:16])
        recipe = Recipe(
            model="test_gac_msresnet",
            num_steps=1,
            data=str(npz),
            epochs=1,
            batch_size=16,
            ema_decay=0.9,
            warmup_epochs=0,
        )
        trainer = Trainer(recipe, RunOptions(out=folder / "damaged", device="cpu"))
        trainer.run()
        sys.stdout.write(f"{dict(fuzz(trainer.state, options.seed, options.damages))}\n")

        def given(out: Path, more: list[str]) -> list[str]:
            fields = ["--model", "test_gac_msresnet", "--num-steps", "1", "--data", str(npz), "--batch-size", "16"]
            fields += ["--epochs", str(options.epochs), "--eval-every", "1000", "--checkpoint-steps", "1"]
            return ["cifar100", *fields, "--log-steps", "3", "--device", "cpu", "--out", str(out), *more]

        if options.kills:
            sys.stdout.write(f"{dict(kill(given, folder, options.seed, options.kills))}\n")


if __name__ == "__main__":
    main()
