"""The one door: argument errors, the choice of an implementation, the tuning record."""

from __future__ import annotations

import json
from types import SimpleNamespace

import mlx.core as mx
import pytest
from attention_oracle import inputs, relative_error

from mlxlm import runtime
from mlxlm.errors import AttentionError
from mlxlm.kernels import AttentionMask, attention
from mlxlm.kernels.attention import IMPLEMENTATIONS, choice, device, problem, tuning

# CUDA takes float32 products in TF32, with 10 bits of mantissa: the same call differs that much between two ways.
TOLERANCE = 5e-3 if runtime.backend() == "cuda" else 1e-5


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, with nothing remembered from before and nothing left behind."""
    monkeypatch.setenv("MLXLM_CACHE", str(tmp_path))
    tuning.record.cache_clear()
    yield tmp_path
    tuning.record.cache_clear()


@pytest.fixture
def environment(monkeypatch):
    """A function that sets MLXLM_ATTENTION as if the process had started with it."""

    def use(value: str) -> None:
        monkeypatch.setenv("MLXLM_ATTENTION", value)
        choice.forced_by_environment.cache_clear()

    yield use
    choice.forced_by_environment.cache_clear()


def chosen(arrays, *, mask=None, implementation="auto", **given) -> str:
    """The name of the implementation that a call would use."""
    defaults = dict.fromkeys(("alibi_slopes", "relative_bias", "bias", "softcap", "sinks", "dropout_key"))
    modifiers = defaults | {"dropout": 0.0, "return_lse": False} | given
    return choice.choose(implementation, *arrays.values(), mask or AttentionMask(), modifiers)


def fake_metal(monkeypatch, *, available=True, reason=None):
    """Pretend that the default device is Apple's and that there are kernels for it."""
    module = SimpleNamespace(available=lambda: available, serves=lambda problem: reason)
    monkeypatch.setattr(runtime, "backend", lambda: "metal")
    monkeypatch.setattr(choice, "load", lambda name: module if name == "metal" else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": mx.zeros((2, 4, 5))}, r"query \(2, 4, 5\), key .* don't fit together"),
        ({"key": mx.zeros((1, 2, 7, 8))}, "don't fit together"),
        ({"key": mx.zeros((2, 2, 7, 9))}, "don't fit together"),
        ({"value": mx.zeros((2, 2, 6, 6))}, "don't fit together"),
        ({"key": mx.zeros((2, 3, 7, 8)), "value": mx.zeros((2, 3, 7, 8))}, "H a multiple of Hkv"),
        ({"key": mx.zeros((2, 2, 0, 8)), "value": mx.zeros((2, 2, 0, 8))}, "nothing empty"),
        ({"value": mx.zeros((2, 2, 7, 6), mx.float16)}, "float32, float32, float16; expected one dtype"),
        ({"mask": "causal"}, "mask is a str; expected an AttentionMask"),
        ({"mask": mx.zeros((5, 7))}, "mask is a array; expected an AttentionMask"),
        ({"mask": AttentionMask(key_lengths=[1, 2, 3])}, "mask.key_lengths has shape"),
        ({"alibi_slopes": mx.zeros((2,))}, r"alibi_slopes has shape \(2,\); expected \(4,\)"),
        ({"alibi_slopes": mx.zeros((4,), mx.int32)}, "alibi_slopes is int32; expected float32"),
        ({"relative_bias": mx.zeros((4, 12))}, r"relative_bias has shape \(4, 12\); expected \(4, 11\)"),
        ({"sinks": mx.zeros((4, 1))}, r"sinks has shape \(4, 1\); expected \(4,\)"),
        ({"bias": mx.zeros((3, 7))}, r"bias has shape \(3, 7\); expected one that broadcasts to \(2, 4, 5, 7\)"),
        ({"bias": mx.zeros((1, 2, 4, 5, 7))}, "bias has shape"),
        ({"bias": mx.zeros((5, 7), mx.bool_)}, "bias is bool"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": 0.1}, "dropout needs dropout_key"),
        ({"dropout": 0.1, "dropout_key": mx.array([1, 2])}, "dropout needs dropout_key"),
        ({"implementation": "tilde"}, "unknown attention implementation 'tilde'; did you mean 'tiled'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else ",".join(value),
)
def test_arguments_that_do_not_fit_are_rejected(change, message):
    with pytest.raises(AttentionError, match=message):
        attention(**(inputs() | change))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 2.0}, "no soft-cap"),
        ({"dropout": 0.1, "dropout_key": mx.random.key(0)}, "no dropout"),
        ({"return_lse": True}, "does not return the log-sum-exp"),
    ],
    ids=["softcap", "dropout", "lse"],
)
def test_a_forced_implementation_that_can_not_serve_says_why(options, reason):
    with pytest.raises(AttentionError, match=f"'mlx' can't serve this call: mx.fast .*{reason.split()[-1]}"):
        attention(**inputs(), **options, implementation="mlx")


