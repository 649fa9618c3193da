"""A validation folder that lacks a class (or has another one) is scored against the wrong classes.

Right: labels follow the class names that the network (config.json's label_names) or the training folder has, or the
set is refused with a sentence that names the classes. Here the network always answers "cherry"; the test folder has
banana and cherry only, so top-1 must be 50 %. In training, a test folder with other classes must be refused or mapped.
Pictures without class folders have no labels, and a notebook's hidden .ipynb_checkpoints is no class.
"""

import json
import logging
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image

import timm_gac  # noqa: F401
from timm_gac.cli import main
from timm_gac.hub.folder import save_model_folder, write_config
from timm_gac.train.loop import RunOptions, Trainer
from timm_gac.train.recipes import Recipe

logging.disable(logging.WARNING)
tmp = Path(tempfile.mkdtemp())


def folder(name, side, test_classes, n=4):
    for split, classes in (("train", ("apple", "banana", "cherry")), ("val", test_classes)):
        for c in classes:
            (tmp / name / split / c).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(np.full((side, side, 3), 40 * i, np.uint8)).save(tmp / name / split / c / f"{i}.png")
    return str(tmp / name)


def network(side):
    model = timm.create_model("test_gac_msresnet", num_classes=3, num_steps=1).eval()
    model.pretrained_cfg = dict(model.pretrained_cfg) | {"input_size": (3, side, side)}
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([0.0, 0.0, 9.0])  # always cherry
    out = tmp / f"model{side}"
    save_model_folder(model, out)
    config = json.loads((out / "config.json").read_text())
    write_config(out / "config.json", config | {"label_names": ["apple", "banana", "cherry"]})
    return str(out)


def top1(side, data):
    report = tmp / f"{Path(data).name}.json"
    code = main(
        ["eval", network(side), "--data", "folder", "--data-dir", data, "--num-workers", "0", "--json", str(report)]
    )
    if code:
        return None  # refused
    return json.loads(report.read_text())["top1"]


bad = []
for side, way in ((32, "in memory"), (96, "streamed")):
    for what, classes in (
        ("lacks a class", ("banana", "cherry")),
        ("has another class instead", ("aardvark", "cherry")),
    ):
        got = top1(side, folder(f"{way}{what}".replace(" ", "_"), side, classes))
        right = 0.5  # cherry is half of the pictures in both
        if what == "has another class instead":
            if got is not None:
                bad.append(f"eval {way}, test folder {what}: accepted without a word (top-1 {got:.0%})")
        elif got is not None and abs(got - right) > 1e-6:
            bad.append(f"eval {way}, test folder {what}: top-1 {got:.0%} instead of {right:.0%}")

for side, way in ((32, "in memory"), (96, "streamed")):
    flat = tmp / f"flat{side}"
    (flat / "val").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(np.full((side, side, 3), 40 * i, np.uint8)).save(flat / "val" / f"{i}.png")
    if (got := top1(side, str(flat))) is not None:
        bad.append(f"eval {way}, pictures without class folders: accepted as class 0 (top-1 {got:.0%})")


def trainer(data):
    recipe = Recipe(
        model="test_gac_msresnet",
        data="folder",
        data_dir=data,
        image_size=16,
        epochs=1,
        batch_size=4,
        num_steps=1,
        num_workers=0,
    )
    return Trainer(recipe, RunOptions(out=Path(data) / "run", cpu=True))


hidden = folder("hidden", 16, ("apple", "banana", "cherry"))
(Path(hidden) / "train/apple/.ipynb_checkpoints").mkdir()
Image.new("RGB", (16, 16)).save(Path(hidden) / "train/apple/.ipynb_checkpoints/0-checkpoint.png")
for what, data, right in (
    ("test folder lacks a class", folder("train_run", 16, ("banana", "cherry")), [1, 2]),
    ("hidden folder", hidden, [0, 1, 2]),
):
    try:
        made = trainer(data)
        _, labels = next(iter(made.state.loaders.test.batches(0)))
        names, got = made.state.loaders.label_names, sorted(set(labels.tolist()))
        if got != right or names != ("apple", "banana", "cherry"):
            bad.append(f"train, {what}: test labels {got} of the classes {names}, right are {right}")
    except ValueError:
        pass
print("\n".join(bad) or "ok")
sys.exit(bool(bad))
