"""Figures of matplotlib, of one look."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float, dpi: int = 150) -> Any:
    """An empty white figure.

    Args:
        width: Inches.
        height: Inches.
        dpi: Pixels an inch of the picture that it is saved to.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout="constrained")


def hide_frame(*axes: Any) -> None:
    """Draw of each panel's frame the left and the lower edge alone."""
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
