"""Philox4x32-10 in plain arithmetic.

Source: Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011), section 3.3.
Equal to Random123's philox4x32-10, whose known answers are in the tests.
"""

from typing import Any

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10


def philox4x32(key: tuple[int, int], counter: tuple[Any, Any, Any, Any]) -> tuple[Any, Any, Any, Any]:
    """Four random 32-bit words for a key and a counter.

    Args:
        key: two words, each in [0, 2**32).
        counter: four words in [0, 2**32): Python ints, or int64 tensors (torch or numpy) that broadcast.

    Returns:
        Four words in [0, 2**32), of the counter's kind and broadcast shape.
    """
    k0, k1 = key
    c0, c1, c2, c3 = counter
    for _ in range(ROUNDS):
        # A product of two 32-bit words may pass 2**63 and wrap in int64. Its 64 bits are right all the same,
        # and the mask takes off what an arithmetic shift of a negative number brings in.
        product_0 = c0 * _MULTIPLIER_0
        product_1 = c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((product_1 >> 32) & _WORD) ^ c1 ^ k0,
            product_1 & _WORD,
            ((product_0 >> 32) & _WORD) ^ c3 ^ k1,
            product_0 & _WORD,
        )
        k0 = (k0 + _WEYL_0) & _WORD
        k1 = (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3
