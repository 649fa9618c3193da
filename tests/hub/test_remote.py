"""Fetching: only safetensors and plain names, small and well-formed configs, pinned revisions, the cache offline."""

from __future__ import annotations

import functools
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import timm
from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from loopback import LoopbackHub, Repository
from timm_gac.hub import PublishConfig, check_config, fetch_model, open_source, push, read_config
from timm_gac.hub.config import MAX_CONFIG_BYTES, folder_format

REPO = "me/gac-tiny"


@pytest.fixture
def repository(model_folder: Path, hub: LoopbackHub, api: HfApi) -> Repository:
    """A published model."""
    push(model_folder, PublishConfig(REPO), api)
    hub.requests.clear()
    return hub.repositories[REPO]


def test_fetches_the_wanted_files_only(
    repository: Repository, hub: LoopbackHub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository.commits.append(repository.commits[-1] | {"pytorch_model.bin": b"x", "big.zip": b"y", "run/a.pt": b"z"})
    folder = fetch_model(REPO, api=api)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "golden.safetensors",
        "model.safetensors",
    ]
    assert not {"pytorch_model.bin", "big.zip", "a.pt"} & set(hub.downloads())

    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch_model(REPO) == folder and hub.requests == []
    with pytest.raises(ValueError, match="expected me/other in the cache or a connection"):
        fetch_model("me/other")


def test_revisions_are_pinned(repository: Repository, api: HfApi) -> None:
    first = repository.sha(len(repository.commits) - 1)
    repository.tags["v1"] = len(repository.commits) - 1
    repository.commits.append(repository.commits[-1] | {"README.md": b"second"})
    assert fetch_model(f"{REPO}@v1", api=api) == fetch_model(REPO, revision=first, api=api)
    assert (fetch_model(f"hf-hub:{REPO}".removeprefix("hf-hub:"), api=api) / "README.md").read_bytes() == b"second"
    with pytest.raises(ValueError, match="expected an existing revision, got me/gac-tiny@v2"):
        fetch_model(f"{REPO}@v2", api=api)
    with pytest.raises(ValueError, match="expected one revision, got 'v1' and 'main'"):
        fetch_model(f"{REPO}@v1", revision="main", api=api)


def test_a_repository_with_pickles_only_is_refused_unread(hub: LoopbackHub, api: HfApi) -> None:
    hub.repositories[REPO] = Repository([{"config.json": b"{}", "pytorch_model.bin": b"\x80"}])
    with pytest.raises(ValueError, match=r"got only pytorch_model\.bin, which may run code when read"):
        fetch_model(REPO, api=api)
    assert hub.downloads() == []


