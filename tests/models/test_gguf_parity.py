"""What we would write to a GGUF file, judged by llama.cpp's own table of names and read by transformers."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxlm.models import load_model
from mlxlm.models.gguf_contents import gguf_contents

torch = pytest.importorskip("torch", reason="needs the `parity` extra")
transformers = pytest.importorskip("transformers", reason="needs the `parity` extra")
gguf = pytest.importorskip("gguf", reason="needs the `parity` extra")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]

FILES = sorted((Path(__file__).parent.parent / "fixtures" / "gguf").glob("*.gguf"))
# Architectures whose weights transformers reads from GGUF files.
READ_BY_TRANSFORMERS = ["llama-tied", "llama-linear", "qwen2-full", "qwen3", "gemma2-gguf", "gemma3-gguf", "bloom"]
READ_BY_TRANSFORMERS += ["gpt2", "phi3", "phi3-longrope"]
# Those of which it reads the metadata rightly too; of others it ignores the width of heads, windows, caps, scaling.
DESCRIBED = ["llama-tied", "qwen2-full", "bloom"]


def contents(path):
    model = load_model(path)
    return gguf_contents(model.source.family, model.config, dict(tree_flatten(model.parameters())))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_tensor_is_one_of_its_architecture(path):
    written = contents(path)
    architecture = next(
        kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == written.metadata["general.architecture"]
    )
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[architecture]} | {"rope_freqs"}
    for name in written.tensors:
        assert re.sub(r"blk\.\d+\.", "blk.{bid}.", name).rpartition(".")[0] in known


@pytest.mark.parametrize("name", READ_BY_TRANSFORMERS)
def test_transformers_reads_what_we_would_write(name, tmp_path, fixture_model, expected_of):
    written = contents(FILES[[path.stem for path in FILES].index(name)])
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", written.metadata["general.architecture"])
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in written.metadata.items():
        if key != "general.architecture":
            add[type(value)](key, value)
    for key, array in written.tensors.items():
        writer.add_tensor(key, np.array(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    given = {} if name in DESCRIBED else {"config": transformers.AutoConfig.from_pretrained(fixture_model(name))}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager", **given
    )
    expected = expected_of(name)
    with torch.no_grad():
        logits = model.eval()(torch.tensor(expected["tokens"][:1]).long()).logits.numpy()
    assert np.abs(logits - expected["logits"][:1]).max() < 2e-4
