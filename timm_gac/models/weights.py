"""Where published weights are: in a clone of the repository, else on the Hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

_logger = logging.getLogger(__name__)

HUB_ORGANISATION = "timm-gac"
WEIGHTS = "model.safetensors"
_CLONE = Path(__file__).resolve().parents[2] / "hub" / "models"


def weights_cfg(model: str, tag: str) -> dict[str, Any]:
    """Fields of a pretrained_cfg that lead timm to published weights.

    From a clone of the repository they are a file, so that loading works offline; from an installed wheel they are the
    Hub's ``ORGANISATION/MODEL.TAG``, of which only safetensors are read.
    """
    name = f"{model}.{tag}"
    source: dict[str, Any] = {"hf_hub_id": f"{HUB_ORGANISATION}/{name}", "hf_hub_filename": WEIGHTS}
    file = _CLONE / name / WEIGHTS
    return source | ({"file": str(file)} if file.is_file() else {})


# What weights were trained on whose licence is no common one, by the tag.
TRAINED_ON = {
    "in293": "photographs of 293 ImageNet classes (Tiny-ImageNet-200, mini-ImageNet, Imagenette, Imagewoof)",
    "tiny_imagenet": "Tiny-ImageNet-200",
}


def describe_weights(model: Any) -> None:
    """Say in the log what weights were trained on where that restricts their use, and name the classes.

    Args:
        model: A network with loaded weights. Where it has their classes, ``label_names`` of its ``pretrained_cfg``
            become those of the config.json beside them, if that is a file here.
    """
    cfg = dict(model.pretrained_cfg)
    if cfg.get("license") == "other" and cfg.get("tag") in TRAINED_ON:
        _logger.warning(
            "%s.%s: trained on %s, whose terms are ImageNet's: research and teaching, not commercial",
            cfg.get("architecture"), cfg["tag"], TRAINED_ON[cfg["tag"]],
        )  # fmt: skip
    config = Path(cfg["file"]).with_name("config.json") if cfg.get("file") else None
    if config is not None and config.is_file() and not cfg.get("label_names"):
        names = json.loads(config.read_text(encoding="utf-8")).get("label_names")
        if names and len(names) == model.num_classes:
            model.pretrained_cfg = model.default_cfg = cfg | {"label_names": names}


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
            f"expected weights in the Hub's repository {repository}, its cache or a clone's hub/models, got none "
            f"({type(error).__name__}): check the connection and HF_HUB_OFFLINE, or give a file of your own with "
            "pretrained_cfg_overlay=dict(file=...)"
        ) from error
