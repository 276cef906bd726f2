"""Length control: PPO with a value head teaches a decoder to write as many words as it was asked for.

    python examples/alignment/length.py --output runs/length

A small decoder is taught to write one to six words, whatever it is asked. The reward is a Python function that counts
them. PPO (Schulman et al. 2017, arXiv:1707.06347; Ouyang et al. 2022, arXiv:2203.02155) raises it, and the price of
divergence is steered so that answers stay near the divergence that is allowed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import small_model

WORDS = "red blue old new big sun sea day".split()
MOST = 6


def reward(answers: Sequence[Any]) -> list[float]:
    """1 for as many words as were asked for, a third less for each word too many or too few, at least 0."""
    return [
        max(0.0, 1 - abs(len(one.answer.split()) - int(one.prompt.split()[-2])) / 3) * one.finished for one in answers
    ]


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Prompts that ask for a number of words, answered by any number of them."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        prompt = f"{rng.choice(WORDS)} {rng.choice(WORDS)}: {rng.randint(1, MOST)} words"
        made.append({"prompt": f"{prompt}", "completion": " " + " ".join(rng.choices(WORDS, k=rng.randint(1, MOST)))})
    return made


def main(words: list[str] | None = None) -> None:
    """Teach, align, report.  words: of the command line, None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/length"), help="default runs/length")
    parser.add_argument("--method", default="ppo", choices=["ppo", "grpo", "dr-grpo", "dapo"])
    parser.add_argument("--epochs", type=int, default=6, help="of teaching, default 6")
    parser.add_argument("--iters", type=int, default=320, help="updates, default 320")
    parser.add_argument("--prompts", type=int, default=64, help="of an iteration, default 64")
    parser.add_argument("--kl-target", type=float, default=4.0, help="nats an answer, default 4")
    options = parser.parse_args(words)
    taught = small_model.write(
        options.output / "taught", train=[row for row in rows(1300, 0) if hash_of(row["prompt"]) > 1]
    )
    small_model.taught(options.output, taught, epochs=options.epochs)
    # The prompts that are measured are of pairs of words that no training prompt has; the best weights are told by
    # others again.
    asked: dict[str, list[dict[str, str]]] = {"test": [], "valid": [], "train": []}
    for prompt in sorted({row["prompt"] for row in rows(2000, 1)}):
        split = {0: "test", 1: "valid"}.get(hash_of(prompt), "train")
        asked[split].append({"prompt": prompt})
    data = small_model.write(options.output / "prompts", **asked)
    report.align(
        options.output,
        {
            "method": options.method, "model": str(options.output / "base"), "data": str(data),
            "reward": "length:reward", "fine_tune_type": "full", "iters": options.iters, "learning_rate": 1e-3,
            "schedule": "constant", "prompts_per_iteration": options.prompts, "batch_size": options.prompts,
            "answers_per_prompt": 4, "passes": 2,
            "max_tokens": 32, "beta": 0.05, "kl_target": options.kl_target, "answers": 100,
            "steps_per_eval": max(options.iters // 10, 1),
        },
        title="length: reward for as many words as were asked for",
    )  # fmt: skip


def hash_of(prompt: str) -> int:
    """A number from 0 to 4 that depends on the pair of words in a prompt alone."""
    return sum(map(ord, prompt.split(":")[0])) % 5


if __name__ == "__main__":
    main()
