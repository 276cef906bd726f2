"""mlxlm: the complete Transformer toolkit on Apple's MLX.

    import mlxlm
    model, tokenizer = mlxlm.load("path/or/hub-id")
    print(mlxlm.generate(model, tokenizer, "Hello", max_tokens=50))

Names below are imported on first use, so that `import mlxlm` stays fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlxlm import interruption  # noqa: F401  first: what follows takes its time
from mlxlm.runtime import load_blas
from mlxlm.version import __version__

if TYPE_CHECKING:
    from mlxlm.generation import embed, fill_mask, generate, stream_generate
    from mlxlm.models import save
    from mlxlm.peft import load_with_adapter as load

# On Linux the BLAS must be opened before mlx.core is first imported; importing mlxlm is the only sure moment.
load_blas()

_HOMES = {
    "load": "mlxlm.peft",
    "save": "mlxlm.models",
    "generate": "mlxlm.generation",
    "stream_generate": "mlxlm.generation",
    "embed": "mlxlm.generation",
    "fill_mask": "mlxlm.generation",
}

# What goes by another name where it stands.
_NAMES = {"load": "load_with_adapter"}

__all__ = ["__version__", "embed", "fill_mask", "generate", "load", "save", "stream_generate"]


def __getattr__(name: str) -> Any:
    if name in ("errors", "runtime"):
        return import_module(f"mlxlm.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mlxlm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), _NAMES.get(name, name))


def __dir__() -> list[str]:
    return sorted([*__all__, "errors", "runtime"])
