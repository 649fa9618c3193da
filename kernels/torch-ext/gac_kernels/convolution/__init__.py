"""3x3 convolution and neuron in one pass, for inference."""
