"""Benchmarks, and the searches for launch parameters in `tune`."""
