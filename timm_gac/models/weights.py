"""Sources of published weights: a folder of this machine, else the Hub."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

_logger = logging.getLogger(__name__)

HUB_ORGANISATION = "timm-gac"
WEIGHTS = "model.safetensors"
# Whether the Hub has the weights. Without them the client would try for 20 seconds and blame the connection.
UPLOADED = False
# Names a folder of model folders MODEL.TAG, such as hub/models of a clone, for a package installed from a wheel.
FOLDER_VARIABLE = "TIMM_GAC_MODELS"
_CLONE = Path(__file__).resolve().parents[2] / "hub" / "models"
# Fields of a pretrained_cfg that name other weights.
_OWN = ("file", "url", "state_dict", "hf_hub_id")


def weights_cfg(model: str, tag: str) -> dict[str, Any]:
    """Fields of a pretrained_cfg by which timm finds published weights.

    They are a file where TIMM_GAC_MODELS or a clone of the repository has them, so that loading works offline; else the
    Hub's ``ORGANISATION/MODEL.TAG``, of which only safetensors are read.
    """
    name = f"{model}.{tag}"
    source: dict[str, Any] = {"hf_hub_id": f"{HUB_ORGANISATION}/{name}", "hf_hub_filename": WEIGHTS}
    folder = os.environ.get(FOLDER_VARIABLE)
    files = [parent / name / WEIGHTS for parent in ([Path(folder)] if folder else []) + [_CLONE]]
    return source | next(({"file": str(file)} for file in files if file.is_file()), {})


def check_available(cfg: Mapping[str, Any], overlay: Mapping[str, Any]) -> None:
    """Refuse at once to fetch published weights that are not uploaded.

    Args:
        cfg: Fields of the pretrained_cfg.
        overlay: What the user puts over them.

    Raises:
        OSError: The weights are neither on this machine nor on the Hub.
    """
    repository = cfg.get("hf_hub_id") or ""
    if UPLOADED or not repository.startswith(f"{HUB_ORGANISATION}/") or cfg.get("file"):
        return
    if any(overlay.get(key) for key in _OWN) or isinstance(try_to_load_from_cache(repository, WEIGHTS), str):
        return
    raise OSError(
        f"expected weights of {repository.partition('/')[2]} on this machine, got none, and they are not uploaded yet: "
        f"clone the repository and set {FOLDER_VARIABLE} to its hub/models, or give a file of your own with "
        "pretrained_cfg_overlay=dict(file=...)"
    )


# What weights were trained on whose licence is no common one, by the tag.
TRAINED_ON = {
    "in293": "photographs of 293 ImageNet classes (Tiny-ImageNet-200, mini-ImageNet, Imagenette, Imagewoof)",
    "tiny_imagenet": "Tiny-ImageNet-200",
}


def describe_weights(model: Any) -> None:
    """Say in the log what weights were trained on where that restricts their use, and name the classes.

    Args:
        model: A network with loaded weights. Where it has their classes, ``label_names`` of its ``pretrained_cfg``
            become those of the config.json beside them.
    """
    cfg = dict(model.pretrained_cfg)
    if cfg.get("license") == "other" and cfg.get("tag") in TRAINED_ON:
        _logger.warning(
            "%s.%s: trained on %s, whose terms are ImageNet's: research and teaching, not commercial",
            cfg.get("architecture"),
            cfg["tag"],
            TRAINED_ON[cfg["tag"]],
        )
    names = None if cfg.get("label_names") else _label_names(cfg)
    if names and len(names) == getattr(model, "num_classes", None):  # none of a network that gives features only
        model.pretrained_cfg = model.default_cfg = cfg | {"label_names": names}


def _label_names(cfg: dict[str, Any]) -> list[str] | None:
    """Names of the classes in the config.json beside weights, which are a file or were just fetched from the Hub."""
    try:
        if cfg.get("file") and Path(cfg["file"]).is_dir():  # timm has read its config
            return None
        if cfg.get("file"):
            config = Path(cfg["file"]).with_name("config.json")
        elif cfg.get("hf_hub_id") and not (cfg.get("url") or cfg.get("source")):
            config = Path(hf_hub_download(cfg["hf_hub_id"], "config.json"))
        else:
            return None
        names = json.loads(config.read_text(encoding="utf-8")).get("label_names")
    except (OSError, ValueError, AttributeError):  # weights load without names too
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None


@contextmanager
def explain_missing(repository: str) -> Iterator[None]:
    """Say where weights were looked for when their repository cannot be reached.

    Args:
        repository: ORG/NAME on the Hub.

    Raises:
        OSError: The Hub or the repository on it is not reachable, and its files are not in the cache.
    """
    try:
        yield
    except (LocalEntryNotFoundError, RepositoryNotFoundError) as error:
        raise OSError(
            f"expected weights in the Hub's repository {repository}, its cache, {FOLDER_VARIABLE} or a clone's "
            f"hub/models, got none ({type(error).__name__}): check the connection and HF_HUB_OFFLINE, or give a file "
            "of your own with pretrained_cfg_overlay=dict(file=...)"
        ) from error
