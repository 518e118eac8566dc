"""Triton's interpreter, made right for bf16.

The interpreter of Triton 3.6.0 and 3.7.1 keeps a bf16 number as its bit pattern in a uint16 and
then, without an error, multiplies, adds, compares and reduces the patterns themselves; its casts to
bf16 truncate. `patch()` decodes to fp32, computes there and rounds to nearest even, as a GPU does.
"""

import os
from collections.abc import Callable
from typing import Any

import numpy as np

_PATCHED = "_bf16_patched"


def interpreted() -> bool:
    """Whether kernels defined from now on run under the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def patch() -> None:
    """Corrects the interpreter's bf16; a second call changes nothing. Needs triton."""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    if getattr(builder, _PATCHED, False):
        return
    setattr(builder, _PATCHED, True)
    _patch_casts(interpreter, builder)
    _patch_arithmetic(interpreter, builder)
    _patch_reductions(interpreter)
    _patch_loop_bounds(interpreter)


def decode(bits: np.ndarray) -> np.ndarray:
    """fp32 values of bf16 bit patterns."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def encode(values: np.ndarray, *, nearest: bool = True) -> np.ndarray:
    """bf16 bit patterns of fp32 values, rounded to nearest even or else towards zero."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    if not nearest:
        return (bits >> 16).astype(np.uint16)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # The carry of a NaN's payload could turn it into an infinity or a number.
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def _patch_casts(interpreter: Any, builder: Any) -> None:
    bf16 = interpreter.tl.bfloat16
    plain_cast, plain_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    handle, numpy_dtype = interpreter.TensorHandle, interpreter._get_np_dtype

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if source == target or bf16 not in (source, target):
            return plain_cast(self, src, dst_type)
        values = decode(src.data) if source == bf16 else src.data
        data = encode(values) if target == bf16 else values.astype(numpy_dtype(target))
        return handle(data, target)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if bf16 not in (src.dtype.scalar, dst_type.scalar):
            return plain_fp_to_fp(self, src, dst_type, rounding_mode)
        if rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ and dst_type.scalar == bf16:
            return handle(encode(src.data, nearest=False), bf16)
        return cast_impl(self, src, dst_type)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _patch_arithmetic(interpreter: Any, builder: Any) -> None:
    bf16, fp32 = interpreter.tl.bfloat16, interpreter.tl.float32
    handle = interpreter.TensorHandle

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != bf16:
            return operand
        return handle(decode(operand.data), fp32)

    def narrowed(result: Any) -> Any:
        # Comparisons give truth values, which are no bf16 although the interpreter says so.
        if result.data.dtype == np.bool_:
            return result
        return handle(encode(result.data), bf16)

    def in_fp32(plain: Callable[..., Any], operands: int) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            tensors, rest = args[:operands], args[operands:]
            if not any(tensor.dtype.scalar == bf16 for tensor in tensors):
                return plain(self, *args)
            return narrowed(plain(self, *map(widened, tensors), *rest))

        return method

    plain_dot, plain_ternary = builder.create_dot, builder.ternary_op

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), d, *options)

    def ternary_op(self: Any, a: Any, b: Any, c: Any, op: Any) -> Any:
        # A select only moves bit patterns; everything else computes with them.
        plain = plain_ternary if op is np.where else in_fp32(plain_ternary, 3)
        return plain(self, a, b, c, op)

    builder.create_dot, builder.ternary_op = create_dot, ternary_op
    builder.binary_op = in_fp32(builder.binary_op, 2)
    builder.unary_op = in_fp32(builder.unary_op, 1)
    builder.create_fma = in_fp32(builder.create_fma, 3)
    builder.create_rsqrt = in_fp32(builder.create_rsqrt, 1)


def _patch_reductions(interpreter: Any) -> None:
    """bf16 sums and scans raise: a kernel that has one loses accuracy on a GPU too."""
    operation = interpreter.ReduceScanOpInterface
    plain_check = operation.check_tensor

    def check_tensor(self: Any, input: Any) -> None:
        plain_check(self, input)
        for tensor in input:
            if tensor.dtype.scalar == interpreter.tl.bfloat16:
                raise TypeError("a reduction over bf16; cast to fp32 first")

    operation.check_tensor = check_tensor


def _patch_loop_bounds(interpreter: Any) -> None:
    """Loops with run-time bounds: 3.6.0 calls int() on a one-element array, numpy 2.4 refuses."""
    plain_tensor_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        plain_tensor_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_lang_tensor
