"""Energy estimates from counted operations of convolutions and linear layers.

`EnergyMeter` counts operations from the layers' real inputs while a network runs; `EnergyReport` adds them up under
three conventions. Counts stay on the device until the report is made. As in the literature, batch norm counts as
folded, and residual additions, neurons and memory traffic are left out.
"""

from .meter import EnergyMeter, measure_energy
from .report import EnergyReport
from .tables import CONVENTIONS, COSTS, EnergyCosts, LayerCount, Operations, ann_macs

__all__ = [
    "CONVENTIONS",
    "COSTS",
    "EnergyCosts",
    "EnergyMeter",
    "EnergyReport",
    "LayerCount",
    "Operations",
    "ann_macs",
    "measure_energy",
]
