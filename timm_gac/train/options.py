"""How and where a recipe is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["RunOptions"]


@dataclass(frozen=True)
class RunOptions:
    """How and where a recipe is run; nothing here changes what is computed.

    Args:
        out: Folder of the run.
        resume: Go on from the last checkpoint in it.
        stop_after_minutes: Save a checkpoint and stop after so many minutes; 0 for never.
        checkpoint_minutes: Minutes between checkpoints; one is also written at the end of the run and when it is told
            to stop (Ctrl-C, SIGTERM).
        checkpoint_steps: Steps between checkpoints; 0 leaves it to the minutes.
        keep_checkpoints: How many stay.
        trackers: Trackers of accelerate, such as tensorboard.
        results: Table (CSV) to which the finished run adds a row.
        recipe_name: Name under which it appears there.
        log_steps: Steps between two readings of loss and speed.
        cpu: Run on the CPU although there is a GPU.
    """

    out: Path = Path("runs/latest")
    resume: bool = False
    stop_after_minutes: float = 0.0
    checkpoint_minutes: float = 5.0
    checkpoint_steps: int = 0
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()
    results: Path | None = None
    recipe_name: str = "custom"
    log_steps: int = 50
    cpu: bool = False

    def __post_init__(self) -> None:
        for name, least in (("keep_checkpoints", 1), ("log_steps", 1), ("checkpoint_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected {name} of at least {least}, got {getattr(self, name)}: give a larger one")
        for name in ("stop_after_minutes", "checkpoint_minutes"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}: give minutes, or 0")
