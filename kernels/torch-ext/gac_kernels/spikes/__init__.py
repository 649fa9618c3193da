"""Spikes as bits, spike counts and firing rates."""
