"""The caller's ids as small integers: dense codes in sorted id order, made without a sort of the rows.

The tables are built and read block by block: temporaries of the length of the data cost more in page faults
than all the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import polars as pl

# A table over the whole range of integer ids costs 5 bytes a value: cheaper than a search while the range is
# of the size of the data, hopeless for hashes.
_TABLE_VALUES_PER_ROW = 4
_TABLE_MINIMUM = 1 << 20
_BLOCK_ROWS = 1 << 18


def encode(ids: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Replace ids by their positions among the sorted distinct ids.

    Args:
        ids: (n,), integers, strings or categoricals of strings, no nulls.

    Returns:
        codes: (n,) UInt32, with `distinct[codes] == ids`.
        distinct: the distinct ids, sorted; integers keep their type, text is String.
    """
    if ids.is_empty():
        return ids.clear().cast(pl.UInt32), ids
    codes, distinct = _encode_integers(ids) if ids.dtype.is_integer() else _encode_text(ids)
    return codes.alias(ids.name), distinct.alias(ids.name)


def present(codes: pl.Series, size: int) -> np.ndarray:
    """Which of the codes 0 .. size - 1 occur: (size,) bool."""
    return counts(codes, size) > 0


def counts(codes: pl.Series, size: int) -> np.ndarray:
    """How often each of the codes 0 .. size - 1 occurs: (size,) int64."""
    total = np.zeros(size, dtype=np.int64)
    for block in _blocks(codes, max(_BLOCK_ROWS, size)):
        total += np.bincount(block, minlength=size)
    return total


def look_up(table: np.ndarray, codes: pl.Series, lowest: int = 0) -> pl.Series:
    """`table[codes - lowest]`: (n,) of the table's dtype."""
    found, start = np.empty(len(codes), dtype=table.dtype), 0
    for block in _blocks(codes):
        stop = start + len(block)
        offsets = block - block.dtype.type(lowest) if lowest else block
        # Clipping is never needed; asking for it spares a second, buffered pass.
        np.take(table, offsets, out=found[start:stop], mode="clip")
        start = stop
    return pl.Series(found)


def densify(flags: np.ndarray) -> np.ndarray:
    """Table from a code to its rank among the flagged codes: (size,) int32; meaningless where not flagged."""
    return np.cumsum(flags, dtype=np.int32) - np.int32(1)


def _blocks(values: pl.Series, rows: int = _BLOCK_ROWS) -> Iterator[np.ndarray]:
    for chunk in values.get_chunks():
        array = chunk.to_numpy()
        for start in range(0, len(array), rows):
            yield array[start : start + rows]


def _encode_integers(ids: pl.Series) -> tuple[pl.Series, pl.Series]:
    # In 64 bits no difference of two ids overflows that a table could be used for.
    wide = ids if ids.dtype == pl.UInt64 else ids.cast(pl.Int64)
    lowest, highest = int(wide.min()), int(wide.max())  # type: ignore[arg-type]
    span = highest - lowest + 1
    if span > max(_TABLE_MINIMUM, _TABLE_VALUES_PER_ROW * len(ids)):
        distinct = ids.unique().sort()
        return pl.Series(np.searchsorted(distinct.to_numpy(), ids.to_numpy()).astype(np.uint32)), distinct
    flags = np.zeros(span, dtype=bool)
    for block in _blocks(wide):
        flags[block - block.dtype.type(lowest)] = True
    offsets = pl.Series(np.flatnonzero(flags)).cast(wide.dtype)
    return look_up(densify(flags).view(np.uint32), wide, lowest), (offsets + lowest).cast(ids.dtype)


def _encode_text(ids: pl.Series) -> tuple[pl.Series, pl.Series]:
    ids = ids.cast(pl.Categorical)
    # The whole process shares its categories, so only those that occur here count.
    distinct = ids.unique()
    distinct = distinct.gather(distinct.cast(pl.String).arg_sort())
    numbers = distinct.to_physical().to_numpy()
    table = np.zeros(int(numbers.max()) + 1, dtype=np.uint32)
    table[numbers] = np.arange(len(distinct), dtype=np.uint32)
    return look_up(table, ids.to_physical()), distinct.cast(pl.String)
