"""Time to first token, prefill, decode and batch speed and memory, against mlx-lm, in one run on one machine.

usage: python tools/benchmarks/generation.py --shape 1b [--bits 4] [--variants] [--repeats 3]
       python tools/benchmarks/generation.py CHECKPOINT        a Hugging Face directory or GGUF file of a decoder

--shape: random weights of that shape (1b: 16 layers, 2048 wide, 128,256 words; 135m; tiny), in the dtype of --dtype
(default bfloat16, float32 on the CPU), or --bits 4 or 8 quantized in groups of 64.  --variants: our decoding steps in
every form beside each other (or only those given, as "joined=0 compiled=pieces,ahead=2"), to choose the default by.
--only ours: without mlx-lm.  --prompts: lengths for the prefill.  --batch: rows of the batch, 0 for none.

Every figure is the median over fresh processes, taken in turn. In each process everything runs once unmeasured first,
so that kernels are compiled. Decode rates count tokens after the first, batch rates all tokens and all seconds. On
Linux both programs get the same BLAS.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152, "rope_theta": 100000.0},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 512, "rope_theta": 10000.0},
}  # fmt: skip
VARIANTS = [
    "joined=0,compiled=no,ahead=1",
    "joined=1,compiled=no,ahead=1",
    "joined=1,compiled=no,ahead=4",
    "joined=1,compiled=pieces,ahead=1",
    "joined=1,compiled=pieces,ahead=2",
    "joined=1,compiled=pieces,ahead=8",
    "joined=1,compiled=whole,ahead=1",
    "joined=1,compiled=whole,ahead=8",
]


def hub_config(shape: str) -> dict[str, Any]:
    """The config.json of a shape."""
    rest = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "hidden_act": "silu",
            "max_position_embeddings": 131072, "tie_word_embeddings": True, "attention_bias": False,
            "mlp_bias": False}  # fmt: skip
    return {**SHAPES[shape], **rest}


def prepared(model: Any, dtype: str, bits: int) -> Any:
    """The model with random weights in a dtype, quantized when bits is not 0."""
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_map

    kind = getattr(mx, dtype)
    model.update(tree_map(lambda a: a.astype(kind) if mx.issubdtype(a.dtype, mx.floating) else a, model.parameters()))
    if bits:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    model.eval()
    return model


def tokens_of(count: int, words: int, seed: int = 0) -> list[int]:
    """Random token ids."""
    import numpy as np

    return np.random.default_rng(seed).integers(5, words, count).tolist()


class Ours:
    """This package."""

    def __init__(self, options: dict[str, Any]):
        import mlxlm
        from mlxlm.models import Transformer
        from mlxlm.models.families import family_of

        if options["checkpoint"]:
            self.model, _ = mlxlm.load(options["checkpoint"], dtype=options["dtype"])
        else:
            config = family_of(hub_config(options["shape"])).read_config(hub_config(options["shape"]))
            self.model = prepared(Transformer(config), options["dtype"], options["bits"])
        self.words = self.model.config.embeddings.vocab_size

    def stream(self, prompt: list[int], count: int) -> Any:
        """Greedy tokens one after another."""
        from mlxlm.generation.decoding import decode
        from mlxlm.generation.sampling import Sampling
        from mlxlm.generation.stepping import decoding_cache

        cache = decoding_cache(self.model)
        return decode(self.model, prompt, cache, Sampling().sampler(prompt, self.words), count)

    def batch(self, prompts: list[list[int]], count: int) -> int:
        """Tokens made for all prompts together."""
        from mlxlm.generation.batching import generate_tokens

        found = generate_tokens(self.model, prompts, max_tokens=count, batch_size=len(prompts))
        return sum(len(one.tokens) for one in found)


class Theirs:
    """mlx-lm."""

    def __init__(self, options: dict[str, Any]):
        if options["checkpoint"]:
            import mlx_lm

            self.model, _ = mlx_lm.load(options["checkpoint"])
        else:
            from mlx_lm.models import llama

            arguments = llama.ModelArgs.from_dict(hub_config(options["shape"]))
            self.model = prepared(llama.Model(arguments), options["dtype"], options["bits"])
        self.words = self.model.args.vocab_size

    def stream(self, prompt: list[int], count: int) -> Any:
        """See `Ours.stream`."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        return (token for token, _ in generate_step(mx.array(prompt), self.model, max_tokens=count))

    def batch(self, prompts: list[list[int]], count: int) -> int:
        """See `Ours.batch`."""
        from mlx_lm.generate import BatchGenerator

        generator = BatchGenerator(
            self.model, max_tokens=count, completion_batch_size=len(prompts), prefill_batch_size=len(prompts)
        )
        generator.insert(prompts, [count] * len(prompts))
        made = 0
        while responses := generator.next_generated():
            made += len(responses)
        generator.close()
        return made


# What only looks at memory in another way.
VIEWS = ("Broadcast", "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze",
         "StopGradient", "Transpose", "Unflatten")  # fmt: skip