def test_a_commit_between_the_check_and_the_download_is_noticed(
    repository: Repository, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = api.model_info(REPO, files_metadata=True)
    repository.commits.append(repository.commits[-1] | {"../x": b"y"})
    monkeypatch.setattr(api, "model_info", lambda *arguments, **options: checked)
    with pytest.raises(ValueError, match="got a new commit: try again"):
        fetch_model(REPO, api=api)


@pytest.mark.skipif(
    timm.create_model("test_gac_msresnet", device="meta").pretrained_cfg.get("hf_hub_filename") is None,
    reason="the registered models do not ask for model.safetensors by name",
)
def test_timm_itself_reads_no_pickle(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.dumps(GOOD | {"pretrained_cfg": {"num_classes": 3, "input_size": [3, 32, 32]}}).encode()
    hub.repositories[REPO] = Repository([{"config.json": config, "pytorch_model.bin": b"\x80"}])
    download = functools.partial(hf_hub_download, endpoint=hub.url)
    monkeypatch.setattr("timm.models._hub.hf_hub_download", download)
    with pytest.raises(EntryNotFoundError, match=r"model\.safetensors"):
        timm.create_model(f"hf-hub:{REPO}", pretrained=True, cache_dir=tmp_path)
    assert hub.downloads() == ["config.json"]


@pytest.mark.parametrize(
    "name", ["../../.bashrc", "/etc/passwd", "a/../../b", "a\\..\\b", "C:x", "~/x", "a\x00b", "a\nb"]
)
def test_path_tricks_are_refused_unread(name: str, repository: Repository, hub: LoopbackHub, api: HfApi) -> None:
    repository.commits.append(repository.commits[-1] | {name: b"x"})
    with pytest.raises(ValueError, match="expected plain relative file names in me/gac-tiny, got"):
        fetch_model(REPO, api=api)
    assert hub.downloads() == []


def test_an_oversized_config_is_refused_unread(repository: Repository, hub: LoopbackHub, api: HfApi) -> None:
    repository.commits.append(repository.commits[-1] | {"config.json": b" " * (MAX_CONFIG_BYTES + 1)})
    with pytest.raises(ValueError, match=r"expected config\.json in me/gac-tiny of at most 1,048,576 bytes"):
        fetch_model(REPO, api=api)
    assert hub.downloads() == []


def test_missing_repository_and_no_network(hub: LoopbackHub, api: HfApi) -> None:
    with pytest.raises(ValueError, match="expected an existing repository, got me/none"):
        fetch_model("me/none", api=api)
    with pytest.raises(ValueError, match="expected a connection to the Hub for me/none"):
        fetch_model("me/none", api=HfApi(endpoint="http://127.0.0.1:9"))
    with pytest.raises(ValueError, match="expected a repository as ORG/NAME"):
        fetch_model("a/b/c", api=api)


def test_what_is_no_model_folder_is_said_to_be_which(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("")
    for name, kept in (("weights", "model.safetensors"), ("config", "config.json"), ("run", "config.json"), ("no", "")):
        (tmp_path / name).mkdir()
        if kept:
            shutil.copy(model_folder / kept, tmp_path / name / kept)
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cifar100.npz").touch()
    for given, said in (
        ("none", "got '.*none', which does not exist: check the path, and the folder that the command runs in"),
        ("text", "got the file '.*text': name a folder"),
        ("config/config.json", "got the file '.*config.json': give its folder '.*config'"),
        (
            "no",
            "or a run folder with model/ in it, got '.*no' without config.json and model.safetensors: check the path",
        ),
        ("data", "got '.*data' without config.json and model.safetensors: check the path"),
        ("weights", "got '.*weights' without config.json: check the path"),
        ("config", "got '.*config' without model.safetensors: check the path"),
        ("run", "got the run folder '.*run' without: the run has not ended, go on with --resume"),
    ):
        for prefix in ("", "local-dir:"):
            if prefix or given != "none":
                with pytest.raises(ValueError, match=f"^expected a model (or run )?folder.*{said}$"):
                    open_source(f"{prefix}{tmp_path / given}")
    with pytest.raises(ValueError, match=r"got './none', which is none, and no such folder exists"):
        open_source("./none")  # which the Hub is not asked for


def test_a_mistyped_folder_is_said_to_be_none(
    repository: Repository, hub: LoopbackHub, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``runs/nope`` may be a repository as well as a folder: it is neither, whether or not the Hub can be asked."""
    with pytest.raises(
        ValueError, match=r"got 'runs/nope': no such folder exists here; of the Hub: expected an existing"
    ):
        open_source("runs/nope", api=api)
    unreachable = HfApi(endpoint="http://127.0.0.1:9")
    with pytest.raises(
        ValueError, match=r"got 'runs/nope': no such folder exists here; of the Hub: expected a connection"
    ):
        open_source("runs/nope", api=unreachable)
    with pytest.raises(ValueError, match=r"connection to the Hub for runs/nope.*: check it and try again$"):
        open_source("hf-hub:runs/nope", api=unreachable)
    repository.commits.append({name: data for name, data in repository.commits[-1].items() if name != "config.json"})
    with pytest.raises(ValueError, match=r"expected config\.json in me/gac-tiny, got none: it is no timm model$"):
        open_source(REPO, api=api)


def test_a_cut_download_is_one_sentence_and_the_next_try_completes(
    repository: Repository, hub: LoopbackHub, api: HfApi
) -> None:
    hub.failures[("GET", "model.safetensors")] = None
    with pytest.raises(ValueError, match=r"expected a connection to the Hub|in the cache or a connection"):
        fetch_model(REPO, api=api)
    hub.failures.clear()
    assert (fetch_model(REPO, api=api) / "model.safetensors").is_file()


def test_a_hub_that_never_answers_is_a_sentence(
    repository: Repository, hub: LoopbackHub, api: HfApi, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm_gac.hub.remote.TIMEOUT", 0.3)
    started = time.monotonic()
    hub.failures[("GET", "/api/models/")] = 5.0
    with pytest.raises(ValueError, match="expected a connection to the Hub for me/gac-tiny, got ReadTimeout"):
        fetch_model(REPO, api=api)
    hub.failures[("GET", "/api/whoami")] = 5.0
    with pytest.raises(ValueError, match="expected a connection to the Hub for me/gac-tiny, got ReadTimeout"):
        push(model_folder, PublishConfig(REPO), api)
    assert time.monotonic() - started < 4


@pytest.mark.parametrize(
    "answer",
    [b"<html>Log in</html>", b"", b"null", b"[]", b"3", b'{"siblings": 3}', b'{"siblings": [{"rfilename": 3}]}', b"{}"],
)
def test_odd_answers_are_a_sentence(answer: bytes, hub: LoopbackHub, repository: Repository, api: HfApi) -> None:
    hub.failures[("GET", "/api/models/")] = answer
    with pytest.raises(ValueError, match=r"^expected (the Hub's answer|model\.safetensors|plain)") as raised:
        fetch_model(REPO, api=api)
    assert len(str(raised.value)) < 500 and hub.downloads() == []


def test_sources(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_source(str(model_folder)) == open_source(f"local-dir:{model_folder}") == model_folder
    shutil.copytree(model_folder, tmp_path / "run" / "model")
    assert open_source(str(tmp_path / "run")) == tmp_path / "run" / "model"
    with pytest.raises(ValueError, match=r"expected a model folder, ORG/NAME .* or a name of `timm-gac models`, got"):
        open_source("no such thing")
    monkeypatch.chdir(model_folder)
    for nothing in ("", "local-dir:"):  # no folder, and not the current one
        with pytest.raises(ValueError, match=f"expected a model folder, ORG/NAME .*, got '{nothing}'"):
            open_source(nothing)
    with pytest.raises(ValueError, match="expected a repository of the Hub with a revision"):
        open_source(str(model_folder), revision="main")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "model.pth").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"got only model\.pth, which may run code"):
        open_source(str(pickled))


GOOD: dict[str, Any] = {"architecture": "test_gac_msresnet", "num_classes": 3, "model_args": {"num_steps": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet18"}, "expected an architecture of this package"),
        ({"architecture": None}, "expected an architecture of this package"),
        ({"num_classes": "3"}, "expected num_classes as an integer from 0"),
        ({"num_classes": 10**12}, "expected num_classes as an integer from 0"),
        ({"num_classes": True}, "expected num_classes as an integer from 0"),
        ({"model_args": [1]}, "expected model_args as an object"),
        ({"model_args": {"num_steps": 10**9}}, "expected num_steps as an integer from 1 to 1,024"),
        ({"model_args": {"in_chans": 10**9}}, "expected in_chans as an integer from 1"),
        ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "expected arguments among"),
        ({"model_args": {"num_classes": 4}}, "expected one number of classes"),
        ({"pretrained_cfg": "x"}, "expected pretrained_cfg as an object"),
        ({"pretrained_cfg": {"file": "/etc/passwd"}}, "which leads elsewhere"),
        ({"pretrained_cfg": {"url": "http://127.0.0.1/x.pth"}}, "which leads elsewhere"),
        ({"pretrained_cfg": {"hf_hub_filename": "x.bin"}}, "which leads elsewhere"),
        ({"pretrained_cfg": {"input_size": [3, 10**6, 10**6]}}, "expected input_size as"),
        ({"label_names": ["a"]}, "expected 3 label names"),
        ({"label_names": "abc"}, "expected label names as a list"),
        ({"label_names": ["a", "b", "\x1b[2J"]}, "expected label names of printable"),
        ({"label_names": ["a", "b", "\ud800"]}, "expected label names of printable"),
        ({"architecture": "test_gac_msresnet.x"}, "expected an architecture of this package"),
        ({"model_args": {"channels": [8192] * 3}}, "expected a network of at most 134,217,728 weights"),
        ({"model_args": {"num_steps": 1024}}, "expected layers of at most 33,554,432 values"),
        ({"pretrained_cfg": {"input_size": [3, 4096, 4096]}}, "expected layers of at most 33,554,432 values"),
        ({"pretrained_cfg": {"mean": "x"}}, "expected mean as numbers"),
        ({"pretrained_cfg": {"std": [0.0]}}, "expected std as positive numbers"),
        ({"pretrained_cfg": {"crop_pct": 1e-6}}, "expected crop_pct from"),
        ({"pretrained_cfg": {"interpolation": "x"}}, "expected interpolation among"),
        ({"pretrained_cfg": {"license": 3}}, "expected license as a printable text"),
        ({"pretrained_cfg": {"k" * 500_000: 3}}, "expected timm's fields"),
        ({"architecture": "k" * 500_000}, "expected an architecture of this package"),
        ({"model_args": {"k" * 500_000: 3}}, "expected arguments among"),
        ({"format": 2}, "expected a model folder of format 0 to 1, got 2: install a newer timm-gac"),
        ({"format": [1]}, "expected a model folder of format 0 to 1"),
    ],
)
def test_malformed_configs(change: dict[str, Any], message: str) -> None:
    check_config(GOOD)
    with pytest.raises(ValueError, match=message) as raised:
        check_config(GOOD | change)
    assert len(str(raised.value)) < 500


def test_the_format_is_derived(model_folder: Path) -> None:
    config = read_config(model_folder)
    assert "format" not in config and folder_format(config) == 1
    del config["dtype"]
    check_config(config)  # folders of the older format are read
    assert folder_format(config) == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'"text"'])
def test_unreadable_configs(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match="as a JSON object"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert read_config(tmp_path) == GOOD
