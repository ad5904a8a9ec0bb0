"""exp and log of float32 in a form that vectorises: no branches, no calls, no tables."""

import numpy as np

from fasttower_kernels.compiled import OPTIONS, float32, int32, njit
from fasttower_kernels.vector_rows import bits_of_float, float_of_bits

_CONTRACTED = {"contract", "nsz"}


@njit(fastmath=_CONTRACTED, **OPTIONS)
def exp_negative(x: float) -> float:
    """e**x for float32 x <= 0, to 1 ulp or so; Cephes' expf.

    Below -87 it stays at e**-87, but for -inf it is 0: that is how a logit counts for nothing. NaN stays NaN.
    """
    nothing = x == float32(-np.inf)
    x = float32(-87.0) if x < float32(-87.0) else x
    # Adding 1.5 * 2**23 rounds to a whole number and leaves it in the low bits.
    shifted = x * float32(1.44269504) + float32(12582912.0)
    z = shifted - float32(12582912.0)
    x = x - z * float32(0.693359375) + z * float32(2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * x + float32(1.3981999507e-3)
    p = p * x + float32(8.3334519073e-3)
    p = p * x + float32(4.1665795894e-2)
    p = p * x + float32(1.6666665459e-1)
    p = p * x + float32(5.0000001201e-1)
    p = p * x * x + x + float32(1)
    power = p * float_of_bits((bits_of_float(shifted) + int32(127)) << int32(23))
    return float32(0) if nothing else power


@njit(fastmath=_CONTRACTED, **OPTIONS)
def log1p_positive(x: float) -> float:
    """log(1 + x) for float32 x in [0, 2**100], to 2 ulp or so; Cephes' logf. NaN stays NaN."""
    y = float32(1) + x
    lost = (x - (y - float32(1))) / y  # what rounding took from 1 + x
    bits = bits_of_float(y)
    exponent = (bits - int32(0x3F3504F3)) >> int32(23)
    m = float_of_bits(bits - (exponent << int32(23))) - float32(1)  # in [sqrt(1/2) - 1, sqrt(2) - 1]
    e = float32(exponent)
    p = float32(7.0376836292e-2)
    p = p * m + float32(-1.1514610310e-1)
    p = p * m + float32(1.1676998740e-1)
    p = p * m + float32(-1.2420140846e-1)
    p = p * m + float32(1.4249322787e-1)
    p = p * m + float32(-1.6668057665e-1)
    p = p * m + float32(2.0000714765e-1)
    p = p * m + float32(-2.4999993993e-1)
    p = p * m + float32(3.3333331174e-1)
    square = m * m
    p = p * m * square + e * float32(-2.12194440e-4) - float32(0.5) * square
    return lost + p + m + e * float32(0.693359375)
