"""The head and loss in chunks against the plain formula, and the plain formula against float64 numpy."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlxlm import runtime
from mlxlm.errors import UsageError
from mlxlm.kernels import (
    QuantizedWeight,
    cross_entropy,
    fused_linear_cross_entropy,
    reference_linear_cross_entropy,
    token_log_probabilities,
)

N, D, V, IGNORED = 11, 64, 150, -100

OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.05},
    "everything": {"softcap": 2.0, "logit_scale": 2.0, "label_smoothing": 0.2, "z_loss": 0.02},
}


def problem(dtype: mx.Dtype = mx.float32) -> tuple[dict[str, mx.array], mx.array]:
    """hidden, weight and bias; targets at both ends of the vocabulary and two ignored ones."""
    mx.random.seed(3)
    arrays = {
        "hidden": mx.random.normal((N, D)).astype(dtype),
        "weight": (0.2 * mx.random.normal((V, D))).astype(dtype),
        "bias": mx.random.normal((V,)).astype(dtype),
    }
    targets = mx.random.randint(0, V, (N,))
    targets[mx.array([0, 1, 3, 7])] = mx.array([0, V - 1, IGNORED, IGNORED])
    return arrays, targets


def loss64(arrays, targets, softcap=None, logit_scale=1.0, label_smoothing=0.0, z_loss=0.0) -> np.ndarray:
    """Losses of all tokens in float64, word by word from the definition."""
    hidden, weight, bias = (np.array(arrays[name]).astype(np.float64) for name in ("hidden", "weight", "bias"))
    logits = (hidden @ weight.T + bias) * logit_scale
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    losses = []
    for row, target in zip(logits, np.array(targets), strict=True):
        if target == IGNORED:
            losses.append(0.0)
            continue
        log_sum = np.log(np.exp(row - row.max()).sum()) + row.max()
        wanted = np.full(V, label_smoothing / V)
        wanted[target] += 1.0 - label_smoothing
        losses.append(-(wanted * (row - log_sum)).sum() + z_loss * log_sum**2)
    return np.array(losses)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_is_the_definition(options):
    arrays, targets = problem()
    got = reference_linear_cross_entropy(**arrays, targets=targets, reduction="none", **options)
    np.testing.assert_allclose(np.array(got), loss64(arrays, targets, **options), rtol=1e-5, atol=1e-6)


def assert_matches_the_reference(arrays, targets, fixed, options, tolerance=1e-5, **how) -> None:
    """Losses and gradients of `arrays`; `fixed` holds what is not differentiated, `how` further arguments of ours."""
    weights = mx.cos(mx.arange(N))  # every token has a cotangent of its own

    def loss(function, **more):
        def weighted(arrays):
            losses = function(**arrays, **fixed, targets=targets, reduction="none", **options, **more)
            return (losses * weights).sum(), losses

        return mx.value_and_grad(weighted)(arrays)

    (_, expected), expected_gradients = loss(reference_linear_cross_entropy)
    for chunk in (1, 37, V, 1000):
        (_, got), gradients = loss(fused_linear_cross_entropy, chunk=chunk, **how)
        np.testing.assert_allclose(np.array(got), np.array(expected), rtol=tolerance, atol=tolerance)
        for name, gradient in gradients.items():
            assert gradient.dtype == arrays[name].dtype
            np.testing.assert_allclose(
                np.array(gradient.astype(mx.float32)), np.array(expected_gradients[name].astype(mx.float32)),
                rtol=tolerance, atol=tolerance, err_msg=name,
            )  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("with_bias", [False, True], ids=["no-bias", "bias"])
def test_chunks_match_the_reference(options, with_bias):
    arrays, targets = problem()
    if not with_bias:
        del arrays["bias"]
    assert_matches_the_reference(arrays, targets, {}, options)


@pytest.mark.parametrize("mode", ["affine-4", "affine-8", "mxfp4"])
@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["everything"]], ids=["plain", "everything"])
def test_a_quantized_head_matches_the_reference(mode, options):
    arrays, targets = problem()
    settings = {"mxfp4": (32, 4, "mxfp4"), "affine-4": (64, 4, "affine"), "affine-8": (32, 8, "affine")}[mode]
    group_size, bits, kind = settings
    packed = mx.quantize(arrays.pop("weight"), group_size=group_size, bits=bits, mode=kind)
    packed = (*packed, None) if len(packed) == 2 else packed
    assert_matches_the_reference(arrays, targets, {"weight": QuantizedWeight(*packed, *settings)}, options)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_sixteen_bit_arrays(dtype):
    arrays, targets = problem(dtype)
    assert_matches_the_reference(arrays, targets, {}, OPTIONS["everything"], tolerance=0.02)


def test_products_in_sixteen_bits_as_on_gpus(monkeypatch):
    monkeypatch.setattr(cross_entropy.runtime, "backend", lambda: "cuda")
    arrays, targets = problem(mx.bfloat16)
    assert_matches_the_reference(arrays, targets, {}, OPTIONS["everything"], tolerance=0.05)
    arrays, targets = problem()
    assert_matches_the_reference(arrays, targets, {}, OPTIONS["everything"])


def test_a_frozen_head_has_no_gradient_but_the_hidden_states_do():
    arrays, targets = problem()

    def loss(arrays, weight_gradient):
        return fused_linear_cross_entropy(**arrays, targets=targets, weight_gradient=weight_gradient, chunk=40)

    frozen, trained = mx.grad(loss)(arrays, False), mx.grad(loss)(arrays, True)
    assert (frozen["weight"] == 0).all().item()
    assert mx.allclose(frozen["hidden"], trained["hidden"]).item()
    assert mx.abs(trained["weight"]).max().item() > 0


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_pass_over_a_frozen_head_matches_the_reference(options):
    arrays, targets = problem()
    hidden, fixed = {"hidden": arrays["hidden"]}, {"weight": arrays["weight"]}
    assert_matches_the_reference(hidden, targets, fixed, options, one_pass=True, weight_gradient=False)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("learns", ["head-and-bias", "head", "bias"])
def test_one_pass_over_a_head_that_learns_matches_the_reference(learns, options, reduction, monkeypatch):
    monkeypatch.setitem(cross_entropy._PAYING_ROWS, "cpu", 1)
    arrays, targets = problem()
    fixed = {"head-and-bias": (), "head": ("bias",), "bias": ("weight",)}[learns]
    fixed = {name: arrays.pop(name) for name in fixed}
    if learns == "head":
        fixed = {}

    def gradients(function, **how):
        def loss(given):
            return 3.0 * function(**given, **fixed, targets=targets, reduction=reduction, **options, **how)

        return mx.value_and_grad(loss)(arrays)

    expected = gradients(reference_linear_cross_entropy)
    for chunk in (14, 50, V):
        got = gradients(fused_linear_cross_entropy, one_pass=True, weight_gradient=learns != "bias", chunk=chunk)
        assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
        for name, gradient in got[1].items():
            np.testing.assert_allclose(np.array(gradient), np.array(expected[1][name]), rtol=1e-4, atol=2e-5)


def test_one_pass_over_a_learning_head_is_two_where_that_is_faster(monkeypatch):
    rows = cross_entropy.one_pass_rows
    assert rows(4096, 1000, 500, trained=True) == 2048
    assert rows(4096, 1000, 5, trained=True) == 64  # no more than 64 chunks
    assert rows(64, 1000, 100, trained=True) == 0
    assert rows(64, 1000, 100, trained=False) == 6
    monkeypatch.setattr(cross_entropy.runtime, "backend", lambda: "cuda")
    assert rows(8192, 128_256, None, trained=True) == 2048
    assert rows(8192, 128_256, None, trained=False) == 523
    assert rows(8192, 128_256, 4096, trained=True) == 0
    assert rows(512, 128_256, None, trained=True) == 512


def test_one_pass_over_a_quantized_head_matches_the_reference():
    arrays, targets = problem()
    head = QuantizedWeight(*mx.quantize(arrays["weight"], group_size=32, bits=8), 32, 8)
    hidden, options = {"hidden": arrays["hidden"]}, OPTIONS["everything"]
    assert_matches_the_reference(hidden, targets, {"weight": head}, options, one_pass=True)


def test_one_pass_in_sixteen_bits_as_on_gpus(monkeypatch):
    monkeypatch.setattr(cross_entropy.runtime, "backend", lambda: "cuda")
    arrays, targets = problem(mx.bfloat16)
    hidden, fixed = {"hidden": arrays["hidden"]}, {"weight": arrays["weight"]}
    options = OPTIONS["everything"]
    assert_matches_the_reference(hidden, targets, fixed, options, 0.05, one_pass=True, weight_gradient=False)


def test_one_pass_gives_ignored_tokens_no_gradient_even_where_logits_overflow():
    arrays, targets = problem()
    hidden = mx.where((targets == IGNORED)[:, None], mx.inf, arrays["hidden"])

    def loss(hidden):
        return fused_linear_cross_entropy(
            hidden, arrays["weight"], targets, weight_gradient=False, one_pass=True, chunk=30
        )

    value, gradient = mx.value_and_grad(loss)(hidden)
    assert mx.isfinite(value).item()
    assert (gradient[3] == 0).all().item()
    assert mx.isfinite(gradient).all().item()


def test_one_pass_makes_no_more_logits_at_once_than_chunks_of_words(monkeypatch):
    shapes = []
    plain = cross_entropy._Head._logits
    monkeypatch.setattr(
        cross_entropy._Head, "_logits",
        lambda self, state, words: shapes.append((state["hidden"].shape[0], words[1] - words[0])) or plain(
            self, state, words
        ),
    )  # fmt: skip
    arrays, targets = problem()
    fused_linear_cross_entropy(
        arrays["hidden"], arrays["weight"], targets, weight_gradient=False, one_pass=True, chunk=50
    )
    assert [rows for rows, _ in shapes] == [3, 3, 3, 2]
    assert {words for _, words in shapes} == {V}
    assert max(rows * words for rows, words in shapes) <= 50 * N


def test_one_pass_without_a_reduction_is_for_a_frozen_head_without_bias():
    arrays, targets = problem()
    for given in (arrays, {"hidden": arrays["hidden"], "weight": arrays["weight"]}):
        frozen = "bias" in given
        with pytest.raises(UsageError, match="one_pass without a reduction is for a frozen head"):
            fused_linear_cross_entropy(
                **given, targets=targets, one_pass=True, weight_gradient=not frozen, reduction="none"
            )


def test_reductions_and_shapes():
    arrays, targets = problem()
    losses = fused_linear_cross_entropy(**arrays, targets=targets, reduction="none")
    assert losses.dtype == mx.float32
    assert losses[3].item() == losses[7].item() == 0.0
    total = fused_linear_cross_entropy(**arrays, targets=targets, reduction="sum")
    mean = fused_linear_cross_entropy(**arrays, targets=targets)
    assert total.item() == pytest.approx(losses.sum().item(), rel=1e-6)
    assert mean.item() == pytest.approx(losses.sum().item() / (N - 2), rel=1e-6)
    shaped = arrays | {"hidden": arrays["hidden"][:10].reshape(2, 5, D)}
    both = fused_linear_cross_entropy(**shaped, targets=targets[:10].reshape(2, 5), reduction="none")
    assert mx.array_equal(both, losses[:10].reshape(2, 5))


def test_a_batch_without_targets_gives_zero_and_no_gradient():
    arrays, targets = problem()
    nothing = mx.full(targets.shape, IGNORED)
    value, gradients = mx.value_and_grad(lambda arrays: fused_linear_cross_entropy(**arrays, targets=nothing))(arrays)
    assert value.item() == 0.0
    assert all((gradient == 0).all().item() for gradient in gradients.values())


def test_another_ignore_index_may_be_a_word():
    arrays, targets = problem()
    padded = mx.where(targets == IGNORED, 5, targets)
    got = fused_linear_cross_entropy(**arrays, targets=padded, ignore_index=5, reduction="none")
    expected = reference_linear_cross_entropy(**arrays, targets=padded, ignore_index=5, reduction="none")
    assert got[3].item() == 0.0
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-5)


@pytest.mark.parametrize("target", [V, -1])
def test_a_target_outside_of_the_vocabulary_is_not_hidden(target):
    arrays, targets = problem()
    targets[2] = target
    losses = fused_linear_cross_entropy(**arrays, targets=targets, reduction="none")
    assert mx.isnan(losses[2]).item()
    assert not mx.isnan(losses[:2]).any().item()


def test_token_log_probabilities():
    arrays, targets = problem()
    got = token_log_probabilities(**arrays, targets=targets, chunk=40)
    np.testing.assert_allclose(np.array(got), -loss64(arrays, targets), rtol=1e-5, atol=1e-6)


def test_inside_a_checkpointed_function():
    arrays, targets = problem()

    def loss(arrays):
        return fused_linear_cross_entropy(**arrays, targets=targets, chunk=64)

    expected, got = mx.grad(loss)(arrays), mx.grad(mx.checkpoint(loss))(arrays)
    assert all(mx.allclose(got[name], expected[name], atol=1e-7).item() for name in arrays)


def test_inside_a_compiled_training_step():
    """One chunk: on the CPU MLX compiles a C++ kernel for each fused shape, which takes seconds."""
    arrays, targets = problem()
    weight, arrays = arrays["weight"], {"hidden": arrays["hidden"]}

    def loss(arrays, targets):
        return fused_linear_cross_entropy(**arrays, weight=weight, targets=targets, weight_gradient=False)

    compiled = mx.compile(mx.value_and_grad(loss))
    for these in (targets, mx.roll(targets, 1)):
        expected, got = mx.value_and_grad(loss)(arrays, these), compiled(arrays, these)
        assert got[0].item() == pytest.approx(expected[0].item(), rel=1e-5)
        assert all(mx.allclose(got[1][name], expected[1][name], atol=1e-6).item() for name in arrays)


@pytest.mark.skipif(runtime.backend() != "cpu", reason="GPUs run ahead, so peaks of small problems say nothing")
def test_memory_does_not_grow_with_the_vocabulary(monkeypatch):
    monkeypatch.setitem(cross_entropy._CHUNK_BYTES, "cpu", 2**18)
    tokens, dim = 256, 16

    def peak(vocabulary: int, weight_gradient: bool) -> int:
        arrays = {"hidden": mx.random.normal((tokens, dim)), "weight": mx.random.normal((vocabulary, dim))}
        targets = mx.random.randint(0, vocabulary, (tokens,))
        mx.eval(arrays, targets)

        def loss(arrays):
            return fused_linear_cross_entropy(**arrays, targets=targets, weight_gradient=weight_gradient)

        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        argument = arrays if weight_gradient else {"hidden": arrays["hidden"]}
        fixed = {} if weight_gradient else {"weight": arrays["weight"]}
        mx.eval(mx.grad(lambda given: loss(given | fixed))(argument))
        return mx.get_peak_memory() - before

    small, large = peak(4_000, False), peak(16_000, False)
    assert large < 1.5 * small
    assert large < tokens * 16_000 * 4 / 4, "a quarter of the logits"
    assert peak(16_000, True) < large + 3 * 16_000 * dim * 4, "and the gradient of the head, with its copies"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": mx.zeros((N + 1,), mx.int32)}, r"targets have shape \(12,\); expected \(11,\)"),
        ({"targets": mx.zeros((N,))}, "targets are float32; expected integers"),
        ({"weight": mx.zeros((V, D + 1))}, r"weight has shape \(150, 65\); expected \(vocabulary, 64\)"),
        ({"bias": mx.zeros((V - 1,))}, r"bias has shape \(149,\); expected \(150,\)"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0"),
        ({"chunk": 0}, "chunk is 0"),
        ({"reduction": "means"}, "unknown reduction 'means'; did you mean 'mean'"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else ",".join(value),
)
def test_arguments_that_do_not_fit_are_rejected(change, message):
    arrays, targets = problem()
    with pytest.raises(UsageError, match=message):
        fused_linear_cross_entropy(**(arrays | {"targets": targets} | change))
