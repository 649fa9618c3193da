"""Batch norm: its statistics, and the norm, the residual and the neuron in one pass."""
