"""Small weights that are kept joined: nothing but the number of operations differs."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlxlm import peft
from mlxlm.distributed import parallel
from mlxlm.training import Optimizer, Trainer, TrainSettings, WordLoss, optimizers, step
from mlxlm.training.packing import Packing

sys.path.insert(0, str(Path(__file__).parent))
from training_runs import Rows, tiny_model, weights_of

SHAPES = {
    "a": (3, 5), "large": (80, 5), "b": (7,), "c": (16, 8), "d": (2, 5), "e": (1,), "half": (4, 5), "f": (3, 8),
    "g": (4, 5), "scalar": (), "other": (2, 3),
}  # fmt: skip


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    drawn = {name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in SHAPES.items()}
    return drawn | {"half": drawn["half"].astype(mx.float16)}


def test_what_is_joined_comes_apart_again():
    packing, given = Packing(arrays(), most=200), arrays(1)
    packed = packing.pack(given)
    assert sorted(array.shape[1:] for name, array in packed.items() if name not in given) == [(), (5,), (8,)]
    assert {"large", "half", "other", "scalar"} < packed.keys()  # too large, and alone in its dtype or shape
    again = packing.unpack(packed)
    assert again.keys() == given.keys()
    for name, array in again.items():
        assert array.dtype == given[name].dtype
        assert np.array_equal(array, given[name])


def test_every_array_begins_where_products_find_it_aligned():
    packing = Packing(arrays(), most=200)
    for name, array in packing.pack(arrays()).items():
        places = mx.arange(array.size).reshape(array.shape)
        assert all(int(part.reshape(-1)[0]) % 128 == 0 for part in packing.parts(name, places).values())


def test_nothing_is_joined_where_nothing_is_small():
    assert Packing(arrays(), most=0).pack(arrays()).keys() == SHAPES.keys()


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sgd"])
def test_a_joined_update_is_that_of_each_array(optimizer):
    settings = TrainSettings(steps=9, optimizer=optimizer, weight_decay=0.1)
    packing = Packing(arrays(), most=200)
    single, joined = Optimizer(settings, arrays()), Optimizer(settings, packing.pack(arrays()), packing)
    one, other = arrays(), packing.pack(arrays())
    for number in range(3):
        gradients = arrays(5 + number)
        one = single.apply(gradients, one, mx.array(True))
        other = joined.apply(packing.pack(gradients), other, mx.array(True))
    assert all(np.allclose(array, one[name], atol=1e-6) for name, array in packing.unpack(other).items())
    state = joined.arrays()
    assert {name: array.shape for name, array in state.items()} == {n: a.shape for n, a in single.arrays().items()}
    fresh = Optimizer(settings, packing.pack(arrays()), packing)
    fresh.restore(state)
    assert all(np.array_equal(array, state[name]) for name, array in fresh.arrays().items())


@pytest.fixture
def not_compiled():
    """Steps that are told to compile, which are those that join, without the time that compiling takes."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("method", [peft.Lora(targets=("all-linear",)), None], ids=["lora", "full"])
def test_a_joined_run_and_its_checkpoints_are_those_of_a_plain_one(method, tmp_path, not_compiled):
    def run(joined, folder, until=None):
        model = tiny_model(attention_dropout=0.0)
        if method is not None:
            mx.random.seed(3)
            peft.apply(model, method)
        settings = TrainSettings(
            steps=6, accumulation=2, ema_decay=0.9, weight_decay=0.1, learning_rate=3e-3, compile=joined
        )
        Trainer(model, WordLoss(), Rows(), settings, tmp_path / folder).run(resume=until is None, until=until)
        return weights_of(model)

    plain, joined = run(False, "plain"), run(True, "joined")
    assert all(np.allclose(array, plain[name], atol=1e-5) for name, array in joined.items())
    for part in ("parameters", "optimizer", "average"):
        one, other = (
            mx.load(str(tmp_path / folder / "checkpoints" / "step-00000006" / f"{part}.safetensors"))
            for folder in ("plain", "joined")
        )
        assert {name: array.shape for name, array in one.items()} == {n: a.shape for n, a in other.items()}
        assert all(np.allclose(array, one[name], atol=1e-5) for name, array in other.items())
    run(True, "halves", until=3)
    assert all(np.array_equal(array, joined[name]) for name, array in run(True, "halves").items())
    run(False, "other", until=3)  # a checkpoint doesn't say how the arrays were kept
    assert all(np.allclose(array, joined[name], atol=1e-5) for name, array in run(True, "other").items())


def operations_of_adamw(count, dtype, path):
    """How many operations an update of so many parameters compiles to."""
    parameters = {str(number): mx.zeros((4, 6), dtype=dtype) for number in range(count)}
    optimizer = Optimizer(TrainSettings(steps=9, weight_decay=0.1), parameters)
    states = [optimizer.state]
    step = mx.compile(optimizer.apply, inputs=states, outputs=states)
    gradients = {name: mx.ones((4, 6), dtype=mx.bfloat16) for name in parameters}
    mx.eval(parameters, gradients, states)
    updated = step(gradients, parameters, mx.array(True), mx.array(0.5))
    mx.export_to_dot(str(path), *updated.values(), *optimizer.arrays().values())
    return len(re.findall(r'label ="[^"]+"', path.read_text()))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_an_update_of_adamw_compiles_to_one_operation(dtype, tmp_path):
    two, five = (operations_of_adamw(count, dtype, tmp_path / "graph") for count in (2, 5))
    assert five - two == 3


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_the_norm_of_large_and_small_arrays_is_that_of_all(dtype, monkeypatch):
    monkeypatch.setattr(step, "JOINED", 200)
    given = [array.astype(dtype) for array in arrays().values()] + [mx.random.normal((300,)).astype(dtype)]
    expected = sum((np.array(array.astype(mx.float32), dtype=np.float64) ** 2).sum() for array in given)
    assert step._square_sum(given).item() == pytest.approx(expected, rel=1e-5)
    given[1] = given[1] * mx.inf  # the large matrix
    assert not np.isfinite(step._square_sum(given).item())


def test_what_may_be_joined_is_what_may_be_shared():
    # The name stands twice, since training without a mesh imports nothing of mlxlm.distributed.
    assert optimizers.ELEMENTWISE == parallel.ELEMENTWISE
