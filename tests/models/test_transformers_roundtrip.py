"""What we save, transformers loads: nothing missing, nothing left over, the same outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlxlm.models import load_model, save

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

FIXTURES = sorted(path.name for path in (Path(__file__).parent.parent / "fixtures" / "models").iterdir())
TOLERANCE = 1e-4
# The outputs of transformers by the names of the fixtures.
NAMES = {
    "logits": ("logits", "prediction_logits"),
    "hidden": ("last_hidden_state",),
    "pooled": ("pooler_output",),
    "next_sentence": ("seq_relationship_logits",),
}


def reload(directory, expected):
    """The outputs of the model that transformers makes of a directory, for the inputs of a fixture."""
    values = json.loads((directory / "config.json").read_text())
    model_class = getattr(transformers, values["architectures"][0])
    # Eager attention of transformers 5.23 adds linear biases twice in one family.
    attention = "sdpa" if values["model_type"] == "falcon" and values["alibi"] else "eager"
    model, report = model_class.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    tokens = torch.tensor(expected["tokens"]).long()
    inputs = {
        "input_ids": tokens,
        "attention_mask": (torch.arange(tokens.shape[1]) < torch.tensor(expected["lengths"])[:, None]).long(),
    }
    for ours, theirs in (("token_types", "token_type_ids"), ("decoder_tokens", "decoder_input_ids")):
        if ours in expected:
            inputs[theirs] = torch.tensor(expected[ours]).long()
    with torch.no_grad():
        output = model.eval()(**inputs)
    if hasattr(output, "start_logits"):
        return {"logits": torch.stack([output.start_logits, output.end_logits], dim=-1).numpy()}
    found = {}
    for ours, theirs in NAMES.items():
        for name in theirs:
            if getattr(output, name, None) is not None and ours in expected:
                found[ours] = getattr(output, name).numpy()
    return found


@pytest.mark.parametrize("anew", [False, True], ids=["config-kept", "config-written-anew"])
@pytest.mark.parametrize("name", FIXTURES)
def test_transformers_loads_what_we_save(name, anew, fixture_model, expected_of, tmp_path):
    directory, expected = fixture_model(name), expected_of(name)
    model = load_model(directory)
    given = model.source.values
    model_type = given["model_type"]
    if model_type == "chatglm":
        pytest.skip("transformers has no class for this layout; its own remote code has")
    if anew:
        del model.source
        save(model, None, tmp_path / "saved", family=model_type)
        # A configuration knows nothing of special tokens; without these ids transformers takes those of its defaults.
        written = json.loads((tmp_path / "saved" / "config.json").read_text())
        ids = {key: given[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id") if key in given}
        (tmp_path / "saved" / "config.json").write_text(json.dumps({**written, **ids}))
    else:
        save(model, None, tmp_path / "saved")
    outputs = reload(tmp_path / "saved", expected)
    assert outputs
    for key, theirs in outputs.items():
        wanted = expected[key]
        for row, length in enumerate(expected["lengths"]):
            # Rows of the decoder of an encoder-decoder model aren't padded, and pooled vectors have no length.
            valid = slice(None) if wanted.ndim == 2 or "decoder_tokens" in expected else slice(int(length))
            assert np.abs(theirs[row, valid] - wanted[row, valid]).max() < TOLERANCE, key
