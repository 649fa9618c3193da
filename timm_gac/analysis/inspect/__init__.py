"""Inspection of a network on pictures: spikes, membranes, gate and scores, as figures and one HTML page."""

from .page import write_inspection
from .record import Inspection, LayerActivity, inspect_network

__all__ = ["Inspection", "LayerActivity", "inspect_network", "write_inspection"]
