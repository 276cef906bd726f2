"""Loading: what is read, what is refused, and what it costs."""

from __future__ import annotations

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx.utils import tree_flatten, tree_map

import mlxlm
from mlxlm.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    TokenizerError,
    UnsupportedModelError,
    UsageError,
    WeightsError,
)
from mlxlm.models import Transformer, family, load_model, save

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def made():
    """A small model made here, with weights drawn wide."""
    mx.random.seed(0)
    model = Transformer(family("llama").read_config(CONFIG))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.2 + (p.ndim == 1), model.parameters()))
    return model.eval()


def edit(directory, **changes):
    """Change keys of a config.json; None removes one."""
    values = json.loads((directory / "config.json").read_text())
    values.update(changes)
    values = {key: value for key, value in values.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(values))


def rewrite(directory, change):
    """Pass the tensors of a checkpoint through a function and write them back."""
    path = str(directory / "model.safetensors")
    mx.save_safetensors(path, change(dict(mx.load(path))), metadata={"format": "pt"})


def test_a_model_made_here_saves_loads_and_is_the_same(made, tmp_path):
    save(made, None, tmp_path, family="llama")
    loaded = load_model(tmp_path)
    assert loaded.config == made.config
    assert mx.array_equal(loaded(TOKENS), made(TOKENS))
    assert not loaded.training


def test_a_model_made_here_must_say_its_family(made, tmp_path):
    with pytest.raises(UsageError, match="say what to write it as"):
        save(made, None, tmp_path)


@pytest.mark.parametrize("shard", [20_000, 100_000])
def test_shards_hold_the_same_model(made, tmp_path, shard):
    save(made, None, tmp_path, family="llama", max_shard_bytes=shard)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert mx.array_equal(load_model(tmp_path)(TOKENS), made(TOKENS))


def test_quantized_weights_are_kept_or_dequantized(made, tmp_path):
    nn.quantize(made, group_size=32, bits=4)
    save(made, None, tmp_path, family="llama")
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["quantization"] == {"group_size": 32, "bits": 4, "mode": "affine"} == values["quantization_config"]
    kept, opened = load_model(tmp_path, quantized=True), load_model(tmp_path, quantized=False)
    assert isinstance(kept.decoder.layers[0].attention.query, nn.QuantizedLinear)
    assert isinstance(kept.embeddings.token, nn.QuantizedEmbedding)
    assert mx.array_equal(kept(TOKENS), made(TOKENS))
    assert not [name for name, _ in tree_flatten(opened.parameters()) if name.endswith("scales")]
    assert mx.abs(opened(TOKENS) - made(TOKENS)).max().item() < 1e-3


def test_layers_may_be_quantized_differently_or_not_at_all(made, tmp_path):
    def choose(path, module):
        if not hasattr(module, "to_quantized") or path.endswith("feed_forward.up"):
            return False
        return {"bits": 8, "group_size": 64} if "head" in path or "layers.0" in path else {"bits": 4, "group_size": 32}

    nn.quantize(made, class_predicate=choose)
    save(made, None, tmp_path, family="llama")
    values = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert values["lm_head"]["bits"] == 8
    assert values["model.layers.0.self_attn.q_proj"] == {"bits": 8, "group_size": 64, "mode": "affine"}
    assert mx.array_equal(load_model(tmp_path, quantized=True)(TOKENS), made(TOKENS))


