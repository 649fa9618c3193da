"""The leaky integrate-and-fire neuron over all time steps."""
