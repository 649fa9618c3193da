"""Training in 8 bits: convolution, batch norm and neuron with spikes and gradients of one byte between them."""