def test_on_the_cpu_quantized_weights_are_opened_by_default(made, tmp_path):
    nn.quantize(made, group_size=32, bits=4)
    save(made, None, tmp_path, family="llama")
    on_cpu = mlxlm.runtime.backend() == "cpu"
    assert isinstance(load_model(tmp_path).head.output, nn.QuantizedLinear) != on_cpu


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_dtype_can_be_chosen_and_is_written(made, tmp_path, dtype):
    save(made, None, tmp_path / "a", family="llama")
    model = load_model(tmp_path / "a", dtype=dtype)
    assert {p.dtype for _, p in tree_flatten(model.parameters())} == {getattr(mx, dtype)}
    save(model, None, tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == dtype


def test_on_the_cpu_16_bit_checkpoints_are_computed_in_float32(made, tmp_path):
    made.set_dtype(mx.bfloat16)
    save(made, None, tmp_path, family="llama")
    wanted = mx.float32 if mlxlm.runtime.backend() == "cpu" else mx.bfloat16
    assert load_model(tmp_path).head.output.weight.dtype == wanted


def test_loading_takes_little_more_than_the_model(tmp_path):
    config = {**CONFIG, "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 8}
    model = Transformer(family("llama").read_config(config))
    model.set_dtype(mx.bfloat16)
    save(model, None, tmp_path, family="llama")
    del model
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    loaded = load_model(tmp_path, dtype="float32")
    size = sum(p.nbytes for _, p in tree_flatten(loaded.parameters()))
    assert mx.get_peak_memory() - before < 1.15 * size


def test_every_wrong_weight_is_listed_by_its_name_on_disk(made, tmp_path):
    save(made, None, tmp_path, family="llama")

    def spoil(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.k_proj.weight"] = mx.zeros((8, 64))
        tensors["model.layers.9.mlp.up_proj.weight"] = mx.zeros((2, 2))
        tensors["surprise"] = mx.zeros((2,))
        return tensors

    rewrite(tmp_path, spoil)
    with pytest.raises(WeightsError) as caught:
        load_model(tmp_path)
    text = str(caught.value)
    assert "2 missing: " in text
    assert "2 unexpected: " in text
    assert "1 of another shape: model.layers.0.self_attn.k_proj.weight gives (8, 64)" in text
    for name in (
        "model.norm.weight",
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.9.mlp.up_proj.weight",
        "surprise",
    ):
        assert name in text


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"frobnicate": 3}, ConfigError, "frobnicate"),
        ({"rope_thta": 3.0}, ConfigError, "rope_thta; did you mean 'rope_theta'"),
        ({"hidden_size": None}, ConfigError, "lacks 'hidden_size'"),
        ({"hidden_act": "gelu_nwe"}, UnsupportedModelError, "did you mean 'gelu_new'"),
        ({"model_type": "lama"}, UnsupportedModelError, "not supported: 'lama'; did you mean 'llama'"),
        ({"model_type": None}, ModelNotFoundError, "no model_type"),
        ({"architectures": ["LlamaForFun"]}, UnsupportedModelError, "'LlamaForFun' is not supported"),
        (
            {"rope_scaling": {"rope_type": "yaarn"}},
            UnsupportedModelError,
            "'yaarn' is not implemented; did you mean 'yarn'",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, ConfigError, "lack 'factor'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "x": 1}}, ConfigError, "unknown keys x"),
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0}, ConfigError, "contradicts itself"),
        ({"num_key_value_heads": 3}, ConfigError, "4 query heads can't share 3"),
        ({"quantization_config": {"quant_method": "hqq"}}, UnsupportedModelError, "hqq"),
        ({"quantization_config": {"quant_method": "gptq"}}, CheckpointError, "says 'gptq', but .* holds no such"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_config_that_is_not_understood_is_refused(made, tmp_path, changes, error, words):
    save(made, None, tmp_path, family="llama")
    edit(tmp_path, **changes)
    with pytest.raises(error, match=words) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_other_models_than_checkpoints_are_named(tmp_path):
    with pytest.raises(ModelNotFoundError, match="no such"):
        mlxlm.load(tmp_path / "missing")
    with pytest.raises((ModelNotFoundError, CheckpointError), match=r"config\.json"):
        mlxlm.load(tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        mlxlm.load(tmp_path / "broken.gguf")
    with pytest.raises(UsageError, match="did you mean 'float16'"):
        mlxlm.models.loading.parse_dtype("float17")


def test_a_truncated_file_says_so(made, tmp_path):
    save(made, None, tmp_path, family="llama")
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="100 bytes"):
        load_model(tmp_path)


def test_an_unsupported_hub_model_is_refused_before_its_weights_are_fetched(monkeypatch):
    seen = []

    def pretend(path_or_hub_id, *, check_config, **_):
        seen.append(path_or_hub_id)
        check_config({"model_type": "mamba"})

    monkeypatch.setattr(mlxlm.models.loading, "resolve_model", pretend)
    with pytest.raises(UnsupportedModelError, match="mamba"):
        mlxlm.load("org/some-mamba")
    assert seen == ["org/some-mamba"]


def test_a_changed_model_gets_a_config_that_describes_it(made, tmp_path):
    save(made, None, tmp_path / "a", family="llama")
    edit(tmp_path / "a", eos_token_id=7)
    model = load_model(tmp_path / "a")
    shorter = family("llama").read_config({**model.source.values, "num_hidden_layers": 2})
    changed = Transformer(shorter)
    changed.source = model.source
    save(changed, None, tmp_path / "b")
    values = json.loads((tmp_path / "b" / "config.json").read_text())
    assert values["num_hidden_layers"] == 2
    assert values["eos_token_id"] == 7
    assert load_model(tmp_path / "b").config == shorter


@pytest.mark.parity
def test_quantized_directories_give_the_same_logits_in_mlx_lm(made, tmp_path):
    mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    nn.quantize(made, group_size=32, bits=4)
    save(made, None, tmp_path, family="llama")
    model, _ = mlx_lm.utils.load_model(tmp_path)
    assert np.abs(np.array(model(TOKENS)) - np.array(made(TOKENS))).max() < 1e-4


PUBLISHED = {
    # Config keys of published checkpoints, at reduced sizes: what other tools wrote beside what matters.
    "SmolLM2-135M": {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1, "rope_theta": 100000},
    "llama-7b": {"max_sequence_length": 2048, "_name_or_path": "x", "rms_norm_eps": 1e-6, "use_cache": True},
    "Llama-3.2-1B": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 16,
        "initializer_range": 0.02,
        "mlp_bias": False,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
    },
    "old tools": {"pruned_heads": {}, "num_labels": 2, "is_decoder": False, "tie_encoder_decoder": False},
    "new tools": {"_attn_implementation_autoset": True, "loss_type": None, "eos_token_ids": [2]},
}


