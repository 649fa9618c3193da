"""Triton's interpreter, without what it works out again at every step: kernels compute the same in half the time.

`test_quick_interpreter` compares bits with the interpreter as it comes. Older ones than that of Triton 3.8 stay so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["OLDEST", "quicken"]

OLDEST = (3, 8)


def quicken() -> None:
    """Do so in this process."""
    try:
        import triton
        from triton.runtime import interpreter
    except ImportError:
        return
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST:
        return
    replace_functions_once(interpreter)
    keep_types(interpreter)
    leave_out_checks_that_nobody_reads(interpreter)


def replace_functions_once(interpreter: Any) -> None:
    """Replace the functions of the language by the interpreter's from the begin of a kernel to its end.

    Triton does so, by a look at every attribute of the language, again at each call of a device function: that takes
    longer than what the kernels compute.
    """
    replace, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    done = set[int]()  # by module that a function is of, whose names for the language count

    def replace_once(function: Callable[..., Any]) -> Any:
        module = id(function.__globals__)
        if module in done:
            return interpreter._LangPatchScope()
        done.add(module)
        return replace(function)

    def restored(scope: Any) -> None:
        done.clear()
        restore(scope)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = replace_once, restored


def keep_types(interpreter: Any) -> None:
    """Make the shape of a block, and NumPy's type for one of the language, once instead of at every operation."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    make_block_type, make_tensor = core.block_type.__init__, core.tensor.__init__
    numpy_type = interpreter._get_np_dtype
    broadcast, equal = TritonSemantic.broadcast_impl_value, core.dtype.__eq__
    shapes = dict[tuple[int, ...], tuple[Any, int, str]]()
    shape_of_tensor = dict[tuple[int, ...], tuple[Any, Any]]()
    numpy_types = dict[str, Any]()

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if type(shape) is core.tuple else shape if type(shape) is list else [None]
        key = tuple(size.value if type(size) is core.constexpr else size for size in values)
        known = shapes.get(key)
        if known is None or any(type(size) is not int for size in key):
            make_block_type(self, element_ty, shape)  # which refuses sizes that are no powers of two
            shapes[key] = self.shape, self.numel, str(self.shape)
        else:
            self.element_ty = element_ty
            self.shape, self.numel, text = known
            self.name = f"<{text}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(type.shape.values) if type.is_block() else ()
        known = shape_of_tensor.get(sizes)
        if known is None:
            make_tensor(self, handle, type)
            shape_of_tensor[sizes] = self.shape, self.numel
        else:
            self.shape, self.numel = known

    def get_numpy_type(of: Any) -> Any:
        known = numpy_types.get(of.name)
        if known is None:
            known = numpy_types[of.name] = numpy_type(of)
        return known

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> tuple[Any, Any]:
        a, b = lhs.type, rhs.type
        if a.is_block() and b.is_block() and a.shape is b.shape:  # kept, so most of equal shapes are one object
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    core.block_type.__init__ = block_type
    core.tensor.__init__ = tensor
    interpreter._get_np_dtype = get_numpy_type
    TritonSemantic.broadcast_impl_value = broadcast_values
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def leave_out_checks_that_nobody_reads(interpreter: Any) -> None:
    """Triton adds and multiplies integers again in 64 bits for an assertion, which is off unless debugging is on."""
    from triton.language.semantic import TritonSemantic

    check = TritonSemantic.binary_op_sanitize_overflow_impl

    def checked(self: Any, *given: Any) -> None:
        if self.builder.options.debug:
            check(self, *given)

    TritonSemantic.binary_op_sanitize_overflow_impl = checked
