"""How the numba backend compiles: once for each specialisation, kept on disk.

An entry point is a closure over its compile-time constants, and numba's cache tells closures apart by the
values that they close over. A change in another file goes unseen by that cache, so `SOURCES` belongs to those
values.
"""

from __future__ import annotations

import hashlib
import stat
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
import numpy as np
from numba import extending, types
from numpy.typing import NDArray

from fasttower_kernels.tables import Tables

# numba's own annotations are about calls from Python; for code that it compiles they do not fit.
njit: Any = numba.njit
intrinsic: Any = extending.intrinsic
_overload: Any = extending.overload
uint32: Any = numba.uint32
uint64: Any = numba.uint64
int32: Any = numba.int32
int64: Any = numba.int64
float32: Any = numba.float32

Array = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])

_LOOPS = {"error_model": "numpy", "boundscheck": False}  # without them loops do not vectorise

OPTIONS: dict[str, Any] = _LOOPS | {
    "forceinline": True,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
"""Of every compiled function that compiled code alone may call. What would let Python call it, and without
which Python's call crashes, takes a third of the time that compiling takes. Where it is not inlined it has
two machine codes, its own and one made with its caller, which may round differently: the process that
compiles runs the first, and those that load the caller from the disk run the second."""

FAST = {"contract", "nsz", "arcp"}
"""What arithmetic may do. NaN and infinity stay what they are: a run that has diverged must show."""


def _fingerprint() -> int:
    folder = Path(__file__).parent
    digest = hashlib.blake2b(digest_size=7)
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest(), "little")


SOURCES = _fingerprint()
"""A number that changes with the text of all that compiled code is made of."""


def entry_point(function: Function) -> Function:
    """Compile a function that Python calls, with the disk cache where there is a place for one."""
    try:
        compiled: Any = njit(cache=True, nogil=True, **_LOOPS)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        compiled = njit(nogil=True, **_LOOPS)(function)
    else:
        if _anybody_may_write(compiled._cache.cache_path):
            compiled = njit(nogil=True, **_LOOPS)(function)
        else:
            _read_what_can_be_read(compiled)
    entry: Function = compiled
    return entry


@cache
def _anybody_may_write(folder: str) -> bool:
    """Whether others may put files into the cache: they are pickle, and reading them would run their code."""
    found = Path(folder).stat() if Path(folder).exists() else None
    if found is None or not found.st_mode & stat.S_IWOTH:
        return False
    warnings.warn(
        f"anybody may write to numba's cache, {folder}: it is not used, and every process compiles anew; take"
        " that right away (chmod o-w), or name another folder with NUMBA_CACHE_DIR",
        stacklevel=3,
    )
    return True


def _read_what_can_be_read(compiled: Any) -> None:  # noqa: ANN401 - numba's dispatchers have no type
    """Take a cache file that cannot be read for one that is not there: compile anew, and write it anew.

    It may be cut off, by a full disk or a kill, or name a class that another version of this package had.
    """
    file = compiled._cache._cache_file  # numba has no other way in

    def forgiving(read: Callable[..., Any], otherwise: Callable[[], Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:  # noqa: ANN401 - whatever is read
            try:
                return read(*arguments)
            except Exception:  # whatever unpickling meets
                return otherwise()

        return run

    file.load = forgiving(file.load, lambda: None)
    file._load_index = forgiving(file._load_index, dict)  # read before it is written


def chosen(stub: Callable[..., Any], compiled: Callable[[str], Callable[..., Any]]) -> None:
    """Make a stub of a name the compiled function of that name, for compiled code that calls it.

    ``stub(name)(...)`` with a literal name compiles only what it names. Closing over the function itself
    would miss the cache on disk in every process.

    Args:
        stub: takes the name.
        compiled: gives the function that a name stands for.
    """

    # numba wants the same annotations of both.
    def choose(name: Any) -> Callable[[Any], Any] | None:  # noqa: ANN401
        if not isinstance(name, types.StringLiteral):
            return None  # numba then tries the literal
        function = compiled(name.literal_value)

        def run(name: Any) -> Any:  # noqa: ANN401
            return function

        return run

    _overload(stub, prefer_literal=True, jit_options=OPTIONS)(choose)


def empty(dtype: type) -> Array:
    """What stands in for an array that a specialisation does not read."""
    return np.empty(0, dtype=dtype)


def flat_arrays(tables: Tables) -> tuple[Array, Array, Array]:
    """Users (U * P,), items (I * P,) and item bias (I,), empty without one: views of contiguous tables."""
    bias = empty(np.float32) if tables.item_bias is None else tables.item_bias.detach().numpy()
    return tables.users.detach().numpy().reshape(-1), tables.items.detach().numpy().reshape(-1), bias
