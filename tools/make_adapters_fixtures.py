"""Make the fixtures of bottleneck adapters: small random ones as the adapters library writes them, with its logits.

usage: python tools/make_adapters_fixtures.py [NAME ...]       (needs `adapters`, which pins an older transformers)

Each fixture is a directory under tests/fixtures/adapters: the adapter's files and expected.safetensors with tokens and
float32 logits, for a base under tests/fixtures/models. Weights are drawn wide, so that a wrong term shows.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import torch
import transformers
from adapter_cases import (
    FIXTURES,
    Case,
    base_values,
    inputs_for,
    make_named,
    name_base,
    seed_of,
    write_expected,
)
from safetensors.torch import load_file

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
    folder, values = base_values(name)
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


def with_adapter(base: str, folder: Path) -> Any:
    """A base with the adapter of a folder active."""
    model = base_model(base)
    model.set_active_adapters(model.load_adapter(str(folder), set_active=True, use_safetensors=True))
    return model.eval()


def make(name: str, case: Case) -> None:
    """Write one fixture."""
    rng = np.random.default_rng(seed_of(name))
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
    name_base(folder, model_name=case.base)
    write_expected(folder, inputs_for(model, rng), with_adapter(case.base, folder))


if __name__ == "__main__":
    make_named(make, CASES)
