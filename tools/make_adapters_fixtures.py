"""Make the fixtures of bottleneck adapters: small random ones as the adapters library writes them, with its logits.

usage: python tools/make_adapters_fixtures.py [NAME ...]       (needs `adapters`, which pins an older transformers)

Each fixture is a directory under tests/fixtures/adapters: the adapter's files and expected.safetensors with tokens and
float32 logits, for a base under tests/fixtures/models. Weights are drawn wide, so that a wrong term shows.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
import transformers
from adapter_inputs import arguments_for, inputs_for
from safetensors.numpy import save_file
from safetensors.torch import load_file

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"


@dataclass(frozen=True)
class Case:
    """One fixture. base: a fixture model. config: a config class of the library. settings: its arguments."""

    base: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "houlsby-encoder": Case("bert", "DoubleSeqBnConfig", {"reduction_factor": 5}),
    "pfeiffer-encoder": Case("bert", "SeqBnConfig", {"reduction_factor": 5, "leave_out": [1]}),
    "parallel-encoder": Case("bert", "ParBnConfig", {"reduction_factor": 3}),
    "houlsby-rotary": Case("llama", "DoubleSeqBnConfig", {"reduction_factor": 5}),
    "pfeiffer-rotary": Case("llama", "SeqBnConfig", {"reduction_factor": 5, "non_linearity": "gelu"}),
    "pfeiffer-learned": Case("gpt2", "SeqBnConfig", {"reduction_factor": 4, "scaling": 2.5}),
    "houlsby-seq2seq": Case("t5", "DoubleSeqBnConfig", {"reduction_factor": 4}),
    "houlsby-cross": Case("t5", "DoubleSeqBnConfig", {"reduction_factor": 4, "cross_adapter": True}),
    "pfeiffer-cross": Case("t5", "SeqBnConfig", {"reduction_factor": 4, "cross_adapter": True, "leave_out": [0, 3]}),
}


def base_model(name: str) -> Any:
    """The transformers model of a base, in eager attention, ready for adapters."""
    folder = FIXTURES / "models" / name
    values = json.loads((folder / "config.json").read_text())
    # Written by a newer transformers, whose keys the older one knows by other names.
    rope = values.get("rope_parameters") or {}
    if rope:
        values |= {"rope_theta": rope.get("rope_theta", 10000.0)}
    kind = getattr(transformers, values["architectures"][0])
    model = kind._from_config(kind.config_class.from_dict(values), attn_implementation="eager")
    left = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not left.unexpected_keys, left
    model.tie_weights()
    adapters.init(model)
    return model.float().eval()


def logits_of(model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What a model answers to the inputs, in its own precision."""
    with torch.no_grad():
        return model(**arguments_for(inputs)).logits.contiguous().numpy()


def with_adapter(base: str, folder: Path) -> Any:
    """A base with the adapter of a folder active."""
    model = base_model(base)
    model.set_active_adapters(model.load_adapter(str(folder), set_active=True, use_safetensors=True))
    return model.eval()


def make(name: str, case: Case) -> None:
    """Write one fixture."""
    torch.manual_seed(sum(map(ord, name)))
    model = base_model(case.base)
    config = getattr(adapters, case.config)(**case.settings)
    model.add_adapter("fixture", config=config)
    model.set_active_adapters("fixture")
    for parameter_name, parameter in model.named_parameters():
        if ".fixture." in parameter_name:
            parameter.data = 0.4 * torch.randn_like(parameter)
    folder = FIXTURES / "adapters" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save_adapter(str(folder), "fixture", with_head=False, use_safetensors=True)
    config_file = folder / "adapter_config.json"
    values = json.loads(config_file.read_text()) | {"model_name": case.base}
    config_file.write_text(json.dumps(values, indent=2) + "\n")
    inputs = inputs_for(model, np.random.default_rng(sum(map(ord, name))))
    # Loaded again, as others will: what the file holds is what counts.
    save_file({**inputs, "logits": logits_of(with_adapter(case.base, folder), inputs)}, folder / "expected.safetensors")


def main() -> None:
    """Make the named fixtures, or all."""
    for name in sys.argv[1:] or CASES:
        make(name, CASES[name])
        print(name)


if __name__ == "__main__":
    main()
