"""Modules that networks are built of: neurons, encoders and convolutions."""
