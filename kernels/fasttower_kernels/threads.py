"""Threads that run the same compiled function, and wait for each other inside it.

They are Python's own, which compiled code releases from the interpreter's lock. Against numba's parallel
loops, the function is compiled once for any number of threads, in half the time, and a step of a fraction of
a millisecond is not held up by the start of a loop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils

from fasttower_kernels.compiled import OPTIONS, Array, int64, intrinsic, njit, uint64

# Looks at the counter before a waiting thread offers its core to others, some microseconds.
_PATIENCE = 2000

_BROKEN = -(1 << 62)

_GIVE_WAY = "SwitchToThread" if sys.platform == "win32" else "sched_yield"


@intrinsic
def _add_one(typingctx: Any, counter: Any) -> Any:
    """Add 1 to ``counter[0]`` (int64) and return what it was, all at once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", data, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(counter), codegen


@intrinsic
def _read(typingctx: Any, counter: Any) -> Any:
    """``counter[0]`` (int64) as it is now, and with it what other threads wrote before they added to it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(counter)(context, builder, args[0]).data
        return builder.load_atomic(data, "seq_cst", 8)

    return types.int64(counter), codegen


@intrinsic
def _give_way(typingctx: Any) -> Any:
    """Let another thread have this core."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function_type = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, _GIVE_WAY), [])
        return context.get_dummy_value()

    return types.void(), codegen


@njit(**OPTIONS)
def wait(counter: Array, threads: int) -> None:
    """Go on when every thread has come here as often as this one.

    Args:
        counter: (1,), int64, that `run_in_threads` hands over.
        threads: int64: how many there are.
    """
    arrived = _add_one(counter) + int64(1)
    goal = (arrived + threads - int64(1)) // threads * threads
    looks = 0
    while int64(0) <= _read(counter) < goal:
        looks += 1
        if looks > _PATIENCE:
            _give_way()


def run_in_threads(function: Callable[..., Any], arguments: tuple[Any, ...], threads: int) -> None:
    """Call ``function(*arguments, counter, thread)`` in every thread, thread (uint64) from 0.

    Thread 0 is the caller's own. Where one fails, the others no longer wait for it, and the failure is raised
    when all have ended: what they wrote is then of no use.
    """
    counter = np.zeros(1, dtype=np.int64)

    def run(thread: int) -> None:
        try:
            function(*arguments, counter, uint64(thread))
        except BaseException:
            counter[0] = _BROKEN
            raise

    if threads == 1:
        run(0)
        return
    with ThreadPoolExecutor(threads - 1) as pool:
        try:
            others = [pool.submit(run, thread) for thread in range(1, threads)]
            run(0)
        except BaseException:  # one that did not start, or a signal before its first line
            counter[0] = _BROKEN
            raise
    for other in others:
        other.result()
