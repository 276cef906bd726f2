"""Kernels for one token at a time: what a decoding step does between two attention layers, in few launches.

A step of one row is bound by the number of kernels it launches, not by arithmetic. So the norm goes into the product
that reads it, biases, activations, gates and residual sums into the product they follow, rotation and the split into
heads likewise: five launches a layer besides writing the cache. All sums are in float32; what the plain layers would
round between operations is rounded in the same places.

The text is Metal's; on CUDA a few definitions stand before it. Nothing here runs on the CPU.
"""

from __future__ import annotations

from mlxlm.kernels.one_token.attend import attend, serves
from mlxlm.kernels.one_token.product import ACTIVATIONS, Heads, Norm, Weight, product, projected_heads

__all__ = ["ACTIVATIONS", "Heads", "Norm", "Weight", "attend", "product", "projected_heads", "serves"]
