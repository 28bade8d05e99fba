"""Counts operations, bytes and kernels of a program, and bounds its time on a device.

XLA counts the body of a loop once, whether it knows the number of passes or not.  A
program is therefore counted with each body once, and each body is compiled by itself to
add its other passes.  Operations are those before optimization, as XLA turns some of
them into calls of libraries that it does not count.  Bytes and kernels are those of the
program compiled for this machine's CPU.  XLA does not count decompositions at all; the
leading terms of Golub and Van Loan, Matrix computations, are added.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax.extend.core import jaxpr_as_fun
from workload import PEAKS

# A special function unit gives 16 results a clock, the units for float32 128 multiply-
# adds (CUDA C++ programming guide, arithmetic instructions, compute capability 9.0).
OPERATIONS_OF_TRANSCENDENTAL = 16
# The machine code is never run; these leave the fusions as they are.
UNOPTIMIZED = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
LAUNCH = 5e-6  # seconds of a small kernel, with its launch; an assumption


class Device(NamedTuple):
    """Describes an accelerator by its data sheet.

    Attributes:
      bfloat16: dense operations per second of convolutions in bfloat16.
      float32: operations per second of products in full float32.
      bandwidth: bytes per second of the memory.
    """

    bfloat16: float
    float32: float
    bandwidth: float


DEVICES = {
    # NVIDIA H200 Tensor Core GPU data sheet, SXM: 4.8 TB/s; FP32 67 TFLOP/s.
    "H200": Device(PEAKS["H200"] * 1e12, 67e12, 4.8e12),
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s, 819 GB/s.  A product in float32 of
    # precision HIGHEST takes six in bfloat16.
    "TPU v5e": Device(PEAKS["TPU v5e"] * 1e12, PEAKS["TPU v5e"] / 6 * 1e12, 819e9),
}


class Counts(NamedTuple):
    """Contains the operations, bytes and kernels of a program.

    Attributes:
      operations: floating-point operations.
      bytes: bytes read and written by all kernels.
      kernels: number of kernels, one after the other.
    """

    operations: float
    bytes: float
    kernels: float

    def plus(self, other: "Counts", times: float = 1.0) -> "Counts":
        """Adds ``times`` of the other counts."""
        return Counts(*(a + times * b for a, b in zip(self, other, strict=True)))


def count(fn: Callable, *args: jax.ShapeDtypeStruct, passes: float = 1) -> Counts:
    """Counts a function of arrays, which are only described.

    Args:
      fn: function of ``args``.
      *args: shapes and dtypes, in any tree.
      passes: number of passes of every loop whose length the data determine.  A loop
        around such a loop, as that of Sinkhorn's absorptions, is counted once.

    Returns:
      The counts, with every loop's body as often as it runs.
    """
    leaves, tree = jax.tree.flatten(args)
    flat = lambda *leaves: jax.tree.leaves(fn(*jax.tree.unflatten(tree, leaves)))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return _total(jax.make_jaxpr(flat)(*leaves), passes)[0]


def _total(closed, passes: float) -> tuple[Counts, Counts]:
    """Counts a program with all passes of its loops, and with one of each."""
    total = once = _once(closed)
    for bodies, times in _loops(closed.jaxpr, passes):
        for body in bodies:
            whole, counted = _total(body, passes)
            total = total.plus(whole, times).plus(counted, -1)
    return total, once


def _once(closed) -> Counts:
    """Counts a program with every loop's body once."""
    arrays = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in closed.in_avals]
    lowered = jax.jit(jaxpr_as_fun(closed)).lower(*arrays)
    before, compiled = lowered.cost_analysis() or {}, lowered.compile(UNOPTIMIZED)
    after = compiled.cost_analysis() or {}
    operations = before.get("flops", 0.0) + sum(
        _operations_of(equation) for equation in equations(closed.jaxpr)
    )
    special = OPERATIONS_OF_TRANSCENDENTAL * before.get("transcendentals", 0.0)
    return Counts(
        operations + special, after["bytes accessed"], kernels(compiled.as_text())
    )


