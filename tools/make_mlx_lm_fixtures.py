"""Make the fixtures of mlx-lm: small random adapters as it writes them, with the logits that it computes.

usage: python tools/make_mlx_lm_fixtures.py [NAME ...]        (needs `mlx_lm`; without names all are made)

Each fixture is a directory under tests/fixtures/mlx_lm: the adapter's files and expected.safetensors with tokens and
float32 logits, for a base under tests/fixtures/models. Weights are drawn so that a wrong term shows
and float32 is precise enough.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"


@dataclass(frozen=True)
class Case:
    """One fixture. base: a fixture model. kind: fine_tune_type. num_layers: of the last ones. parameters: of LoRA."""

    base: str
    kind: str
    num_layers: int
    parameters: dict[str, Any] = field(default_factory=dict)


_LORA = {"rank": 3, "scale": 7.0, "dropout": 0.0}
CASES = {
    "lora-rotary": Case("llama", "lora", 1, _LORA),
    "lora-table": Case("llama", "lora", 2, {**_LORA, "keys": ["self_attn.q_proj", "model.embed_tokens"]}),
    "dora-rotary": Case("llama", "dora", 2, {**_LORA, "keys": ["self_attn.v_proj", "mlp.down_proj"]}),
    "lora-fused": Case("phi3", "lora", 1, _LORA),
    "dora-fused": Case("glm4", "dora", 1, {**_LORA, "keys": ["mlp.gate_up_proj", "self_attn.q_proj"]}),
    "lora-normed": Case("qwen3", "lora", 2, _LORA),
}


def base_model(name: str) -> Any:
    """mlx-lm's model of a base, in float32."""
    folder = FIXTURES / "models" / name
    values = json.loads((folder / "config.json").read_text())
    # It knows the keys of older configs alone.
    rope = values.get("rope_parameters") or {}
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    model, _ = load_model(folder, model_config=older)
    model.set_dtype(mx.float32)
    return model.eval()


def logits_of(model: Any, tokens: mx.array) -> mx.array:
    """What a model answers to tokens (B, L)."""
    return model(tokens).astype(mx.float32)


def make(name: str, case: Case) -> None:
    """Write one fixture."""
    mx.random.seed(sum(map(ord, name)))
    model = base_model(case.base)
    model.freeze()
    linear_to_lora_layers(model, case.num_layers, case.parameters, use_dora=case.kind == "dora")
    trained = tree_map(lambda array: array + 0.1 * mx.random.normal(array.shape), model.trainable_parameters())
    folder = FIXTURES / "mlx_lm" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(tree_flatten(trained)))
    values = {"fine_tune_type": case.kind, "num_layers": case.num_layers, "lora_parameters": case.parameters}
    (folder / "adapter_config.json").write_text(json.dumps({"model": case.base, **values}, indent=2) + "\n")
    tokens = mx.random.randint(3, 40, (2, 9))
    # Loaded again, as others will: what the file holds is what counts.
    again = load_adapters(base_model(case.base), str(folder)).eval()
    expected = {"tokens": tokens, "logits": mx.contiguous(logits_of(again, tokens))}
    mx.save_safetensors(str(folder / "expected.safetensors"), expected)


def main() -> None:
    """Make the named fixtures, or all."""
    for name in sys.argv[1:] or CASES:
        make(name, CASES[name])
        print(name)


if __name__ == "__main__":
    main()
