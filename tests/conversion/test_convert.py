"""Conversions of whole models: names, bytes and files of the result, and what happens when one is interrupted."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from torch_pickles import state_archive

import mlxlm
from mlxlm.checkpoint import open_safetensors
from mlxlm.conversion import GgufTarget, HubTarget, MlxTarget, Recipe, convert, dry_run, quantization
from mlxlm.conversion import parts as parts_module
from mlxlm.errors import CheckpointError, UsageError, WeightsError
from mlxlm.models import load_model

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"
NAMES = sorted(path.name for path in FIXTURES.iterdir())
FOUR_BITS = MlxTarget(recipe=Recipe(default=quantization(4, 32)))


def tensors(folder: Path) -> dict[str, tuple[mx.Dtype, tuple[int, ...], bytes]]:
    arrays = open_safetensors(folder).load()
    return {name: (a.dtype, a.shape, np.array(a.view(mx.uint8)).tobytes()) for name, a in arrays.items()}


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("name", NAMES)
def test_floats_come_out_as_they_went_in(name, fixture_model, tmp_path):
    source = fixture_model(name)
    convert(source, tmp_path / "out", HubTarget())
    assert tensors(tmp_path / "out") == tensors(source)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {key: after[key] for key in before if key not in ("dtype", "torch_dtype")} == {
        key: value for key, value in before.items() if key not in ("dtype", "torch_dtype")
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert", "t5", "phi3", "gemma2"])
def test_a_pytorch_file_gives_what_safetensors_give(name, fixture_model, tmp_path):
    source = fixture_model(name)
    arrays = {key: np.array(array) for key, array in open_safetensors(source).load().items()}
    expected = tensors(source)
    (source / "model.safetensors").unlink()
    state_archive(source / "pytorch_model.bin", arrays)
    convert(source, tmp_path / "out", HubTarget())
    assert tensors(tmp_path / "out") == expected


def test_a_dtype_is_that_of_all_floats_and_rounds_once(tiny_directory, tmp_path):
    convert(tiny_directory, tmp_path / "out", HubTarget(dtype="bfloat16"))
    before, after = open_safetensors(tiny_directory).load(), open_safetensors(tmp_path / "out").load()
    assert all(mx.array_equal(after[name], array.astype(mx.bfloat16)) for name, array in before.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "bert", "t5", "phi3", "falcon", "gpt_neox"])
def test_quantized_models_have_the_weights_of_mlxs_own_function_and_load(name, wide, tmp_path):
    source = wide(name)
    convert(source, tmp_path / "out", FOUR_BITS)
    model, rounded = load_model(source), load_model(tmp_path / "out", quantized=True)
    kept = dict(tree_flatten(rounded.parameters()))
    count = 0
    for path, module in model.named_modules():
        if f"{path}.scales" in kept:
            packed = mx.quantize(module.weight, group_size=32, bits=4)
            assert all(mx.array_equal(kept[f"{path}.{kind}"], part) for kind, part in zip(KINDS, packed, strict=True))
            count += 1
    assert count > 3


KINDS = ("weight", "scales", "biases")


@pytest.mark.parametrize(
    "form",
    [quantization(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64)]
    + [quantization(mode=mode) for mode in ("mxfp4", "mxfp8", "nvfp4")],
    ids=lambda form: f"{form.mode}-{form.bits}-{form.group_size}",
)
def test_every_form_loads_and_better_ones_lose_less(form, wide, tmp_path):
    source, tokens = wide("llama"), mx.array([[1, 5, 9, 44]])
    result = convert(source, tmp_path / "out", MlxTarget(recipe=Recipe(default=form)))
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (entry["bits"], entry["group_size"], entry["mode"]) == (form.bits, form.group_size, form.mode)
    logits = np.array(load_model(tmp_path / "out")(tokens))
    assert np.isfinite(logits).all()
    assert 0 < max(result.errors.values()) < {2: 0.7, 3: 0.4, 4: 0.2, 5: 0.1, 6: 0.05, 8: 0.05}[form.bits]


def test_what_is_packed_already_can_be_kept_or_unpacked(wide, tmp_path):
    convert(wide("llama"), tmp_path / "four", FOUR_BITS)
    convert(tmp_path / "four", tmp_path / "kept", MlxTarget(recipe=None))
    assert tensors(tmp_path / "kept") == tensors(tmp_path / "four")
    convert(tmp_path / "four", tmp_path / "floats", HubTarget())
    floats = open_safetensors(tmp_path / "floats").load()
    assert not any(name.endswith(".scales") for name in floats)
    again = load_model(tmp_path / "four", quantized=False)
    assert mx.array_equal(floats["model.layers.0.mlp.up_proj.weight"], again.decoder.layers[0].feed_forward.up.weight)
    assert "quantization" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    with pytest.raises(UsageError, match="nothing would be quantized: the source isn't quantized"):
        convert(tmp_path / "floats", tmp_path / "x", MlxTarget(recipe=None))


def test_patterns_choose_bits_module_by_module(wide, tmp_path):
    layers = (
        ("*.down_proj", quantization(8, 32)),
        ("model.layers.0.self_attn.*", None),
        ("*_proj", quantization(3, 64)),
    )
    recipe = Recipe(default=quantization(4, 32), layers=layers, embeddings=False, head=False)
    convert(wide("llama"), tmp_path / "out", MlxTarget(recipe=recipe))
    model = load_model(tmp_path / "out", quantized=True)
    block = model.decoder.layers[0]
    assert (block.feed_forward.down.bits, block.feed_forward.up.bits, block.feed_forward.up.group_size) == (8, 3, 64)
    assert not hasattr(block.attention.query, "bits")
    assert model.decoder.layers[1].attention.query.bits == 3
    assert not hasattr(model.embeddings.token, "bits")
    assert not hasattr(model.head.output, "bits")
    target = MlxTarget(recipe=Recipe(default=None, layers=(("*.dwn_proj", None),)))
    with pytest.raises(UsageError, match=r"no module is named '\*\.dwn_proj'; modules are named such as"):
        convert(wide("llama-tied"), tmp_path / "x", target)


def test_tokenizer_template_and_card_go_along(tiny_directory, tmp_path):
    (tiny_directory / "README.md").write_text("---\nlicense: mit\nextra: &a [1]\n---\n# Tiny\n")
    (tiny_directory / "generation_config.json").write_text('{"eos_token_id": 2}')
    convert(tiny_directory, tmp_path / "out", HubTarget(), origin="org/tiny", notes="Measured: nothing.")
    _, tokenizer = mlxlm.load(tmp_path / "out")
    _, before = mlxlm.load(tiny_directory)
    messages = [{"role": "user", "content": "Hi."}]
    assert tokenizer.encode_chat(messages) == before.encode_chat(messages)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: org/tiny" in card
    assert "Measured: nothing." in card
    assert "license" not in card  # anchors in the source's front matter: not read
    (tiny_directory / "README.md").write_text("---\nlicense: mit\n---\n# Tiny\n")
    convert(tiny_directory, tmp_path / "again", HubTarget())
    assert "license: mit" in (tmp_path / "again" / "README.md").read_text()
    assert "generation_config.json" in listing(tmp_path / "again")


def test_shards_have_an_index_and_hold_the_same(wide, tmp_path):
    source = wide("llama")
    convert(source, tmp_path / "out", HubTarget(max_shard_bytes=100_000))
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert tensors(tmp_path / "out") == tensors(source)
    assert index["metadata"]["total_size"] == open_safetensors(source).nbytes


def test_a_dry_run_says_what_is_then_done(wide, tmp_path):
    source = wide("gpt2")
    lines = list(dry_run(source, FOUR_BITS))
    convert(source, tmp_path / "out", FOUR_BITS)
    infos = open_safetensors(tmp_path / "out").tensors
    said = {line.name: (line.shape, line.dtype, line.nbytes) for line in lines if line.name is not None}
    assert said == {name: (info.shape, info.dtype, info.nbytes) for name, info in infos.items()}
    assert {name for line in lines for name in line.sources} == set(open_safetensors(source).tensors)


# ---------------------------------------------------------------------------------------------------- interruptions


class Stopped(Exception):
    pass


def stop_after(count: int):
    calls = []

    def progress(done, total, name):
        calls.append(name)
        if len(calls) > count:
            raise Stopped

    return progress


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_an_interrupted_conversion_goes_on_where_it_was(count, wide, tmp_path, monkeypatch):
    source = wide("llama")
    whole = convert(source, tmp_path / "whole", FOUR_BITS)
    with pytest.raises(Stopped):
        convert(source, tmp_path / "out", FOUR_BITS, progress=stop_after(count))
    assert not (tmp_path / "out").exists()
    seen = []
    resumed = convert(source, tmp_path / "out", FOUR_BITS, progress=lambda done, total, name: seen.append((done, name)))
    assert tensors(tmp_path / "out") == tensors(tmp_path / "whole")
    assert resumed.errors == whole.errors
    assert len(seen) == 36 - count  # 35 moves and the end, those done before left out
    assert listing(tmp_path / "out") == listing(tmp_path / "whole")
    assert listing(tmp_path) == ["llama", "out", "whole"]


def test_another_conversion_is_not_taken_up(wide, tmp_path):
    source = wide("llama")
    with pytest.raises(Stopped):
        convert(source, tmp_path / "out", FOUR_BITS, progress=stop_after(9))
    convert(source, tmp_path / "out", HubTarget())
    assert tensors(tmp_path / "out") == tensors(source)


def test_two_conversions_of_one_output_are_refused(wide, tmp_path):
    source = wide("llama")

    def again(done, total, name):
        convert(source, tmp_path / "out", FOUR_BITS)

    with pytest.raises(UsageError, match="another conversion is writing"):
        convert(source, tmp_path / "out", FOUR_BITS, progress=again)


def test_what_stands_at_the_output_is_left_alone(wide, tmp_path):
    source = wide("llama")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(UsageError, match="is there already"):
        convert(source, tmp_path / "out", FOUR_BITS)
    assert listing(tmp_path / "out") == ["mine"]
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="is there already"):
        convert(source, tmp_path / "link", FOUR_BITS)
    (tmp_path / "empty").mkdir()
    convert(source, tmp_path / "empty", FOUR_BITS)
    assert "config.json" in listing(tmp_path / "empty")


def test_a_disk_that_is_too_small_is_noticed_first(wide, tmp_path, monkeypatch):
    source = wide("llama")
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    monkeypatch.setattr(parts_module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs 0\.06 GB more, but the disk has only 0\.00 GB free"):
        convert(source, tmp_path / "out", FOUR_BITS)
    assert listing(tmp_path) == ["llama"]


def test_what_is_done_survives_a_disk_that_fills_up(wide, tmp_path, monkeypatch):
    source = wide("llama")
    with pytest.raises(Stopped):
        convert(source, tmp_path / "out", FOUR_BITS, progress=stop_after(9))
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    with monkeypatch.context() as full:
        full.setattr(parts_module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CheckpointError, match="the disk has only"):
            convert(source, tmp_path / "out", FOUR_BITS)
    seen = []
    convert(source, tmp_path / "out", FOUR_BITS, progress=lambda done, total, name: seen.append(name))
    assert len(seen) == 36 - 9


def test_names_belong_to_their_kind_of_result(wide, tmp_path):
    with pytest.raises(UsageError, match=r"x\.gguf: the result is a folder"):
        convert(wide("llama"), tmp_path / "x.gguf", FOUR_BITS)
    with pytest.raises(UsageError, match=r"name ends in \.gguf"):
        convert(wide("llama-tied"), tmp_path / "x", GgufTarget())


def test_progress_is_in_the_journal_soon(wide, tmp_path, monkeypatch):
    """A process that is killed loses a few seconds of work, however small the model is."""
    source, journals = wide("llama"), []
    monkeypatch.setattr(parts_module, "_SECONDS", 0.0)

    def look(done, total, name):
        journal = tmp_path / ".out.converting" / ".journal"
        journals.append(len(journal.read_text().splitlines()) if journal.exists() else 0)

    convert(source, tmp_path / "out", FOUR_BITS, progress=look)
    assert journals == list(range(36))


# ---------------------------------------------------------------------------------------------------- bad sources


@pytest.mark.parametrize("target", [FOUR_BITS, HubTarget()], ids=["quantized", "floats"])
def test_nan_is_refused_and_leaves_nothing(target, wide, tmp_path):
    source = wide("llama")
    arrays = open_safetensors(source).load()
    broken = arrays["model.layers.1.mlp.up_proj.weight"]
    broken[3, 5] = float("nan")
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        convert(source, tmp_path / "out", target)
    assert listing(tmp_path) == ["llama"]


def test_tensors_that_do_not_fit_are_all_listed_before_anything_is_written(fixture_model, tmp_path):
    source = fixture_model("llama")
    arrays = open_safetensors(source).load()
    del arrays["model.norm.weight"]
    arrays["surplus"] = mx.ones(3)
    mx.eval(arrays)
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"1 missing: model\.norm\.weight; 1 unexpected: surplus"):
        convert(source, tmp_path / "out", HubTarget())
    assert listing(tmp_path) == ["llama"]


def test_a_copy_of_a_tied_weight_that_differs_is_refused(fixture_model, tmp_path):
    source = fixture_model("llama-tied")
    arrays = open_safetensors(source).load()
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"] + 1
    mx.eval(arrays)
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "pt"})
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert(source, tmp_path / "out", HubTarget())


def test_values_too_large_for_a_dtype_are_refused(fixture_model, tmp_path):
    source = fixture_model("llama")
    arrays = open_safetensors(source).load()
    arrays["model.norm.weight"] = arrays["model.norm.weight"] * 1e6
    mx.eval(arrays)
    mx.save_safetensors(str(source / "model.safetensors"), arrays, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values too large for float16"):
        convert(source, tmp_path / "out", HubTarget(dtype="float16"))


@pytest.mark.parametrize(
    "name", ["generation_config.json", "README.md", "chat_template.jinja", "1_Pooling/config.json"]
)
def test_links_out_of_the_folder_are_not_carried_along(name, fixture_model, tmp_path):
    source = fixture_model("llama")
    (tmp_path / "secret").write_text("{}")
    (source / name).parent.mkdir(exist_ok=True)
    (source / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="lies outside the directory"):
        convert(source, tmp_path / "out", HubTarget())
    assert not (tmp_path / "out").exists()
