"""Arithmetic with a reward that can be checked: a decoder that adds badly learns to add from right and wrong alone.

    python examples/alignment/arithmetic.py --output runs/arithmetic

A small decoder is taught sums for too short a time, so that about a third of its answers are right. Then GRPO (Shao et
al. 2024, arXiv:2402.03300) lets it try, and tells which of its answers were right; it is shown none. The sums that are
measured (a fifth) are in neither; those by which the teaching ends and the best weights are told are others again.
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
    parser.add_argument("--loss", type=float, default=0.5, help="of a token at which teaching ends, default 0.5")
    parser.add_argument("--iters", type=int, default=1000, help="updates, default 1000")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="default 5e-4")
    parser.add_argument("--most", type=int, default=50, help="numbers are below it, default 50")
    parser.add_argument("--seed", type=int, default=0, help="of weights, sums and answers, default 0")
    parser.add_argument("--prompts", type=int, default=16, help="of an iteration, default 16, with 8 answers each")
    parser.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    options = parser.parse_args(words)
    rows = sums(options.most, options.seed)
    fifth, tenth = len(rows) // 5, len(rows) // 10
    test, valid, train = rows[:fifth], rows[fifth : fifth + tenth], rows[fifth + tenth :]
    taught = small_model.write(options.output / "taught", train=train, valid=valid)
    small_model.taught_to(options.output, taught, options.loss, seed=options.seed)
    data = small_model.write(
        options.output / "prompts",
        **{
            name: [{"prompt": row["prompt"]} for row in part]
            for name, part in (("train", train), ("valid", valid), ("test", test))
        },
    )
    report.align(
        options.output,
        {
            "method": options.method, "reward": "arithmetic", "model": str(options.output / "base"), "data": str(data),
            "fine_tune_type": "full", "iters": options.iters, "learning_rate": options.learning_rate,
            "schedule": "constant", "prompts_per_iteration": options.prompts, "answers_per_prompt": 8,
            "batch_size": 8 * options.prompts, "passes": 1, "max_tokens": 3, "beta": 0.01, "answers": len(test),
            "steps_per_eval": max(options.iters // 10, 1), "seed": options.seed,
        },
        title="arithmetic: share of right answers to held-out sums",
        resume=options.resume,
    )  # fmt: skip


if __name__ == "__main__":
    main()
