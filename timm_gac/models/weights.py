"""Where published weights are: in a clone of the repository, else on the Hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

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


@contextmanager
def explain_missing(model: str) -> Iterator[None]:
    """Say where the weights of a model were looked for when they cannot be downloaded.

    Raises:
        OSError: The Hub or the repository on it is not reachable, and its files are not in the cache.
    """
    try:
        yield
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"expected weights of {model!r} in the Hub's repository {HUB_ORGANISATION}/{model}, its cache or a clone's "
            f"hub/models, got none ({type(error).__name__}): check the connection and HF_HUB_OFFLINE, or give a file "
            "of your own with pretrained_cfg_overlay=dict(file=...)"
        ) from error
