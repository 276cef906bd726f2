"""How many kernels a compiled training step takes, a layer and once, ours and mlx-lm's; needs no GPU.

usage: python tools/benchmarks/operations.py [--mode lora full] [--recompute] [--masters] [--list]

A step is bound by its host where it has many short kernels: MLX's CUDA backend takes about 10 us to encode one. The
step is traced for models of two and of three layers as if for a GPU; the difference is what a layer takes. Widths are
tiny, the counts depend on layers alone. What is one kernel on a GPU but several operations on a CPU (RMS norm, rotary
positions, attention) is replaced by stand-ins of as many operations. Views count nothing, a concatenation as many as
its parts. Fused kernels of different texts are each compiled once, in 2 to 3 seconds: `texts`.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import mlxlm  # noqa: F401  before mlx
from mlxlm import runtime

runtime.backend = lambda: "cuda"  # before any other module takes it over

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402

VIEWS = {"Broadcast", "BroadcastAxes", "Copy", "CustomTransforms", "Depends", "ExpandDims", "Flatten", "Reshape",
         "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten"}  # fmt: skip
DIM, LENGTH, WORDS = 256, 64, 512


def config(layers: int) -> dict[str, Any]:
    """The config.json of a small model of that many layers."""
    return {"model_type": "llama", "hidden_size": DIM, "num_hidden_layers": layers, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": DIM // 4, "intermediate_size": 4 * DIM, "vocab_size": WORDS,
            "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True, "max_position_embeddings": 4096,
            "hidden_act": "silu"}  # fmt: skip


def rms_norm(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    """One operation; two more than one for the gradients of both, as on CUDA in 16 bits."""

    @mx.custom_function
    def run(x: mx.array, weight: mx.array) -> mx.array:
        return mx.depends([mx.sort(x)], [weight])[0]

    @run.vjp
    def run_vjp(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        of_x = mx.cumsum(mx.depends([cotangent], list(primals))[0], -1)
        return of_x, mx.exp(of_x.reshape(-1, x.shape[-1]).sum(0).reshape(1, -1)).reshape(-1)

    if weight is not None:
        return run(x, weight)
    return rms_norm_alone(x)


@mx.custom_function
def rms_norm_alone(x: mx.array) -> mx.array:
    """One operation, and one for its gradient."""
    return mx.sort(x)


@rms_norm_alone.vjp
def _(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    return mx.cumsum(mx.depends([cotangent], [x])[0], -1)


def rope(x: mx.array, dims: int, **settings: Any) -> mx.array:
    """One operation, and one for its gradient."""

    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return mx.cumprod(x, -1)

    @run.vjp
    def run_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return mx.cumprod(cotangent, -1)

    return run(x)


@mx.custom_function
def _attention(query: mx.array, key: mx.array, value: mx.array) -> mx.array:
    return mx.cummin(mx.depends([query], [key, value])[0], -1)


@_attention.vjp
def _(primals: Any, cotangent: mx.array, output: mx.array) -> Any:
    whole = mx.cummin(mx.depends([cotangent], [*primals, output])[0], -1)
    return whole, *(mx.stop_gradient(whole)[:, : array.shape[1]] for array in primals[1:])


def attention(query: mx.array, key: mx.array, value: mx.array, **settings: Any) -> mx.array:
    """One operation, and one for all gradients."""
    return _attention(query, key, value)


def operations(outputs: list[mx.array]) -> Counter[str]:
    """Of the graph of these arrays: operations that are kernels, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph"
        mx.export_to_dot(str(path), *outputs)
        text = path.read_text()
    found = Counter(name for name in re.findall(r'label ="([^"]+)"', text) if name not in VIEWS)
    for node in re.findall(r'\{ (\d+) \[label ="Concatenate"', text):
        found["Concatenate"] += len(re.findall(rf"-> {node}\b", text)) - 1
    return found


