"""Where a model came from: what is needed to write it back as it was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxlm.models.config import TransformerConfig
from mlxlm.models.family import Family


@dataclass(frozen=True, kw_only=True)
class Source:
    """The family and place that a model was read from, what its config.json said and what that meant.

    path: the directory or .gguf file.  values: of config.json.  config: the configuration they were parsed to.
    pooling: how a GGUF file says that a text becomes one vector: "mean", "cls", "last", another name for what is not
    implemented, or None.
    """

    family: Family
    path: Path
    values: dict[str, Any]
    config: TransformerConfig
    pooling: str | None = None
