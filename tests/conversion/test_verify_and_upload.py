"""Comparing a result with its source, and putting it on the hub."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm.checkpoint import open_safetensors
from mlxlm.conversion import (
    GgufTarget,
    HubTarget,
    MlxTarget,
    Recipe,
    Request,
    convert,
    fulfil,
    quantization,
    upload,
    verify,
)
from mlxlm.conversion.verification import compare
from mlxlm.errors import CheckpointError, UsageError


@pytest.fixture(autouse=True)
def without_transformers(request, monkeypatch):
    """Sources are computed by this package, whether transformers is installed or not."""
    if "parity" not in request.keywords:
        monkeypatch.setattr("mlxlm.conversion.verification._with_transformers", lambda *arguments: None)


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "gpt2-sequence"])
def test_equal_models_have_no_differences(name, fixture_model, tmp_path):
    source = fixture_model(name)
    convert(source, tmp_path / "out", HubTarget())
    found = verify(source, tmp_path / "out")
    assert found.worst == 0
    assert found.reference == "mlxlm"
    assert found.differences[-1].stage == "logits"
    assert len(found.differences) > 2
    found.check("float32")


def test_a_changed_layer_is_where_differences_begin(fixture_model, tmp_path):
    source, other = fixture_model("llama"), tmp_path / "other"
    convert(source, other, HubTarget())
    arrays = open_safetensors(other).load()
    arrays["model.layers.1.mlp.up_proj.weight"] = arrays["model.layers.1.mlp.up_proj.weight"] * 1.5
    mx.eval(arrays)
    mx.save_safetensors(str(other / "model.safetensors"), arrays, {"format": "pt"})
    found = verify(source, other)
    assert [one.stage for one in found.differences if one.relative > 0] == ["decoder.layers.1", "logits"]
    with pytest.raises(CheckpointError, match=r"first in decoder\.layers\.1"):
        found.check("float16")


def test_nan_is_a_difference_without_bound():
    found = compare({"a": np.ones((1, 2))}, {"a": np.array([[1, np.nan]])}, "x")
    with pytest.raises(CheckpointError, match="first in a, by inf"):
        found.check("bfloat16")


def test_a_result_that_differs_never_gets_its_name(wide, tmp_path, monkeypatch):
    source = wide("llama")
    monkeypatch.setattr("mlxlm.conversion.verification._TOLERANCES", {"float16": 1e-9})
    request = Request(model=str(source), output=tmp_path / "out", target=HubTarget(dtype="float16"), verify=True)
    with pytest.raises(CheckpointError, match="the result differs from its source"):
        fulfil(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_a_quantized_result_is_compared_and_reported(wide, tmp_path):
    request = Request(
        model=str(wide("llama")),
        output=tmp_path / "out",
        target=MlxTarget(recipe=Recipe(default=quantization(8, 32))),
        verify=True,
    )
    report = fulfil(request)
    assert 0 < report.verification.worst < 0.1
    assert report.verification.agreement > 0.8
    assert "| logits |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_transformers_computes_the_source(name, fixture_model, tmp_path):
    pytest.importorskip("transformers", reason="needs the `parity` extra")
    source = fixture_model(name)
    convert(source, tmp_path / "out", HubTarget())
    found = verify(source, tmp_path / "out")
    assert found.reference == "transformers"
    assert len(found.differences) >= 2
    found.check("float32")


class Hub:
    """Notes what would be uploaded."""

    def __init__(self, error: Exception | None = None) -> None:
        self.log, self.error = [], error

    def create_repo(self, repository, **options):
        if self.error is not None:
            raise self.error
        self.log.append(("create", repository, options["private"]))

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.log.append(("folder", repo_id, Path(folder_path).name))

    def upload_file(self, *, repo_id, path_or_fileobj, path_in_repo):
        self.log.append(("file", repo_id, path_in_repo))


def test_nothing_is_uploaded_without_a_yes(fixture_model, tmp_path):
    convert(fixture_model("llama"), tmp_path / "out", HubTarget())
    hub, asked = Hub(), []
    assert upload(tmp_path / "out", "me/model", confirm=lambda q: asked.append(q) or False, api=hub) is None
    assert hub.log == []
    assert "to the public repository me/model?" in asked[0]
    address = upload(tmp_path / "out", "me/model", confirm=lambda q: True, private=True, api=hub)
    assert address == "https://huggingface.co/me/model"
    assert hub.log == [("create", "me/model", True), ("folder", "me/model", "out")]


def test_a_gguf_file_goes_with_its_card(fixture_model, tmp_path):
    convert(fixture_model("llama"), tmp_path / "x.gguf", GgufTarget())
    hub = Hub()
    upload(tmp_path / "x.gguf", "me/model", confirm=lambda q: True, api=hub)
    assert hub.log[1:] == [("file", "me/model", "x.gguf"), ("file", "me/model", "README.md")]


def test_what_the_hub_refuses_is_one_line(tmp_path):
    (tmp_path / "f").write_text("x")
    with pytest.raises(UsageError, match="did not take me/model: no token"):
        upload(tmp_path, "me/model", confirm=lambda q: True, api=Hub(OSError("no token\nmore")))
    with pytest.raises(UsageError, match="is no repository"):
        upload(tmp_path, "model", confirm=lambda q: True, api=Hub())
