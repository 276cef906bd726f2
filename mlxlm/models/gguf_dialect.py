"""A family in GGUF files: the metadata that stand for its config.json, read and written.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; which of them an architecture has, and what absent ones
mean, as in llama.cpp's converter and loader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlxlm.errors import ConfigError
from mlxlm.models.config import TransformerConfig
from mlxlm.models.gguf_rotary import read_rotary, rotary_tensors, write_rotary
from mlxlm.models.weights import Rule

_REQUIRED = object()
# Written by converters to files of models that have nothing of it, or about training alone.
_WITHOUT_EFFECT = ("vocab_size", "pooling_type", "rope.scaling.finetuned")


@dataclass(frozen=True)
class GgufTensors:
    """The tensors of a GGUF file, as far as a config needs them.

    shapes: by name, row-major.  read: a small one as float32 numbers.
    """

    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], list[float]]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes


class GgufHeader:
    """The metadata under the architecture's name, each of which somebody must take, and the file's tensors."""

    def __init__(self, architecture: str, metadata: Mapping[str, Any], tensors: GgufTensors):
        self.prefix = f"{architecture}."
        self.tensors = tensors
        self.left = {
            name.removeprefix(self.prefix): value for name, value in metadata.items() if name.startswith(self.prefix)
        }
        width = self.peek("embedding_length") // self.peek("attention.head_count")
        self.head_dim = int(self.peek("attention.key_length", width))

    def peek(self, name: str, default: Any = _REQUIRED) -> Any:
        """The value of a key, without its architecture. Raises ConfigError when it is absent and has no default.

        A list that holds the same number for every layer counts as that number; other lists are refused.
        """
        if name not in self.left:
            if default is _REQUIRED:
                raise ConfigError(f"GGUF metadata lacks {self.prefix}{name}")
            return default
        value = self.left[name]
        if isinstance(value, (np.ndarray, list)):
            several = {item.item() if hasattr(item, "item") else item for item in value}
            if len(several) != 1:
                raise ConfigError(f"GGUF metadata: {self.prefix}{name} differs between layers, which is not supported")
            return several.pop()
        return value

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """`peek`, and the key counts as read."""
        value = self.peek(name, default)
        self.left.pop(name, None)
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Take a key that may be absent. Raises ConfigError when it is there with another value than those."""
        value = self.take(name, allowed[0])
        if value not in allowed:
            raise ConfigError(
                f"GGUF metadata: {self.prefix}{name} = {value!r}, expected {' or '.join(map(str, allowed))}"
            )

    def finish(self) -> None:
        """Raise ConfigError that lists every key nobody took."""
        left = [self.prefix + name for name in self.left if name not in _WITHOUT_EFFECT]
        if left:
            raise ConfigError(f"GGUF metadata has keys that mlxlm does not know: {', '.join(left)}")


def _nothing_read(header: GgufHeader, values: dict[str, Any]) -> None:
    pass


def _nothing_written(config: TransformerConfig) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, kw_only=True)
class GgufDialect:
    """A family in GGUF files.

    architecture: value of `general.architecture`.  model_type: of the config.json that the metadata stand for.
    keys: metadata without the architecture -> config.json, for what only has another name.  rules: weight names in the
    file.  rotary: whether there are rotary positions with the usual keys.  read: adds to the values of config.json
    what is more than a name, from a `GgufHeader`.  write: the metadata of that, the way back.  weights: names of the
    hub's weights, where the config depends on which there are.
    """

    architecture: str
    model_type: str
    keys: Mapping[str, str]
    rules: Callable[[TransformerConfig], tuple[Rule, ...]]
    rotary: bool = True
    read: Callable[[GgufHeader, dict[str, Any]], None] = _nothing_read
    write: Callable[[TransformerConfig], dict[str, Any]] = _nothing_written
    weights: frozenset[str] | None = field(default=None)

    def config(self, metadata: Mapping[str, Any], tensors: GgufTensors) -> dict[str, Any]:
        """The values of a config.json. Raises ConfigError for keys that nobody knows, and for values that can't be."""
        try:
            return self._config(metadata, tensors)
        except (TypeError, AttributeError, KeyError, ZeroDivisionError, OverflowError) as error:
            raise ConfigError(
                f"GGUF metadata of architecture {self.architecture!r}: something is missing, or of the wrong type or "
                f"size ({type(error).__name__}: {error})"
            ) from error

    def _config(self, metadata: Mapping[str, Any], tensors: GgufTensors) -> dict[str, Any]:
        header = GgufHeader(self.architecture, metadata, tensors)
        values: dict[str, Any] = {"model_type": self.model_type}
        if "token_embd.weight" in tensors:
            values["vocab_size"] = tensors.shapes["token_embd.weight"][0]
        for gguf, hub in self.keys.items():
            if gguf in header.left:
                values[hub] = header.take(gguf)
        if "attention.key_length" in self.keys:
            values[self.keys["attention.key_length"]] = header.head_dim
        header.expect("attention.value_length", header.head_dim)
        values["tie_word_embeddings"] = "output.weight" not in tensors
        self.read(header, values)
        if self.rotary:
            values |= read_rotary(header, values.get("max_position_embeddings"))
        header.finish()
        return values

    def metadata(self, config: TransformerConfig, values: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of a model, from its configuration and the values of its config.json."""
        given = {gguf: values[hub] for gguf, hub in self.keys.items() if values.get(hub) is not None}
        given["vocab_size"] = config.embeddings.vocab_size
        if "attention.key_length" in given:
            given["attention.value_length"] = given["attention.key_length"]
        if self.rotary:
            given |= write_rotary(config)
        given |= self.write(config)
        named = {f"{self.architecture}.{name}": value for name, value in given.items()}
        return {"general.architecture": self.architecture, **named}

    def extra_tensors(self, config: TransformerConfig) -> dict[str, mx.array]:
        """Tensors that belong to the configuration: what rotary frequencies are divided by."""
        return rotary_tensors(config) if self.rotary else {}