def test_mlx_refuses_terms_that_it_would_round():
    arrays = inputs(dtype=mx.bfloat16)
    for options in ({"alibi_slopes": mx.ones((4,))}, {"relative_bias": mx.ones((4, 11))}, {"bias": mx.ones((5, 7))}):
        with pytest.raises(AttentionError, match="would round"):
            attention(**arrays, **options, implementation="mlx")
    attention(**arrays, bias=mx.ones((5, 7), mx.bfloat16), implementation="mlx")


@pytest.mark.skipif(runtime.backend() == "metal", reason="there is a Metal device")
def test_metal_without_a_device_says_so():
    with pytest.raises(AttentionError, match=r"'metal' can't serve this call: .*(no Metal)"):
        attention(**inputs(), implementation="metal")


@pytest.mark.parametrize("name", ["mlx", "tiled", "reference"])
def test_the_environment_forces_an_implementation(name, environment, monkeypatch):
    used = []
    original = choice.load
    monkeypatch.setitem(attention.__globals__, "load", lambda name: used.append(name) or original(name))
    environment(name)
    attention(**inputs())
    attention(**inputs(), implementation="reference")
    assert used == [name, "reference"]


def test_the_environment_with_an_unknown_name_is_an_error(environment):
    environment("fast")
    with pytest.raises(AttentionError, match="unknown attention implementation 'fast'"):
        attention(**inputs())


def test_auto_on_the_cpu(cache, monkeypatch):
    monkeypatch.setattr(runtime, "backend", lambda: "cpu")
    decoding, short = inputs(L=1, S=300), inputs(L=20, S=20)
    long = inputs(H=8, L=300, S=300)
    assert chosen(decoding) == "mlx"
    assert chosen(short) == "mlx"
    assert chosen(long) == "tiled"
    assert chosen(short, softcap=2.0) == "tiled"
    assert chosen(decoding, return_lse=True) == "tiled"


def test_decoding_is_recognised_without_detours(cache, monkeypatch):
    monkeypatch.setattr(runtime, "backend", lambda: "cpu")
    arrays = inputs(L=1, S=300)
    query, key = arrays["query"], arrays["key"]
    assert choice.is_mlx_decoding(query, key, AttentionMask(causal=True, window=300))
    assert not choice.is_mlx_decoding(query, key, AttentionMask(causal=True, window=299))
    assert not choice.is_mlx_decoding(query, key, AttentionMask(causal=True, query_offset=mx.array(299)))
    assert not choice.is_mlx_decoding(inputs(L=9, S=9)["query"], key, AttentionMask())
    expected = attention(**arrays, implementation="reference")
    assert relative_error(attention(**arrays, mask=AttentionMask(causal=True)), expected) < TOLERANCE
    fake_metal(monkeypatch)
    assert not choice.is_mlx_decoding(query, key, AttentionMask())


