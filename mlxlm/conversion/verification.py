"""Whether a result computes what its source does, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from mlxlm.errors import CheckpointError
from mlxlm.models import Transformer, load_model

# Largest relative difference of hidden states and logits that rounding explains, by what is stored.
_TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far one stage of the result is from the source's.

    stage: such as "decoder.layers.3" or "logits".  largest: absolute.  relative: norm of the difference by the norm of
    the source's.
    """

    stage: str
    largest: float
    relative: float


@dataclass(frozen=True, kw_only=True)
class Verification:
    """A comparison of source and result.

    reference: what computed the source.  differences: in the order of the stages, logits last.  agreement: share of
    positions whose likeliest word is the same, None without words.  divergence: mean Kullback-Leibler divergence of
    the result's words from the source's, in nats.
    """

    reference: str
    differences: tuple[Difference, ...]
    agreement: float | None = None
    divergence: float | None = None

    @property
    def worst(self) -> float:
        """The largest relative difference."""
        return max(one.relative for one in self.differences)

    def check(self, dtype: str) -> None:
        """Raise CheckpointError when floats stored as `dtype` don't explain the differences."""
        limit = _TOLERANCES[dtype]
        bad = [one for one in self.differences if not one.relative <= limit]
        if bad:
            raise CheckpointError(
                f"the result differs from its source: first in {bad[0].stage}, by {bad[0].relative:.2e} of its norm "
                f"(up to {limit:.0e} is what rounding to {dtype} explains)"
            )

    def markdown(self) -> str:
        """A table for the model card."""
        lines = [
            f"Compared with {self.reference}, on the same tokens:",
            "",
            "| stage | largest | relative |",
            "|---|---|---|",
        ]
        lines += [f"| {one.stage} | {one.largest:.3e} | {one.relative:.3e} |" for one in self.differences]
        if self.agreement is not None:
            lines += ["", f"Likeliest word the same: {self.agreement:.2%}; divergence {self.divergence:.3e} nats."]
        return "\n".join(lines)


def verify(source: str | Path, result: str | Path, *, tokens: mx.array | None = None) -> Verification:
    """Compare the hidden states after every layer, and the logits, of two local models.

    Both are read as float32. Where transformers is installed and can read the source (a folder of float weights), it
    computes the source's; else this package does.  tokens: (1, L), default 32 spread over the vocabulary.
    """
    model = load_model(result, dtype="float32", quantized=False)
    if tokens is None:
        tokens = mx.array([[(7 + 997 * place) % model.config.embeddings.vocab_size for place in range(32)]])
    found, stack = stages(model, tokens), "encoder" if model.config.decoder is None else "decoder"
    del model
    expected, reference = _with_transformers(Path(source), tokens, stack), "transformers"
    if expected is None:
        expected, reference = stages(load_model(source, dtype="float32", quantized=False), tokens), "mlxlm"
    return compare(expected, found, reference)


def compare(expected: dict[str, np.ndarray], found: dict[str, np.ndarray], reference: str) -> Verification:
    """The differences of stages that both have. NaN anywhere counts as an infinite difference."""
    differences = []
    for stage, values in expected.items():
        if stage in found:
            change = found[stage].astype(np.float64) - values
            relative = float(np.linalg.norm(change) / max(np.linalg.norm(values), 1e-30))
            finite = np.isfinite(change).all()
            largest = float(np.abs(change).max()) if finite else float("inf")
            differences.append(Difference(stage=stage, largest=largest, relative=relative if finite else float("inf")))
    agreement = divergence = None
    if "logits" in expected and expected["logits"].ndim == 3:
        first, second = (_log_softmax(one["logits"].astype(np.float64)) for one in (expected, found))
        agreement = float((first.argmax(-1) == second.argmax(-1)).mean())
        divergence = float((np.exp(first) * (first - second)).sum(-1).mean())
    return Verification(reference=reference, differences=tuple(differences), agreement=agreement, divergence=divergence)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def stages(model: Transformer, tokens: mx.array) -> dict[str, np.ndarray]:
    """The output of every layer for tokens (1, L), and the logits (last hidden states without a head)."""
    given = {"decoder_tokens": tokens} if model.config.has_memory else {}
    outputs: dict[str, mx.array] = {}
    with _watched(model, outputs):
        last = model(tokens, **given) if model.config.head is not None else model.hidden(tokens, **given)
    outputs["logits" if model.config.head is not None else "hidden"] = last
    return {stage: np.array(array.astype(mx.float32)) for stage, array in outputs.items()}


class _Watched(nn.Module):
    """A layer whose output is kept."""

    def __init__(self, layer: nn.Module, name: str, outputs: dict[str, mx.array]) -> None:
        super().__init__()
        self._layer, self._name, self._outputs = layer, name, outputs

    def __call__(self, *arguments: Any) -> mx.array:
        output = self._layer(*arguments)
        self._outputs[self._name] = output
        return output


@contextmanager
def _watched(model: Transformer, outputs: dict[str, mx.array]) -> Iterator[None]:
    names = [name for name in ("encoder", "decoder") if getattr(model.config, name) is not None]
    kept = {name: getattr(model, name).layers for name in names}
    try:
        for name, layers in kept.items():
            watched = [_Watched(layer, f"{name}.layers.{i}", outputs) for i, layer in enumerate(layers)]
            getattr(model, name).layers = watched
        yield
    finally:
        for name, layers in kept.items():
            getattr(model, name).layers = layers


def _with_transformers(source: Path, tokens: mx.array, stack: str) -> dict[str, np.ndarray] | None:
    """What transformers computes, None where it isn't installed or can't read this source.

    stack: what this package calls the stack of a model that has one.
    """
    if not source.is_dir():
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    from mlxlm.checkpoint import read_json

    values = read_json(source / "config.json")
    names = values.get("architectures") or [""]
    kind = getattr(transformers, str(names[0]), None)
    if kind is None or values.get("quantization") or values.get("quantization_config"):
        return None
    try:
        model = kind.from_pretrained(source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError):
        return None
    ids = torch.tensor(np.array(tokens)).long()
    given = {"decoder_input_ids": ids} if getattr(model.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        output = model.eval()(ids, output_hidden_states=True, **given)
    states = {}
    for key, stack in (
        ("hidden_states", ""),
        ("encoder_hidden_states", "encoder"),
        ("decoder_hidden_states", "decoder"),
    ):
        # The first is the embeddings; the last has gone through the final norm in most models, so it is left out.
        for place, state in enumerate((getattr(output, key, None) or ())[1:-1]):
            states[f"{stack or '*'}.layers.{place}"] = state.numpy()
    own = "encoder" if not getattr(model.config, "is_decoder", True) else "decoder"
    result = {name.replace("*", own): state for name, state in states.items()}
    logits = getattr(output, "logits", None)
    if logits is not None:
        result["logits"] = logits.numpy()
    return result
