"""What every kernel uses: Triton itself, memory layouts, tiles and one step of the neuron."""
