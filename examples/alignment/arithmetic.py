"""Arithmetic with a reward that can be checked: a decoder that adds badly learns to add from right and wrong alone.

    python examples/alignment/arithmetic.py --output runs/arithmetic

A small decoder is taught sums for too short a time, so that about a third of its answers are right. Then GRPO (Shao et
al. 2024, arXiv:2402.03300) lets it try, and tells which of its answers were right; it is shown none. The prompts that
are measured are in neither.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import report
import small_model


def sums(most: int, seed: int) -> list[dict[str, str]]:
    """Every sum of two numbers below `most`, in an order drawn from the seed."""
    rows = [{"prompt": f"{a:02}+{b:02}=", "completion": f"{a + b:02}"} for a in range(most) for b in range(most)]
    random.Random(seed).shuffle(rows)
    return rows


def main(words: list[str] | None = None) -> None:
    """Teach, align, report.  words: of the command line, None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/arithmetic"), help="default runs/arithmetic")
    parser.add_argument("--method", default="grpo", choices=["grpo", "dr-grpo", "dapo", "ppo"])
    parser.add_argument("--epochs", type=int, default=15, help="of teaching, default 15")
    parser.add_argument("--iters", type=int, default=400, help="updates, default 400")
    parser.add_argument("--most", type=int, default=30, help="numbers are below it, default 30")
    parser.add_argument("--prompts", type=int, default=16, help="of an iteration, default 16, with 8 answers each")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    options = parser.parse_args(words)
    rows = sums(options.most, 0)
    held_out, rest = rows[: len(rows) // 5], rows[len(rows) // 5 :]
    taught = small_model.write(options.output / "taught", train=rest)
    small_model.taught(options.output, taught, epochs=options.epochs)
    asked = [[{"prompt": row["prompt"]} for row in part] for part in (rest, held_out)]
    data = small_model.write(options.output / "prompts", train=asked[0], valid=asked[1])
    report.align(
        options.output,
        {
            "method": options.method, "reward": "arithmetic", "model": str(options.output / "base"), "data": str(data),
            "fine_tune_type": "full", "iters": options.iters, "learning_rate": 5e-4, "schedule": "constant",
            "prompts_per_iteration": options.prompts, "answers_per_prompt": 8, "batch_size": 8 * options.prompts,
            "passes": 1, "max_tokens": 4, "beta": 0.01, "answers": len(held_out),
            "steps_per_eval": max(options.iters // 5, 1),
        },
        title="arithmetic: share of right answers to held-out sums",
        resume=options.resume,
    )  # fmt: skip


if __name__ == "__main__":
    main()