def ours(layers: int, mode: str, recompute: bool, masters: bool) -> Counter[str]:
    """Operations of our step."""
    from mlxlm import peft
    from mlxlm.models import Transformer, family_of
    from mlxlm.training import TrainSettings, WordLoss, step

    if mode == "full":
        step.JOINED = 2 * DIM  # a real model's matrices are larger than what is joined
    step.square_sums = lambda array: array.sum().reshape(1)  # one kernel on CUDA
    values = config(layers)
    model = Transformer(family_of(values).read_config(values))
    model.set_dtype(mx.bfloat16)
    if mode == "lora":
        peft.apply(model, peft.Lora(targets=("all-linear",)))
    settings = TrainSettings(steps=9, dtype="bfloat16", master_weights=masters, clip_norm=None, compile=True,
                             recompute_layers=-1 if recompute else 0)  # fmt: skip
    function = step.Step(model, WordLoss(), settings)
    mx.eval(model.parameters(), function.state)
    tokens = np.arange(LENGTH + 1, dtype=np.int32)[None]
    outcome = function([{"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}], 1e-5)
    return operations([array for _, array in tree_flatten([function.state, vars(outcome)])])


def theirs(layers: int, mode: str, recompute: bool, masters: bool) -> Counter[str]:
    """Operations of mlx-lm's step, which its trainer has inside."""
    import mlx.optimizers as optim
    from mlx import nn
    from mlx_lm.models import llama
    from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = llama.Model(llama.ModelArgs.from_dict(config(layers)))
    model.update(tree_map(lambda array: array.astype(mx.bfloat16), model.parameters()))
    if mode == "lora":
        model.freeze()
        linear_to_lora_layers(model, layers, {"rank": 8, "scale": 20.0, "dropout": 0.0})
    plain = llama.TransformerBlock.__call__
    if recompute:
        grad_checkpoint(model.layers[0])  # of the class, so it is taken back below
    model.train()
    optimizer = optim.AdamW(learning_rate=1e-5)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state, mx.random.state]
    mx.eval(state, model.parameters())
    loss_and_gradients = nn.value_and_grad(model, default_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def step(batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
        (loss, count), gradients = loss_and_gradients(model, batch, lengths)
        optimizer.update(model, gradients)
        return loss, count

    outputs = step(mx.zeros((1, LENGTH + 1), mx.int32), mx.array([[0, LENGTH + 1]]))
    llama.TransformerBlock.__call__ = plain
    return operations([array for _, array in tree_flatten([state, outputs]) if isinstance(array, mx.array)])


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", nargs="+", choices=("lora", "full"), default=["lora", "full"])
    parser.add_argument("--recompute", action="store_true", help="all layers are computed again for their gradients")
    parser.add_argument("--masters", action="store_true", help="ours keeps float32 master weights")
    parser.add_argument("--list", action="store_true", help="name the operations of a layer")
    arguments = parser.parse_args()
    mx.fast.rms_norm, mx.fast.rope, mx.fast.scaled_dot_product_attention = rms_norm, rope, attention
    print(f"{'':8}{'':10}{'a layer':>10}{'once':>8}{'16 layers':>12}{'texts':>8}")
    for mode in arguments.mode:
        for name, count in (("mlxlm", ours), ("mlx-lm", theirs)):
            if name == "mlx-lm" and importlib.util.find_spec("mlx_lm") is None:
                continue
            two, three = (count(layers, mode, arguments.recompute, arguments.masters) for layers in (2, 3))
            layer = sum(three.values()) - sum(two.values())
            once = sum(two.values()) - 2 * layer
            texts = sum(operation.startswith("Compiled") for operation in three)
            print(f"{mode:8}{name:10}{layer:10}{once:8}{once + 16 * layer:12}{texts:8}", flush=True)
            three.subtract(two)
            for operation, number in three.most_common() if arguments.list else ():
                if number:
                    print(f"{'':18}{number:10}  {operation[:90]}")


if __name__ == "__main__":
    main()
