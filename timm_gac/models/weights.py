"""Sources of published weights: a clone of the repository, else the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

HUB_ORGANISATION = "timm-gac"
WEIGHTS = "model.safetensors"
_CLONE = Path(__file__).resolve().parents[2] / "hub" / "models"


def weights_cfg(model: str, tag: str) -> dict[str, Any]:
    """Fields of a pretrained_cfg by which timm finds published weights.

    From a clone of the repository they are a file, so that loading works offline; from an installed wheel they are the
    Hub's ``ORGANISATION/MODEL.TAG``, of which only safetensors are read.
    """
    name = f"{model}.{tag}"
    source: dict[str, Any] = {"hf_hub_id": f"{HUB_ORGANISATION}/{name}", "hf_hub_filename": WEIGHTS}
    file = _CLONE / name / WEIGHTS
    return source | ({"file": str(file)} if file.is_file() else {})


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
