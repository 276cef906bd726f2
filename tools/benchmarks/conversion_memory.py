"""Peak memory of converting a synthetic checkpoint of several gigabytes.

usage: python tools/benchmarks/conversion_memory.py [--gigabytes 4] [--shard-gigabytes 1] [--folder /tmp] [--kinds ...]

Writes a bfloat16 decoder with random weights in shards, converts it in a process of its own for each kind of result,
and prints the largest resident memory of each, what the process had before the conversion, and the bound: twice the
largest shard and 500 MB. Everything is deleted afterwards. Needs about twice the size on the disk.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

KINDS = ("hf", "mlx", "gguf-f16", "gguf-q8_0", "hf-from-bin")
DIM, HIDDEN, VOCABULARY = 2048, 5632, 32000


def config(layers: int) -> dict[str, object]:
    """config.json of a decoder with that many layers of 46 million weights."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": DIM,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_source(folder: Path, nbytes: int, shard_bytes: int) -> None:
    """The checkpoint, a tensor at a time."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlxlm.checkpoint import save_safetensors, write_json_atomic
    from mlxlm.models import Transformer, family_of
    from mlxlm.models.weights import to_hub

    values = config(max(1, round((nbytes / 2 - 2 * VOCABULARY * DIM) / (DIM * (DIM * 2.5 + 3 * HIDDEN)))))
    family = family_of(values)
    spec = family.read_config(values)
    rules = family.rules(spec, "hub")
    shapes = {name: array.shape for name, array in tree_flatten(Transformer(spec).parameters())}
    names = to_hub(rules, {name: mx.zeros(shape) for name, shape in shapes.items()})
    # Tensors of one shape have one content: it makes no difference here, and random numbers take long on a CPU.
    contents = {array.shape: 0.02 * mx.random.normal(array.shape).astype(mx.bfloat16) for array in names.values()}
    pairs = ((name, contents[array.shape]) for name, array in names.items())
    save_safetensors(folder, pairs, max_shard_bytes=shard_bytes)
    write_json_atomic(folder / "config.json", values)


def write_pytorch(source: Path, folder: Path) -> None:
    """The same as PyTorch files of the same shards. Needs torch and safetensors."""
    import torch
    from safetensors.torch import load_file

    folder.mkdir()
    shutil.copy(source / "config.json", folder)
    weight_map = {}
    for number, shard in enumerate(sorted(source.glob("*.safetensors"))):
        tensors = load_file(shard)
        torch.save(tensors, folder / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(tensors, f"pytorch_model-{number}.bin")
        del tensors
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def convert_here(source: str, output: str, kind: str) -> None:
    """Run one conversion in this process and print its peak memory as JSON."""
    import mlxlm  # noqa: F401  (before mlx.core)
    from mlxlm.conversion import GgufTarget, HubTarget, MlxTarget, Recipe, convert, quantization

    target = {
        "hf": HubTarget(dtype="float16"),
        "hf-from-bin": HubTarget(),
        "mlx": MlxTarget(recipe=Recipe(default=quantization(4))),
        "gguf-f16": GgufTarget(kind="F16"),
        "gguf-q8_0": GgufTarget(kind="Q8_0"),
    }[kind]
    before = peak()
    start = time.perf_counter()
    result = convert(source, output, target)
    seconds = time.perf_counter() - start
    print(json.dumps({"before": before, "peak": peak(), "seconds": seconds, "bytes": result.nbytes}))


def peak() -> int:
    """Largest resident memory of this process so far, bytes; pages of files that it has mapped count too."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent process had
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    """Measure, or with --run do one conversion."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--shard-gigabytes", type=float, default=1.0)
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary folder goes")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--run", nargs=3, metavar=("SOURCE", "OUTPUT", "KIND"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        convert_here(*options.run)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source = Path(folder) / "source"
        write_source(source, int(options.gigabytes * 1e9), int(options.shard_gigabytes * 1e9))
        sizes = [file.stat().st_size for file in source.glob("*.safetensors")]
        bound = 2 * max(sizes) + 500e6
        print(f"source {sum(sizes) / 1e9:.2f} GB in {len(sizes)} shards; bound {bound / 1e9:.2f} GB", flush=True)
        for kind in options.kinds:
            origin = source
            if kind == "hf-from-bin":
                origin = Path(folder) / "pytorch"
                write_pytorch(source, origin)
            output = Path(folder) / ("out.gguf" if kind.startswith("gguf") else "out")
            command = [sys.executable, __file__, "--run", str(origin), str(output), kind]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            verdict = "within" if found["peak"] <= bound else "ABOVE"
            print(
                f"{kind}: peak {found['peak'] / 1e9:.2f} GB ({found['before'] / 1e9:.2f} GB before), {verdict} the "
                f"bound; {found['bytes'] / 1e9:.2f} GB written in {found['seconds']:.0f} s",
                flush=True,
            )
            shutil.rmtree(output) if output.is_dir() else output.unlink()


if __name__ == "__main__":
    main()
