"""tools/runs.sh: every command in it is one that the command line takes, and what is finished is not done again."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

from timm_gac.cli.compare import CompareConfig
from timm_gac.cli.evaluate import EvaluateConfig
from timm_gac.train.options import parse

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "runs.sh"
PARTS = ("seeds", "distilled", "steps", "published", "gates", "moving", "digits", "eight_bits", "neurons", "formats")
# Instead of the real one: writes down what it was called with, and leaves what a run leaves.
STUB = """#!/bin/sh
echo "$@" >> "$LOG"
[ "$1" = train ] || exit 0
while [ "$1" != --out ]; do shift; done
mkdir -p "$2/checkpoints" && touch "$2/result.csv"
"""


def run(folder: Path, *parts: str) -> tuple[int, list[list[str]]]:
    program, log = folder / "bin" / "timm-gac", folder / "log"
    program.parent.mkdir(exist_ok=True)
    program.write_text(STUB)
    program.chmod(0o755)
    log.write_text("")
    environment = os.environ | {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "LOG": str(log)}
    done = subprocess.run(["sh", str(SCRIPT), *parts], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, [shlex.split(line) for line in log.read_text().splitlines()]


def test_every_command_is_taken(tmp_path: Path) -> None:
    code, commands = run(tmp_path, *PARTS)
    assert code == 0
    trained = [parse(words[1:], "timm-gac train") for words in commands if words[0] == "train"]
    assert len({options.out for _, options in trained}) == len(trained) == 9 + 1 + 6 + 2 + 8 + 6 + 90 + 3 + 2 + 3
    digits = [(recipe, str(options.out)) for recipe, options in trained if "digits_" in str(options.out)]
    assert {recipe.seed for recipe, _ in digits} == {*range(10)} and {recipe.data for recipe, _ in digits} == {"digits"}
    assert sum(recipe.model == "test_msresnet" for recipe, _ in digits) == 10
    trained = [(recipe, options) for recipe, options in trained if "digits_" not in str(options.out)]
    assert {recipe.seed for recipe, _ in trained} == {0, 1, 2} and {recipe.num_steps for recipe, _ in trained} >= {1, 6}
    gates = [recipe for recipe, options in trained if "gate_" in str(options.out)]
    assert all(recipe.holdout == 0.1 and recipe.epochs == 40 for recipe in gates) and len(gates) == 8
    assert all(not recipe.holdout for recipe, options in trained if "gate_" not in str(options.out))
    in_16_bits = ("ann_", "gac_bfloat16_", "published", "plif", "noise_")
    for recipe, options in trained:
        assert recipe.int8_convs != any(word in str(options.out) for word in in_16_bits), options.out
    for name, field, factor in (("slow", "gate_lr", 0.1), ("decay", "gate_decay", 1.0)):
        moving = [recipe for recipe, options in trained if f"gac_{name}_" in str(options.out)]
        plain = [recipe for recipe, options in trained if "gac_seed" in str(options.out)]
        assert moving == [replace(recipe, **{field: factor}) for recipe in plain] and len(moving) == 3
    learning = [recipe.neuron_lr for recipe, _ in trained if recipe.neuron == "plif"]
    assert learning == [1.0, 0.1]
    noisy = [(recipe.current_noise, recipe.epochs) for recipe, options in trained if "noise_" in str(options.out)]
    assert noisy == [(0.0, 40), (0.01, 40), (0.1, 40)]
    assert all(not recipe.current_noise for recipe, options in trained if "noise_" not in str(options.out))
    anns = {str(options.out): recipe for recipe, options in trained if recipe.model.startswith("ann_")}
    assert list(anns) == [f"runs/ann_seed{seed}" for seed in range(3)]
    spiking = {str(options.out): recipe for recipe, options in trained}
    for seed, recipe in enumerate(anns.values()):  # nothing but the network differs
        same = replace(spiking[f"runs/gac_seed{seed}"], int8_convs=False)
        assert recipe == replace(same, model="ann_resnet18_cifar") and recipe.seed == seed
        assert spiking[f"runs/gac_bfloat16_seed{seed}"] == same
    taught = spiking["runs/gac_distilled"]
    assert taught == replace(spiking["runs/gac_seed0"], teacher="runs/ann_seed0")
    evaluated = {words[1] for words in commands if words[0] == "eval"}
    assert {"runs/gac_distilled", *anns} <= evaluated
    published = [recipe for recipe, options in trained if "published" in str(options.out)]
    assert {(recipe.epochs, recipe.batch_size, recipe.loss) for recipe in published} == {(250, 64, "mean")}
    for words in commands:
        config = {"eval": EvaluateConfig, "compare": CompareConfig}.get(words[0])
        if config is not None:
            tyro.cli(config, args=words[2:])
    compared = [words[1] for words in commands if words[0] == "compare"]
    assert compared == [
        "runs/gac_seed0",
        "runs/gac_bfloat16_seed0",
        "runs/noise_0.0",
        "runs/noise_0.01",
        "runs/noise_0.1",
    ]
    assert sorted(len(words) for words in commands if words[0] == "gain") == [*[4] * 9, *[8] * 7]


def test_distilled_alone_trains_its_teacher_first(tmp_path: Path) -> None:
    code, commands = run(tmp_path, "distilled")
    outs = [words[words.index("--out") + 1] for words in commands if words[0] == "train"]
    assert code == 0 and outs == ["runs/ann_seed0", "runs/gac_distilled"]


def test_what_is_finished_is_left_alone_and_a_wrong_part_refused(tmp_path: Path) -> None:
    run(tmp_path, "published")
    code, commands = run(tmp_path, "published")
    assert code == 0 and not [words for words in commands if words[0] == "train"]
    (tmp_path / "runs" / "gac_published" / "result.csv").unlink()
    begun = [words for words in run(tmp_path, "published")[1] if words[0] == "train"]
    assert len(begun) == 1 and begun[0][-1] == "--resume"
    assert run(tmp_path, "published", "all") == (2, []) and run(tmp_path) == (2, [])


def test_a_run_of_other_options_is_not_taken_for_this_one(tmp_path: Path) -> None:
    assert run(tmp_path, "neurons")[0] == 0
    words = tmp_path / "runs" / "plif.words"
    assert words.read_text() == "cifar100_fast --neuron plif\n"
    words.write_text("cifar100_fast --neuron plif --int8-convs\n")
    assert run(tmp_path, "neurons") == (2, [])
    words.unlink()  # as of a run from elsewhere
    assert run(tmp_path, "neurons") == (2, [])


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_shells_read_it(shell: str) -> None:
    assert subprocess.run([shell, "-n", str(SCRIPT)]).returncode == 0
