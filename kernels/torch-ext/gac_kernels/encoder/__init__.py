"""Gated attention coding, and the padding and pooling of its attention."""
