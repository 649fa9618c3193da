"""Energy as the field counts it: what every convolution and linear layer of a network really computes.

`EnergyMeter` watches the operands of the layers while a network runs; `EnergyReport` adds them up under three
conventions. Counts stay on the device until the report is made. Batch norm is taken as folded; additions of
residuals, neurons and memory traffic are left out, as in the literature.
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