def test_auto_on_cuda_uses_mlx_where_it_is_linear(cache, monkeypatch):
    monkeypatch.setattr(runtime, "backend", lambda: "cuda")
    causal, packed = AttentionMask(causal=True), AttentionMask(causal=True, window=100)
    long = inputs(H=8, L=3000, S=3000, D=64, E=64, dtype=mx.bfloat16)
    assert chosen(long, mask=causal) == "mlx"
    assert chosen(long, mask=packed) == "tiled"
    in_float32 = {name: array.astype(mx.float32) for name, array in long.items()}
    assert chosen(in_float32, mask=causal) == "tiled"
    assert chosen(inputs(L=100, S=100), mask=packed) == "mlx"
    assert chosen(inputs(L=1), sinks=mx.zeros((4,))) == "mlx"
    assert chosen(long, bias=mx.zeros((3000, 3000), mx.bfloat16)) == "tiled"


@mx.custom_function
def _constant(array):
    """The array itself, which has no gradient: as masks and sinks of MLX's attention on CUDA."""
    return array


@_constant.vjp
def _constant_vjp(primal, cotangent, output):
    raise RuntimeError("Does not support VJP with respect to mask or attention sinks.")


@pytest.fixture
def cuda_without_mask_gradients(cache, monkeypatch):
    """A backend that calls itself CUDA and whose attention refuses the gradients that MLX refuses there."""
    original = mx.fast.scaled_dot_product_attention

    def refusing(query, key, value, *, scale, mask=None, sinks=None):
        mask = _constant(mask) if isinstance(mask, mx.array) else mask
        return original(query, key, value, scale=scale, mask=mask, sinks=None if sinks is None else _constant(sinks))

    monkeypatch.setattr(runtime, "backend", lambda: "cuda")
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", refusing)


@pytest.mark.parametrize("name", ["alibi_slopes", "relative_bias", "bias", "key-bias", "sinks", "bias+sinks", "none"])
@pytest.mark.parametrize("mask", ["plain", "causal", "segments", "lengths"])
def test_a_gradient_through_auto_on_cuda_never_meets_what_mlx_refuses(name, mask, cuda_without_mask_gradients):
    mx.random.seed(0)
    every = {
        "alibi_slopes": mx.random.uniform(shape=(4,)), "relative_bias": mx.random.normal((4, 13)),
        "bias": mx.random.normal((7, 7)), "key-bias": mx.random.normal((2, 1, 1, 7)), "sinks": mx.random.normal((4,)),
    }  # fmt: skip
    arrays = inputs(L=7, S=7) | {n.removeprefix("key-"): every[n] for n in name.split("+") if n in every}
    ids = mx.array([[0, 0, 0, 1, 1, 2, 2]])
    masks = {"plain": {}, "causal": {"causal": True}, "lengths": {"key_lengths": mx.array([7, 4])}}
    masks["segments"] = {"causal": True, "query_segments": ids, "key_segments": ids}
    given = AttentionMask(**masks[mask])

    def loss(arrays, implementation):
        return (attention(**arrays, mask=given, implementation=implementation) * mx.arange(6)).square().sum()

    assert chosen({n: arrays[n] for n in ("query", "key", "value")}, mask=given) == "mlx"
    found, expected = mx.grad(loss)(arrays, "auto"), mx.grad(loss)(arrays, "reference")
    assert {n: relative_error(found[n], expected[n]) for n in arrays} == {
        n: pytest.approx(0, abs=TOLERANCE) for n in arrays
    }


def test_a_checkpointed_layer_asks_for_no_gradient_of_its_mask(cuda_without_mask_gradients):
    arrays, lengths = inputs(L=7, S=7), mx.array([7, 4])

    def layer(query, key, value, lengths):
        return attention(query, key, value, mask=AttentionMask(key_lengths=lengths)).square().sum()

    checkpointed = mx.checkpoint(layer)
    found = mx.grad(lambda query: checkpointed(query, arrays["key"], arrays["value"], lengths))(arrays["query"])
    expected = mx.grad(lambda query: layer(query, arrays["key"], arrays["value"], lengths))(arrays["query"])
    assert relative_error(found, expected) < TOLERANCE