def operations(side: Any, prompts: list[list[int]]) -> int:
    """How many operations, views left out, a step of a batch hands to MLX: its host's work is about their number."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    launched: list[int] = []
    hand_over = mx.async_eval

    def counting(*arrays: Any) -> None:
        with tempfile.NamedTemporaryFile("r", suffix=".dot") as file:
            mx.export_to_dot(file.name, *(array for _, array in tree_flatten(list(arrays))))
            names = re.findall(r'label ?="([^"]+)", shape=rectangle', file.read())
        launched.append(sum(name not in VIEWS for name in names))
        hand_over(*arrays)

    mx.async_eval = counting
    try:
        side.batch(prompts, 8)
    finally:
        mx.async_eval = hand_over
    return launched[-3]  # of the last steps some are cut short


def measure(options: dict[str, Any]) -> dict[str, float]:
    """All figures of one program in this process."""
    side = (Ours if options["side"] == "ours" else Theirs)(options)
    import mlx.core as mx

    figures: dict[str, float] = {}

    def streamed(length: int, count: int, seed: int) -> tuple[float, float]:
        """Seconds to the first token, and tokens a second after it."""
        prompt = tokens_of(length, side.words, seed)
        start = time.perf_counter()
        times = [time.perf_counter() for _ in side.stream(prompt, count)]
        return times[0] - start, (len(times) - 1) / max(times[-1] - times[0], 1e-9)

    for length in options["prompts"]:
        streamed(length, 2, 1)
        first = min(streamed(length, 1, seed)[0] for seed in (2, 3))
        figures[f"first token after {length}, ms"] = 1e3 * first
        figures[f"prefill {length}, tokens/s"] = length / first
    streamed(options["decode_prompt"], options["tokens"], 4)
    mx.reset_peak_memory()
    figures["decode, tokens/s"] = max(streamed(options["decode_prompt"], options["tokens"], s)[1] for s in (5, 6))
    figures["decode, peak GB"] = mx.get_peak_memory() / 1e9
    if options["batch"]:
        for name, spread in (("equal", 0), ("ragged", options["decode_prompt"] // 2)):
            lengths = [options["decode_prompt"] - spread * row // options["batch"] for row in range(options["batch"])]
            prompts = [tokens_of(length, side.words, row) for row, length in enumerate(lengths)]
            figures[f"batch {options['batch']} {name}, operations a step"] = operations(side, prompts)
            mx.reset_peak_memory()
            start = time.perf_counter()
            made = side.batch(prompts, options["batch_tokens"])
            figures[f"batch {options['batch']} {name}, tokens/s"] = made / (time.perf_counter() - start)
            figures[f"batch {options['batch']} {name}, peak GB"] = mx.get_peak_memory() / 1e9
    return figures


def child(options: dict[str, Any], environment: dict[str, str]) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--child", json.dumps(options)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{options['side']} {environment.get('MLXLM_DECODE', '')} failed:\n{result.stderr[-3000:]}")
    return json.loads(result.stdout.strip().split("\n")[-1])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="")
    parser.add_argument("--shape", choices=SHAPES, default=None)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--bits", type=int, default=0)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512])
    parser.add_argument("--decode-prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=128)
    parser.add_argument("--variants", nargs="*", default=None)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("ours", "theirs"), default=None)
    parser.add_argument("--json", default=None, help="also write all figures there")
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(json.loads(arguments.child))))
        return
    if bool(arguments.checkpoint) == bool(arguments.shape):
        parser.error("give a checkpoint or --shape")
    report(arguments)


def report(arguments: argparse.Namespace) -> None:
    """Measure all sides in turn and print medians."""
    import mlxlm
    from mlxlm import runtime

    options = {key: value for key, value in vars(arguments).items() if key not in ("variants", "child", "json")}
    options["dtype"] = arguments.dtype or ("float32" if runtime.backend() == "cpu" else "bfloat16")
    root = str(Path(mlxlm.__file__).parent.parent)
    ours = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    theirs, blas = dict(os.environ), runtime.load_blas()
    if blas.status == "loaded" and blas.name:
        theirs["LD_PRELOAD"] = blas.name
    sides: dict[str, tuple[str, dict[str, str]]] = {}
    if arguments.only != "theirs":
        if arguments.variants is None:
            sides["mlxlm"] = ("ours", ours)
        for text in (arguments.variants or VARIANTS) if arguments.variants is not None else ():
            sides[text] = ("ours", {**ours, "MLXLM_DECODE": text})
    if arguments.only != "ours" and importlib.util.find_spec("mlx_lm") is not None:
        sides["mlx-lm"] = ("theirs", theirs)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        if options["checkpoint"].endswith(".gguf"):
            options["checkpoint"] = _as_directory(options["checkpoint"], options["dtype"], folder)
        for number in range(arguments.repeats):
            for name, (side, environment) in sides.items():
                for figure, value in child({**options, "side": side}, environment).items():
                    found[name].setdefault(figure, []).append(value)
                print(f"{number + 1}/{arguments.repeats} {name}", file=sys.stderr)
    medians = {name: {key: statistics.median(values) for key, values in all_.items()} for name, all_ in found.items()}
    _print(arguments, options, medians)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"options": options, "medians": medians, "all": found}, indent=1))


def _as_directory(path: str, dtype: str, folder: str) -> str:
    """A GGUF file as a directory that both programs read."""
    import mlxlm

    model, tokenizer = mlxlm.load(path, dtype=dtype, quantized=False)
    mlxlm.save(model, tokenizer, Path(folder) / "model")
    return str(Path(folder) / "model")


def _print(arguments: argparse.Namespace, options: dict[str, Any], medians: dict[str, dict[str, float]]) -> None:
    import mlx.core as mx

    kind = f"{options['bits']} bits" if options["bits"] else options["dtype"]
    print(f"{arguments.shape or arguments.checkpoint}, {kind}, MLX {mx.__version__}, {mx.default_device()}")
    print(f"median of {arguments.repeats} processes; decode {arguments.tokens} after {arguments.decode_prompt} tokens")
    rival = medians.get("mlx-lm")
    for name, figures in medians.items():
        print(f"\n{name}")
        for figure, value in figures.items():
            ratio = f"{value / rival[figure]:8.2f}" if rival and rival is not figures and rival.get(figure) else ""
            print(f"  {figure:34}{value:12.2f}{ratio}")


if __name__ == "__main__":
    main()
