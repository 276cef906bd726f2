"""Floats of 8 bits as tables of the 256 values that their bytes stand for.

E4M3 and E5M2 are those of Micikevicius et al. 2022 (arXiv:2209.05433), E8M0 the scales of the OCP microscaling
formats, and the FNUZ forms have neither infinities nor a negative zero (Noune et al. 2022, arXiv:2206.02915).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np


@lru_cache
def _table(name: str) -> np.ndarray:
    byte = np.arange(256)
    if name == "float8_e8m0":
        values = np.ldexp(1.0, byte - 127)
        values[255] = np.nan
        return values.astype(np.float32)
    exponent_bits, mantissa_bits = (4, 3) if "e4m3" in name else (5, 2)
    finite = name.endswith("fnuz")
    bias = 2 ** (exponent_bits - 1) - (0 if finite else 1)
    exponent, mantissa = byte >> mantissa_bits & (1 << exponent_bits) - 1, byte & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits)
    values = np.where(exponent, np.ldexp(1 + fraction, exponent - bias), np.ldexp(fraction, 1 - bias))
    values[byte >= 128] *= -1
    if finite:
        values[0x80] = np.nan
    elif exponent_bits == 4:
        values[[0x7F, 0xFF]] = np.nan
    else:
        top = exponent == 31
        values[top] = np.where(mantissa[top], np.nan, np.copysign(np.inf, values[top]))
    return values.astype(np.float32)


NAMES = ("float8_e4m3", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0")


def decode(name: str, data: np.ndarray) -> np.ndarray:
    """The float32 values, exact, of bytes (uint8, any shape).  name: one of `NAMES`."""
    return _table(name)[data]