def _inner(equation) -> Iterator:
    """Yields the programs that an equation contains."""
    for parameter in jax.tree.leaves(
        tuple(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")
    ):
        inner = getattr(parameter, "jaxpr", parameter)
        if hasattr(inner, "eqns"):
            yield inner


def equations(jaxpr) -> Iterator:
    """Yields all equations, also those of calls and loops."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _inner(equation):
            yield from equations(inner)


def _loops(jaxpr, passes: float) -> Iterator[tuple[tuple, float]]:
    """Yields the bodies and passes of the outermost loops."""
    for equation in jaxpr.eqns:
        found = equation.params
        if equation.primitive.name == "scan":
            yield (found["jaxpr"],), found["length"]
        elif equation.primitive.name == "while":
            body = found["body_jaxpr"]
            inner = any(e.primitive.name == "while" for e in equations(body.jaxpr))
            yield (body, found["cond_jaxpr"]), 1 if inner else passes
        else:
            for inner in _inner(equation):
                yield from _loops(inner, passes)


def decompositions(fn: Callable, *args: jax.ShapeDtypeStruct) -> list[str]:
    """Lists the names of the matrix decompositions that a function computes."""
    found = equations(jax.make_jaxpr(fn)(*args).jaxpr)
    return sorted({e.primitive.name for e in found if _operations_of(e)})


def _operations_of(equation) -> float:
    """Returns the operations of a decomposition, or 0 for another equation."""
    name = equation.primitive.name
    if name not in ("qr", "svd", "eigh", "cholesky", "lu"):
        return 0.0
    *batch, rows, columns = equation.invars[0].aval.shape
    m, n = max(rows, columns), min(rows, columns)
    each = {
        "qr": 4 * m * n**2 - 4 / 3 * n**3,  # with the factor Q
        "svd": 6 * m * n**2 + 20 * n**3,  # with singular vectors
        "eigh": 9 * n**3,
        "cholesky": n**3 / 3,
        "lu": 2 / 3 * n**3,
    }[name]
    for size in batch:
        each *= size
    return each


HEAD = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
OPERATION = re.compile(r"^ +(?:ROOT )?%?[\w.-]+ = .*? ([a-z][a-z-]*)\(")
WITHIN = re.compile(r"(?:calls|to_apply)=%?([\w.-]+)")
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
CONTROL = {"while", "conditional", "call"}


def kernels(text: str) -> int:
    """Counts the kernels of a compiled program, with the body of a loop once."""
    found, within, name = {}, set(), None
    for line in text.splitlines():
        if head := HEAD.match(line):
            name = head[1]
            continue
        operation = OPERATION.match(line)
        if operation and operation[1] not in FREE | CONTROL:
            found[name] = found.get(name, 0) + 1
            within.update(WITHIN.findall(line))
    # The bodies of fusions, reductions and sorts are parts of one kernel.
    return sum(number for name, number in found.items() if name not in within)


def seconds(counts: Counts, peak: float, bandwidth: float) -> float:
    """Computes the least time of a program: max(operations / peak, bytes / bandwidth).

    Args:
      counts: counts of the program.
      peak: operations per second.
      bandwidth: bytes per second.

    Returns:
      Seconds.
    """
    return max(counts.operations / peak, counts.bytes / bandwidth)


def share(distance: Counts, step: Counts, device: Device) -> float:
    """Predicts the time of a distance over that of a step without it.

    The distance has the peak of float32, the step that of bfloat16 and no limit by
    bytes.  Both make the distance look expensive.
    """
    step = step._replace(bytes=0.0)
    return seconds(distance, device.float32, device.bandwidth) / seconds(
        step, device.bfloat16, device.bandwidth
    )


def share_with_launches(distance: Counts, step: Counts, device: Device) -> float:
    """Predicts the same with `LAUNCH` seconds for each kernel.

    They are added for the distance.  The step's large kernels hide the launches of the
    next ones, so its time is the longer of both.
    """
    taken = seconds(distance, device.float32, device.bandwidth)
    whole = max(step.operations / device.bfloat16, step.kernels * LAUNCH)
    return (taken + distance.kernels * LAUNCH) / whole
