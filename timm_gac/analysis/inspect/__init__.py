"""Spikes one can see: what every layer of neurons and the gate do on a picture, as pictures and as one HTML page."""

from .page import write_inspection
from .record import Inspection, LayerActivity, inspect_network

__all__ = ["Inspection", "LayerActivity", "inspect_network", "write_inspection"]
