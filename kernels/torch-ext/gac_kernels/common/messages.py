"""What error messages show of a value."""

from __future__ import annotations


def shown(value: object) -> str:
    """``value`` as text of at most some eighty characters; of a tensor or an array type and shape."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"{type(value).__name__} of shape {str(tuple(shape))[:50]}"
    text = str.__repr__(value[:60]) if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:50]}... ({type(value).__name__[:30]})"