def test_auto_on_metal_uses_our_kernels_where_they_serve(cache, monkeypatch):
    fake_metal(monkeypatch)
    assert chosen(inputs(L=1)) == "metal"
    assert chosen(inputs(), softcap=2.0) == "metal"
    fake_metal(monkeypatch, reason="heads are too wide")
    assert chosen(inputs()) == "mlx"
    assert chosen(inputs(), softcap=2.0) == "tiled"
    with pytest.raises(AttentionError, match="'metal' can't serve this call: heads are too wide"):
        chosen(inputs(), implementation="metal")
    fake_metal(monkeypatch, available=False)
    assert chosen(inputs()) == "mlx"


def test_auto_follows_the_tuning_record(cache, monkeypatch):
    fake_metal(monkeypatch)
    arrays = inputs()
    key = tuning.problem_key(problem.describe(*arrays.values(), AttentionMask(causal=True)))
    assert key == "float32 d8 e6 q8 k8 causal"
    path = tuning.write_record("metal", disabled={}, choices={key: "mlx"})
    assert path.is_relative_to(cache)
    assert [file.name for file in path.parent.iterdir()] == [path.name], "no temporary file is left"
    assert chosen(arrays, mask=AttentionMask(causal=True)) == "mlx"
    assert chosen(arrays) == "metal", "another class of problems keeps its default"
    assert chosen(arrays, mask=AttentionMask(causal=True), return_lse=True) == "metal", "mlx can't serve that"


def test_a_kernel_that_failed_its_check_is_not_used(cache, monkeypatch):
    fake_metal(monkeypatch)
    tuning.write_record("metal", disabled={"metal": "dq differs"}, choices={})
    assert chosen(inputs(), softcap=2.0) == "tiled"
    assert chosen(inputs(), implementation="metal") == "metal", "forcing still works"


def test_a_record_of_another_mlx_counts_as_empty(cache):
    path = tuning.write_record("cpu", disabled={}, choices={"a": "mlx"})
    assert tuning.record("cpu").choices == {"a": "mlx"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mlx": "0.1"}))
    tuning.record.cache_clear()
    assert tuning.record("cpu").choices == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"choices": 3}', '{"speed": {}}'])
def test_a_damaged_record_is_passed_over_with_a_warning(content, cache, monkeypatch):
    monkeypatch.setattr(runtime, "backend", lambda: "cpu")
    path = tuning.record_path("cpu")
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(RuntimeWarning, match="ignored the attention record"):
        assert chosen(inputs(L=1)) == "mlx"


def test_the_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("MLXLM_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setattr("sys.platform", "linux")
    assert tuning.record_path("cpu").is_relative_to(tmp_path / "xdg" / "mlxlm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.record_path("cpu").is_relative_to(tmp_path / ".cache" / "mlxlm")
    monkeypatch.setattr("sys.platform", "darwin")
    assert tuning.record_path("cpu").is_relative_to(tmp_path / "Library" / "Caches" / "mlxlm")


def test_implementations_are_named():
    assert IMPLEMENTATIONS == ("metal", "mlx", "tiled", "reference")
    assert device.device_profile("cpu").kind == "cpu"


def test_defaults_are_those_of_the_contract():
    arrays = inputs()
    expected = attention(**arrays, scale=8**-0.5, mask=AttentionMask(), implementation="reference")
    assert relative_error(attention(**arrays), expected) < TOLERANCE
    out, lse = attention(**arrays, return_lse=True)
    assert relative_error(out, expected) < TOLERANCE
    assert lse.shape == (2, 4, 5)
    assert lse.dtype == mx.float32


@pytest.mark.parametrize("implementation", ["mlx", "tiled", "reference", "auto"])
def test_a_bias_that_hides_every_key_gives_zero_and_no_nan(implementation):
    mx.random.seed(0)
    query, key, value = (mx.random.normal((1, 2, 5, 16)) for _ in range(3))
    bias = mx.where(mx.arange(5)[:, None] == 2, -mx.inf, mx.zeros((5, 5)))[None, None]
    out = attention(query, key, value, bias=bias, implementation=implementation)
    assert not mx.isnan(out).any()
    assert mx.abs(out[:, :, 2]).max() == 0
    plain = attention(query, key, value, implementation="reference")
    kept = mx.array([0, 1, 3, 4])
    assert mx.allclose(out[:, :, kept], plain[:, :, kept], atol=TOLERANCE)
