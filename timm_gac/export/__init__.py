"""Networks as files that other programs run: NIR, ONNX and PyTorch's .pt2."""
