"""Where published weights are: in a clone of the repository, else on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
