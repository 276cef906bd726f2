"""Train the model that comes with mlxlm by its recipe, quantize it, and measure what is shipped.

    python examples/pretrain_stdlib/ship.py --output runs/stdlib/shipped [--set training.steps=1600 ...]

Goes on where an interrupted run of the recipe stopped. OUTPUT gets the quantized checkpoint, and `measured.json`: the
held-out loss before and after quantizing, the loss curve and how long it took; a table of it is printed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlxlm
from mlxlm.checkpoint import write_json_atomic
from mlxlm.training import (
    Console,
    MetricsFile,
    Step,
    Trainer,
    TrainSettings,
    WordLoss,
    evaluate,
    read_metrics,
    recipe,
)  # fmt: skip
from mlxlm.training.yaml_files import parse_override

HERE = Path(__file__).parent
BITS, GROUP_SIZE = 8, 64
PROMPT = "def read_json(path):"


def train(trainer: Trainer) -> dict[str, Any]:
    """Run the recipe to its end; how it ended."""
    started = time.perf_counter()
    result = trainer.run(resume=True)
    if result.reason not in ("done", "early"):
        raise SystemExit(f"{result.reason} after step {result.step}; the same command goes on from there")
    seconds = round(time.perf_counter() - started, 1)
    return {
        "seconds": seconds, "steps": result.step, "tokens": result.tokens, "best_step": result.best_step,
        "held_out_loss": trainer.evaluate().loss,
    }  # fmt: skip


def quantize(trainer: Trainer, output: Path) -> float:
    """Save the trained model with its matrices in 8 bits; the held-out loss of what was saved."""
    from mlx import nn

    model, tokenizer = mlxlm.load(trainer.folder / "model", dtype="bfloat16")
    nn.quantize(model, group_size=GROUP_SIZE, bits=BITS)
    mlxlm.save(model, tokenizer, output)
    loaded, _ = mlxlm.load(output)
    return evaluate(Step(loaded, WordLoss(), TrainSettings(steps=1)), trainer.valid()).loss


def main() -> None:
    """Train, quantize, measure, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the quantized model")
    parser.add_argument("--config", type=Path, default=HERE / "recipe.yaml", help="default: the one beside this file")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    changes = [parse_override(text) for text in arguments.changes]
    checked = recipe.check(recipe.override(recipe.read(arguments.config), changes))
    trainer = checked.trainer([Console(), MetricsFile(checked.folder)], resume=True)
    measured = train(trainer)
    measured["held_out_loss_quantized"] = quantize(trainer, arguments.output)
    rows = read_metrics(checked.folder)
    measured["training_loss"] = {row["step"]: row["loss"] for row in rows if "loss" in row}
    measured["held_out_loss_by_step"] = {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}
    write_json_atomic(arguments.output / "measured.json", measured)
    print("| step | training loss | held-out loss |\n|---|---|---|")
    for step, loss in measured["held_out_loss_by_step"].items():
        print(f"| {step:,} | {measured['training_loss'].get(step, float('nan')):.3f} | {loss:.3f} |")
    print(json.dumps({name: value for name, value in measured.items() if not isinstance(value, dict)}))
    model, tokenizer = mlxlm.load(arguments.output)
    print(PROMPT + mlxlm.generate(model, tokenizer, PROMPT, max_tokens=80))


if __name__ == "__main__":
    main()
