"""What the planner knows about devices: Apple's GPUs by generation and variant, and stand-ins for CPU and CUDA.

Pure Python; MLX is asked only for the name of the Metal device at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

_MIB = 1024**2


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What the planner knows about a device.

    kind: "metal", "cuda" or "cpu".  generation: 1 (M1) to 5 (M5), 0 when not an Apple GPU.  cores: GPU cores.
    teraflops, bandwidth: float32 TFLOP/s and GB/s.  working_set: bytes the device recommends to use, None if unknown.
    block_bytes: what the scores of one block of the tiled path may take, up to BUDGET_KEYS keys.
    block_rows: queries of a block of the tiled path below which heads are split rather than rows.
    most_blocks: of the tiled path in one pass. Building and compiling the graph takes milliseconds a block, which a CPU
        takes longer to compute.
    short_bytes: up to this size of all scores in float32, a dense computation is as good as tiles.
    """

    name: str
    kind: Literal["metal", "cuda", "cpu"]
    generation: int = 0
    cores: int = 1
    teraflops: float = 1.0
    bandwidth: float = 50.0
    working_set: int | None = None
    block_bytes: int = 32 * _MIB
    block_rows: int = 128
    most_blocks: int = 1024
    short_bytes: int = 64 * _MIB

    @property
    def native_bfloat16(self) -> bool:
        """Whether the GPU computes bfloat16 without emulation: M3 and later."""
        return self.kind != "metal" or self.generation >= 3


# Apple's architecture names: "applegpu_g13s" is generation 13 (M1), variant s (Max). The variant g is both the plain
# chip and the Pro; its figures are the plain chip's. (cores, TFLOP/s, GB/s): cores and bandwidth after Apple's
# technical specifications, float32 TFLOP/s as commonly reported; M5's and those of Ultra chips not out are guesses.
_VARIANTS = {"p": "", "g": "", "c": " Max", "s": " Max", "d": " Ultra"}
_CHIPS: dict[tuple[int, str], tuple[int, float, float]] = {
    (1, ""): (8, 2.6, 68), (1, " Max"): (32, 10.6, 400), (1, " Ultra"): (64, 21.2, 800),
    (2, ""): (10, 3.6, 100), (2, " Max"): (38, 13.6, 400), (2, " Ultra"): (76, 27.2, 800),
    (3, ""): (10, 3.6, 100), (3, " Max"): (40, 14.2, 400), (3, " Ultra"): (80, 28.4, 819),
    (4, ""): (10, 3.6, 120), (4, " Max"): (40, 18.4, 546), (4, " Ultra"): (80, 36.8, 1092),
    (5, ""): (10, 4.2, 153), (5, " Max"): (40, 18.4, 614), (5, " Ultra"): (80, 36.8, 1228),
}  # fmt: skip


def metal_profile(architecture: str, working_set: int | None = None) -> DeviceProfile:
    """The profile of an Apple GPU by its `architecture`, such as "applegpu_g14g".

    A generation newer than the table counts as its newest, an unreadable name as the oldest: both only affect speed.
    """
    digits = "".join(c for c in architecture.rpartition("_g")[2] if c.isdigit())
    generation = min(max(int(digits) - 12, 1), 5) if digits else 1
    variant = _VARIANTS.get(architecture[-1:], "")
    cores, teraflops, bandwidth = _CHIPS[generation, variant]
    block = 64 * _MIB if working_set is None else min(max(working_set // 64, 64 * _MIB), 256 * _MIB)
    return DeviceProfile(
        name=f"M{generation}{variant}", kind="metal", generation=generation, cores=cores, teraflops=teraflops,
        bandwidth=bandwidth, working_set=working_set, block_bytes=block, block_rows=512,
        most_blocks=512,
    )  # fmt: skip


# MLX's attention on the CPU is slower than tiles from about L=256 (4 heads), measured on x86 with OpenBLAS.
CPU = DeviceProfile(name="cpu", kind="cpu", block_bytes=32 * _MIB, short_bytes=_MIB)
# Measured on an H200, see README.md: dense attention is better in time and memory up to 512 MiB of scores.
CUDA = DeviceProfile(
    name="cuda",
    kind="cuda",
    cores=132,
    teraflops=60.0,
    bandwidth=3000.0,
    block_bytes=160 * _MIB,
    block_rows=512,
    most_blocks=512,
    short_bytes=512 * _MIB,
)


def device_profile(backend: str) -> DeviceProfile:
    """The profile of MLX's device for a backend name of `mlxlm.runtime.backend()`."""
    return {"cpu": CPU, "cuda": CUDA}.get(backend) or _this_metal_device()


@lru_cache(maxsize=1)
def _this_metal_device() -> DeviceProfile:
    import mlx.core as mx

    info = mx.device_info()
    return metal_profile(str(info.get("architecture", "")), info.get("max_recommended_working_set_size"))
