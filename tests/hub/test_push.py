"""Publishing: what is sent, what is never overwritten, and every failure as one sentence after which a try succeeds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from huggingface_hub import HfApi

from loopback import READ_TOKEN, LoopbackHub
from timm_gac.hub import PublishConfig, push, verify
from timm_gac.hub.push import check_upload

REPO = "me/gac-tiny"
FILES = ["README.md", "config.json", "golden.safetensors", "model.safetensors"]


def published(hub: LoopbackHub) -> dict[str, bytes]:
    return {path: data for path, data in hub.repositories[REPO].commits[-1].items() if path != ".gitattributes"}


def test_push_sends_these_files_in_one_commit(model_folder: Path, hub: LoopbackHub, api: HfApi) -> None:
    result = push(model_folder, PublishConfig(REPO), api)
    assert sorted(published(hub)) == sorted(result.files) == sorted(result.sent) == FILES
    assert len(hub.repositories[REPO].commits) == 2
    assert published(hub)["model.safetensors"] == (model_folder / "model.safetensors").read_bytes()
    assert result.url is not None and hub.url in result.url and result.folder is None


def test_dry_run_writes_the_folder_and_sends_nothing(model_folder: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    result = push(model_folder, PublishConfig(REPO, dry_run=True, out=tmp_path / "out"), HfApi(endpoint=hub.url))
    assert result.folder == tmp_path / "out" and result.url is None and hub.requests == []
    assert sorted(path.name for path in result.folder.iterdir()) == FILES
    assert verify(result.folder).passed
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        push(model_folder, PublishConfig(REPO, dry_run=True, out=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["out"]


def test_same_files_again_are_no_commit_and_other_ones_are_refused(
    model_folder: Path, hub: LoopbackHub, api: HfApi
) -> None:
    push(model_folder, PublishConfig(REPO), api)
    again = push(model_folder, PublishConfig(REPO), api)
    assert again.sent == () and len(hub.repositories[REPO].commits) == 2

    with pytest.raises(ValueError, match=r"expected a repository without README\.md, config\.json, got me/gac"):
        push(model_folder, PublishConfig(REPO, license="mit"), api)
    assert b"apache-2.0" in published(hub)["README.md"]
    assert push(model_folder, PublishConfig(REPO, license="mit", overwrite=True), api).sent == (
        "README.md",
        "config.json",
    )
    assert b"license: mit" in published(hub)["README.md"]


def test_files_of_others_stay(model_folder: Path, hub: LoopbackHub, api: HfApi) -> None:
    api.create_repo(REPO)
    hub.repositories[REPO].commits.append({"notes.txt": b"mine"})
    push(model_folder, PublishConfig(REPO), api)
    assert published(hub)["notes.txt"] == b"mine"


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", "expected a valid token"), (READ_TOKEN, "expected the right to write to me/gac-tiny")],
)
def test_tokens(token: str, message: str, model_folder: Path, hub: LoopbackHub) -> None:
    with pytest.raises(ValueError, match=message):
        push(model_folder, PublishConfig(REPO), HfApi(endpoint=hub.url, token=token))
    assert hub.repositories == {}


def test_missing_token(model_folder: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None, raising=False)
    with pytest.raises(ValueError, match=r"expected a (valid )?token for me/gac-tiny"):
        push(model_folder, PublishConfig(REPO), HfApi(endpoint=hub.url))


def test_no_network(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(ValueError, match="expected a connection to the Hub for me/gac-tiny, got Connect"):
        push(model_folder, PublishConfig(REPO), HfApi(endpoint="http://127.0.0.1:9", token="hf_any"))


@pytest.mark.parametrize(
    ("where", "status", "message"),
    [
        (("PUT", "/lfs/"), None, "expected a connection to the Hub"),
        (("PUT", "/lfs/"), 503, "got its error 503: try again later"),
        (("POST", "/commit/"), None, "expected a connection to the Hub"),
        (("POST", "/commit/"), 500, "got its error 500"),
        (("POST", "/commit/"), 412, "got a change by somebody else: try again"),
        (("POST", "/commit/"), 403, "expected the right to write"),
        (("POST", "/preupload/"), 429, "wait a few minutes"),
    ],
)
def test_what_fails_leaves_nothing_and_the_next_try_completes(
    where: tuple[str, str], status: int | None, message: str, model_folder: Path, hub: LoopbackHub, api: HfApi
) -> None:
    hub.failures[where] = status
    with pytest.raises(ValueError, match=message) as raised:
        push(model_folder, PublishConfig(REPO), api)
    assert "\n" not in str(raised.value)
    assert published(hub) == {}
    hub.failures.clear()
    assert sorted(push(model_folder, PublishConfig(REPO), api).sent) == FILES
    assert sorted(published(hub)) == FILES


def test_what_was_sent_before_the_cut_is_not_sent_again(model_folder: Path, hub: LoopbackHub, api: HfApi) -> None:
    hub.failures[("POST", "/commit/")] = None
    with pytest.raises(ValueError, match="expected a connection"):
        push(model_folder, PublishConfig(REPO), api)
    hub.failures.clear()
    hub.requests.clear()
    push(model_folder, PublishConfig(REPO), api)
    assert [method for method, _ in hub.requests if method == "PUT"] == []


def test_a_run_is_published_with_what_it_measured(model_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "model")
    (run / "config.json").write_text(json.dumps({"data": "cifar100", "epochs": 7, "lr": 0.1}))
    (run / "eval.json").write_text(json.dumps({"top1": 0.75, "top5": 0.9, "firing_rates": {"encoder": 0.25}}))
    (run / "metrics.csv").write_text("epoch,loss\n0,1\n")
    (run / "optimizer.bin").write_bytes(b"not for the Hub")
    (run / "model" / "pytorch_model.bin").write_bytes(b"not for the Hub")
    labels = tmp_path / "labels.txt"
    labels.write_text("ant\nbee\ncat\n")
    out = tmp_path / "out"
    result = push(run, PublishConfig(REPO, dry_run=True, out=out, label_names=str(labels)))
    assert sorted(result.files) == sorted([*FILES, "eval.json", "metrics.csv", "training.json"])
    config = json.loads((out / "config.json").read_text())
    assert config["label_names"] == ["ant", "bee", "cat"] and "num_classes" not in config["model_args"]
    assert config["dtype"] == "float32"
    assert json.loads((out / "training.json").read_text())["epochs"] == 7


@pytest.mark.parametrize("how", ["the run's data set", "--dataset", "--label-names"])
def test_class_names_of_known_sets(how: str, make_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run" / "model", num_classes=100)
    if how == "the run's data set":
        (tmp_path / "run" / "eval.json").write_text(json.dumps({"top1": 0.5, "dataset": "cifar100"}))
    options = {"--dataset": {"dataset": "CIFAR-100"}, "--label-names": {"label_names": "cifar100"}}.get(how, {})
    push(folder.parent, PublishConfig(REPO, dry_run=True, out=tmp_path / "out", **options))
    names = json.loads((tmp_path / "out" / "config.json").read_text())["label_names"]
    assert len(names) == 100 and (names[0], names[1], names[71], names[99]) == ("apple", "aquarium_fish", "sea", "worm")
    assert names == sorted(names)


def test_names_of_a_set_with_other_classes_are_not_taken(model_folder: Path, tmp_path: Path) -> None:
    push(model_folder, PublishConfig(REPO, dry_run=True, out=tmp_path / "out", dataset="cifar100"))
    assert "label_names" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with pytest.raises(ValueError, match="expected 3 label names, one a class, got 10"):
        push(model_folder, PublishConfig(REPO, dry_run=True, out=tmp_path / "other", label_names="cifar10"))
    with pytest.raises(ValueError, match="expected label names as cifar10, cifar100 or a text file, got 'cifar'"):
        push(model_folder, PublishConfig(REPO, dry_run=True, out=tmp_path / "other", label_names="cifar"))


def test_no_path_of_the_machine_is_published(model_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(model_folder, run / "model")
    recipe = {"data": str(tmp_path / "cifar100.npz"), "init": f"local-dir:{tmp_path}/a/model", "lr": 0.1}
    (run / "config.json").write_text(json.dumps(recipe | {"recipe": recipe}))
    (run / "eval.json").write_text(json.dumps({"top1": 0.5, "dataset": "cifar100", "weights": f"of {run}"}))
    files = push(run, PublishConfig(REPO, dry_run=True, out=tmp_path / "out")).files
    for name in files:
        assert str(tmp_path).encode() not in (tmp_path / "out" / name).read_bytes(), name
    training = json.loads((tmp_path / "out" / "training.json").read_text())
    assert training == {"data": "cifar100.npz", "init": "local-dir:model", "lr": 0.1}
    assert "| data | cifar100.npz |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt", "b.pkl", "x.pth.tar", "../config.json", "/etc/x"])
def test_pickles_and_path_tricks_are_never_sent(name: str) -> None:
    with pytest.raises(ValueError, match=r"expected (safetensors only|plain relative file names)"):
        check_upload(["config.json", name])


def test_wrong_sources(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected repo_id as ORG/NAME, got 'justname'"):
        PublishConfig("justname")
    with pytest.raises(ValueError, match="expected a model or run folder"):
        push(tmp_path / "none", PublishConfig(REPO))
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    (copy / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json' as a JSON object, got"):
        push(copy, PublishConfig(REPO, dry_run=True, out=tmp_path / "out"))
    (copy / "eval.json").unlink()
    labels = tmp_path / "labels.txt"
    labels.write_text("one\n")
    with pytest.raises(ValueError, match="expected 3 label names, one a class, got 1"):
        push(copy, PublishConfig(REPO, dry_run=True, out=tmp_path / "out", label_names=str(labels)))
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    safetensors.torch.save_file({name: t * 0 for name, t in tensors.items()}, copy / "model.safetensors")
    with pytest.raises(ValueError, match="expected a network whose logits depend on the image"):
        push(copy, PublishConfig(REPO, dry_run=True, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("license", ["MIT", "a licence", "a\nb", "", "x" * 100])
def test_a_licence_that_the_hub_does_not_spell_so_is_refused(license: str) -> None:
    with pytest.raises(ValueError, match="expected license as the Hub spells it"):
        PublishConfig(REPO, license=license)


@pytest.mark.parametrize("dataset", ["a\nb", " ", ""])
def test_a_data_set_is_one_line(dataset: str) -> None:
    with pytest.raises(ValueError, match="expected dataset as one printable line"):
        PublishConfig(REPO, dataset=dataset)


def test_label_files_of_an_editor_and_without_names(model_folder: Path, tmp_path: Path) -> None:
    classes = json.loads((model_folder / "config.json").read_bytes())["num_classes"]
    file, out = tmp_path / "names.txt", tmp_path / "out"
    file.write_text("\n".join(f"name {index}" for index in range(classes)), encoding="utf-8-sig")
    push(model_folder, PublishConfig(REPO, dry_run=True, out=out, label_names=str(file)))
    assert json.loads((out / "config.json").read_bytes())["label_names"][0] == "name 0"
    file.write_text("\n \n", encoding="utf-8")
    with pytest.raises(ValueError, match="without any: write them, in order"):
        push(model_folder, PublishConfig(REPO, dry_run=True, out=tmp_path / "other", label_names=str(file)))
    assert not (tmp_path / "other").exists()