@pytest.mark.parametrize("keys", PUBLISHED.values(), ids=PUBLISHED)
def test_keys_of_published_configs_are_known(keys):
    assert family("llama").read_config({**CONFIG, **keys}).dim == 64


def test_a_key_is_harmless_only_at_its_harmless_value():
    with pytest.raises(UnsupportedModelError, match="rope_interleaved = True is not implemented, only False"):
        family("llama").read_config({**CONFIG, "rope_interleaved": True})


def test_a_tied_weight_that_differs_from_its_copy_is_refused(made, tmp_path):
    save(made, None, tmp_path, family="llama")
    edit(tmp_path, tie_word_embeddings=True)
    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load_model(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    assert load_model(tmp_path).config.head.tied


def test_saving_refuses_a_config_that_would_not_describe_the_model(made, tmp_path):
    layers = made.config.decoder.layers
    windowed = replace(layers[0], attention=replace(layers[0].attention, window=5))
    decoder = replace(made.config.decoder, layers=(windowed, *layers[1:]))
    model = Transformer(replace(made.config, decoder=decoder))
    with pytest.raises(UsageError, match=r"decoder\.layers\.0\.attention\.window: 5 / None"):
        save(model, None, tmp_path, family="llama")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="can't describe this model"):
        save(made, None, tmp_path, family="qwen2")


def test_a_changed_rope_base_is_saved_in_one_dialect_only(made, tmp_path):
    save(made, None, tmp_path / "a", family="llama")
    edit(
        tmp_path / "a",
        rope_theta=None,
        rope_scaling=None,
        rope_parameters={"rope_theta": 777.0, "rope_type": "default"},
    )
    model = load_model(tmp_path / "a")
    other = family("llama").read_config({**CONFIG, "rope_theta": 888.0})
    changed = Transformer(other)
    changed.source = model.source
    save(changed, None, tmp_path / "b")
    assert load_model(tmp_path / "b").config == other


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_prompt_in_chunks_crosses_the_original_context_as_in_one_pass(kind):
    from mlxlm.generation.steps import prefill

    scaling = {"rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 32}
    config = {**CONFIG, "max_position_embeddings": 32, "rope_scaling": scaling}
    mx.random.seed(1)
    model = Transformer(family("llama").read_config(config))
    model.update(tree_map(lambda p: mx.random.normal(p.shape) * 0.2 + (p.ndim == 1), model.parameters()))
    tokens = [(7 * i) % 96 for i in range(50)]
    whole = model.hidden(mx.array([tokens]))[0, -1]
    assert mx.abs(prefill(model, tokens, model.make_cache(), chunk=11)[0, -1] - whole).max().item() < 1e-4
    held = model.make_cache()
    prefill(model, tokens[:20], held)
    assert mx.abs(prefill(model, tokens, held, chunk=11)[0, -1] - whole).max().item() < 1e-4


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"token_types": TOKENS}, "no token types"),
        ({"memory": mx.zeros((1, 3, 64))}, "encoder-decoder"),
        ({"positions": TOKENS[:, :3]}, "positions have shape"),
    ],
    ids=["token_types", "memory", "positions"],
)
def test_a_keyword_that_means_nothing_is_refused(made, keywords, words):
    with pytest.raises(UsageError, match=words):
        made(TOKENS, **keywords)


