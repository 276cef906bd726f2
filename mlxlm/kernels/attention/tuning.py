"""What was measured on this device: choices that "auto" follows, and kernels that failed their self-check.

The record is a small JSON file per device in the user's cache folder, written by `mlxlm doctor` and read once:

    {"mlx": "0.32.4", "device": "Apple M2 Max", "disabled": {"metal": "dq differs by 0.3 at D=80"},
     "choices": {"bfloat16 d128 e128 q4096 k4096 causal": "mlx"}}
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import mlx.core as mx

from mlxlm.kernels.attention.problem import AttentionProblem


@dataclass(frozen=True, kw_only=True)
class Record:
    """disabled: implementation -> why "auto" must not use it.  choices: `problem_key` -> the fastest implementation.

    mlx, device: version and device name it was measured with; a record of another MLX version counts as empty.
    """

    mlx: str = ""
    device: str = ""
    disabled: Mapping[str, str] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)


def problem_key(problem: AttentionProblem) -> str:
    """The class of problems that share a choice: dtype, widths, lengths rounded up to powers of two, and features."""
    lengths = f"q{_power_of_two(problem.query_length)} k{_power_of_two(problem.key_length)}"
    names = ("causal", "window", "prefix", "lengths", "segments", "alibi", "relative_bias", "bias", "softcap", "sinks")
    features = "+".join(name for name in (*names, "dropout") if getattr(problem, name)) or "plain"
    return f"{problem.dtype} d{problem.head_dim} e{problem.value_dim} {lengths} {features}"


@lru_cache(maxsize=2)
def record(backend: str) -> Record:
    """The record of this device for a backend name of `mlxlm.runtime.backend()`; empty when there is none. Read once.

    A file that can't be read is passed over with a warning: attention works without it.
    """
    path = record_path(backend)
    try:
        data = json.loads(path.read_text())
        found = Record(**data)
        if not all(isinstance(part, dict) for part in (found.disabled, found.choices)):
            raise TypeError("disabled and choices must be objects")
    except FileNotFoundError:
        return Record()
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"ignored the attention record {path}: {error}", RuntimeWarning, stacklevel=2)
        return Record()
    return found if found.mlx == mx.__version__ else Record()


def write_record(backend: str, *, disabled: Mapping[str, str], choices: Mapping[str, str]) -> Path:
    """Replace the record of this device and let "auto" follow it from now on. Returns where it was written."""
    path = record_path(backend)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = Record(mlx=mx.__version__, device=_device_name(backend), disabled=dict(disabled), choices=dict(choices))
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w") as file:
        json.dump(asdict(content), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    record.cache_clear()
    return path


def record_path(backend: str) -> Path:
    """Where the record of this device is kept: MLXLM_CACHE, or `mlxlm` in the user's cache folder."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", _device_name(backend)).strip("-").lower() or "device"
    return _cache_folder() / "attention" / f"{backend}-{name}.json"


def _cache_folder() -> Path:
    if chosen := os.environ.get("MLXLM_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlxlm"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxlm"


def _device_name(backend: str) -> str:
    return str(mx.device_info().get("device_name", backend))


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()
