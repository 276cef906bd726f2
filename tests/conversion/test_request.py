"""A whole conversion as it is asked for: calibrated, measured and described on its card."""

from __future__ import annotations

import shutil

import pytest

import mlxlm
from mlxlm.conversion import GgufTarget, HubTarget, MlxTarget, Recipe, Request, fulfil, quantization
from mlxlm.errors import DataError, TokenizerError, UsageError

FOUR_BITS = MlxTarget(recipe=Recipe(default=quantization(4, 32)))


@pytest.fixture
def source(wide, tiny_directory):
    """A decoder whose weights can be quantized, with a tokenizer."""
    folder = wide("qwen3")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_directory / name, folder)
    return folder


@pytest.fixture
def text(tmp_path):
    """A file of 1200 characters, each a token."""
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog, again. " * 24)
    return tmp_path / "text.txt"


@pytest.mark.parametrize("method", ["round", "gptq", "awq", "awq+gptq"])
def test_a_size_and_a_method_are_kept_and_reported(method, source, text, tmp_path):
    said = []
    request = Request(
        model=str(source),
        output=tmp_path / "out",
        target=FOUR_BITS,
        target_bits=7.5,
        method=method,
        text=text,
        rows=3,
        length=40,
        measure=True,
    )
    report = fulfil(request, say=said.append)
    assert report.conversion.bits_per_weight <= 7.5
    assert report.before > 1
    assert report.after == pytest.approx(report.before, rel=0.3)
    assert any(line.startswith("sensitivity: text 3 of 3") for line in said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Calibrated on 3 x 40 tokens of `text.txt`: bits by sensitivity for 7.5 bits a weight" in card
    assert ("AWQ" in card) == ("awq" in method)
    assert ("GPTQ" in card) == ("gptq" in method)
    assert f"{report.before:.3f} before, {report.after:.3f} after" in card
    model, tokenizer = mlxlm.load(tmp_path / "out")
    assert mlxlm.generate(model, tokenizer, "The", max_tokens=3, temperature=0.0) is not None


def test_what_needs_no_calibration_is_measured_too(source, text, tmp_path):
    request = Request(
        model=str(source), output=tmp_path / "x.gguf", target=GgufTarget(kind="F32"), text=text, length=40, measure=True
    )
    # The tokenizer has words, which GGUF files have no name for; a model without one is converted, but not measured.
    with pytest.raises(TokenizerError, match="can't be written to GGUF files"):
        fulfil(request)
    report = fulfil(
        Request(model=str(source), output=tmp_path / "y", target=HubTarget(), text=text, length=40, measure=True)
    )
    assert report.after == report.before
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        fulfil(request)


def test_what_contradicts_itself_is_refused(tmp_path):
    ask = {"model": "m", "output": tmp_path / "out"}
    with pytest.raises(UsageError, match="for results that are quantized"):
        Request(**ask, target=HubTarget(), target_bits=4.0)
    with pytest.raises(UsageError, match="for results that are quantized"):
        Request(**ask, target=MlxTarget(recipe=None), method="gptq")
    with pytest.raises(UsageError, match="at least 1 row of 8 tokens"):
        Request(**ask, target=FOUR_BITS, rows=0)


def test_a_size_that_cannot_be_reached_says_so(source, text, tmp_path):
    ask = {"model": str(source), "output": tmp_path / "out", "text": text, "rows": 2, "length": 40}
    with pytest.raises(UsageError, match="ask for a larger one"):
        fulfil(Request(**ask, target=FOUR_BITS, target_bits=1.0))
    with pytest.raises(UsageError, match="mxfp4 has one number of them"):
        fulfil(Request(**ask, target=MlxTarget(recipe=Recipe(default=quantization(mode="mxfp4"))), target_bits=5.0))
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_quantized_already_is_pointed_out(source, tmp_path):
    said = []
    fulfil(Request(model=str(source), output=tmp_path / "once", target=FOUR_BITS), say=said.append)
    assert said == []
    for name, recipe, hints in (("twice", FOUR_BITS.recipe, 1), ("kept", None, 0)):
        said = []
        request = Request(model=str(tmp_path / "once"), output=tmp_path / name, target=MlxTarget(recipe=recipe))
        fulfil(request, say=said.append)
        assert len([line for line in said if "quantized to 4 bits" in line and "--keep" in line]) == hints
