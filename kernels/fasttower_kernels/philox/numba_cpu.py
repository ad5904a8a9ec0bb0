"""Philox4x32-10 for one counter; a loop over counters that calls it vectorises."""

from fasttower_kernels.compiled import OPTIONS, njit, uint32, uint64

_MULTIPLIER_0, _MULTIPLIER_1 = uint64(0xD2511F53), uint64(0xCD9E8D57)
_WEYL_0, _WEYL_1 = uint32(0x9E3779B9), uint32(0xBB67AE85)
_HALF = uint64(32)


@njit(**OPTIONS)
def philox4x32(k0: int, k1: int, c0: int, c1: int, c2: int, c3: int) -> tuple[int, int, int, int]:
    """Four random words for a key and a counter, all uint32. See the operator's `philox4x32`."""
    for _ in range(10):
        product_0 = _MULTIPLIER_0 * uint64(c0)
        product_1 = _MULTIPLIER_1 * uint64(c2)
        c0, c1, c2, c3 = (
            uint32(product_1 >> _HALF) ^ c1 ^ k0,
            uint32(product_1),
            uint32(product_0 >> _HALF) ^ c3 ^ k1,
            uint32(product_0),
        )
        k0 = uint32(k0 + _WEYL_0)
        k1 = uint32(k1 + _WEYL_1)
    return c0, c1, c2, c3


@njit(**OPTIONS)
def below(word: int, size: int) -> int:
    """The word scaled to [0, size): ``word * size >> 32``, with size a uint64 below 2**32."""
    return uint32((uint64(word) * size) >> _HALF)