@pytest.mark.parametrize("place", ["embeddings", "attention", "attention_residual", "feed_forward_residual"])
def test_every_dropout_acts_in_training_only(fixture_model, place):
    model = load_model(fixture_model("gpt2"))
    block = model.config.decoder.layers[0]
    off = replace(
        block,
        attention=replace(block.attention, dropout=0.0),
        attention_residual=replace(block.attention_residual, dropout=0.0),
        feed_forward_residual=replace(block.feed_forward_residual, dropout=0.0),
    )
    embeddings = replace(model.config.embeddings, dropout=0.5 if place == "embeddings" else 0.0)
    if place != "embeddings":
        off = replace(off, **{place: replace(getattr(off, place), dropout=0.5)})
    decoder = replace(model.config.decoder, layers=(off, off))
    dropping = Transformer(replace(model.config, embeddings=embeddings, decoder=decoder))
    dropping.update(model.parameters())
    plain = model(TOKENS)
    assert mx.allclose(dropping.eval()(TOKENS), plain, atol=1e-5)
    assert not mx.allclose(dropping.train()(TOKENS), plain, atol=1e-2)


def test_a_model_can_be_saved_over_itself_and_keeps_its_tokenizer(tiny_bert_directory):
    (tiny_bert_directory / "tokenizer.json").unlink(missing_ok=True)
    before = sorted(path.name for path in tiny_bert_directory.iterdir())
    model, tokenizer = mlxlm.load(tiny_bert_directory)
    mlxlm.save(model, tokenizer, tiny_bert_directory)
    again, its_tokenizer = mlxlm.load(tiny_bert_directory)
    assert its_tokenizer.encode("the thing is") == tokenizer.encode("the thing is")
    assert mx.array_equal(again(TOKENS), model(TOKENS))
    assert sorted(path.name for path in tiny_bert_directory.iterdir()) == before


def test_a_tokenizer_that_can_not_be_saved_leaves_the_weights_alone(tiny, tiny_bert_directory):
    model, tokenizer = tiny
    weights = (tiny_bert_directory / "model.safetensors").read_bytes()
    with pytest.raises(TokenizerError, match="another tokenizer"):
        mlxlm.save(model, tokenizer, tiny_bert_directory)
    assert (tiny_bert_directory / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "x"},
        {"num_attention_heads": 0},
        {"hidden_act": []},
        {"rope_parameters": 1},
        {"architectures": 1},
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_value_of_the_wrong_type_is_a_config_error(changes):
    with pytest.raises(ConfigError, match="wrong type or size"):
        family("llama").read_config({**CONFIG, **changes})


def test_a_file_without_metadata_loads(fixture_model):
    directory = fixture_model("llama")
    expected = load_model(directory)(mx.array([[1, 2, 3]]))
    tensors = {name: mx.array(array) for name, array in mx.load(str(directory / "model.safetensors")).items()}
    mx.eval(tensors)
    mx.save_safetensors(str(directory / "model.safetensors"), tensors)
    assert mx.array_equal(load_model(directory)(mx.array([[1, 2, 3]])), expected).item()


def test_a_model_is_not_saved_onto_a_file(fixture_model, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(UsageError, match="a file is in its place"):
        save(load_model(fixture_model("llama")), None, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_a_model_without_a_source_gets_the_token_ids_of_its_tokenizer(tiny, tmp_path):
    model, tokenizer = tiny
    del model.source
    save(model, tokenizer, tmp_path / "new", family="llama")
    written = json.loads((tmp_path / "new" / "config.json").read_text())
    assert [written[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [1, 2, 0]


@pytest.mark.parametrize("count", [-1, 0, 1001, 10**12])
def test_a_number_of_layers_that_no_model_has_is_refused(count, fixture_model):
    directory = fixture_model("llama")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**values, "num_hidden_layers": count}))
    with pytest.raises(ConfigError, match=f"num_hidden_layers = {count}, expected 1 to 1000"):
        load_model(directory)
