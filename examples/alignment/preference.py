"""A preference for kind words: DPO on pairs of opinions, of which one is good and one is bad.

    python examples/alignment/preference.py --output runs/preference

A small decoder is taught to give opinions, good and bad ones alike. Then DPO (Rafailov et al. 2023, arXiv:2305.18290)
learns from pairs that the good one is preferred. No single word tells them apart: "not bad" is good. The pairs that are
measured are held out, those by which the best weights are told are others again, and a verifier reads what the model
itself says.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import report
import small_model

THINGS = "film hotel book train meal song city game house teacher garden coat".split()
GOOD = "good lovely fine great nice kind".split()
BAD = "bad awful dull ugly poor sad".split()
FORMS = ("it was {}.", "i found it {}.", "it is really {}.", "what a {} one!")
NEGATED = ("it was not {}.", "i never found it {}.", "it is not really {}.")


def opinion(rng: random.Random, kind: bool) -> str:
    """An opinion, a kind one or not."""
    negated = rng.random() < 0.5
    word = rng.choice(GOOD if kind != negated else BAD)
    return rng.choice(NEGATED if negated else FORMS).format(word)


def is_kind(text: str) -> bool | None:
    """Whether an opinion is kind, None for what is none."""
    words = re.findall("[a-z]+", text)
    found = [word for word in words if word in GOOD + BAD]
    if len(found) != 1:
        return None
    return (found[0] in GOOD) != ("not" in words or "never" in words)


def kindness(answers: Sequence[Any]) -> list[float]:
    """A reward: 1 for a kind opinion, else 0."""
    return [float(is_kind(one.answer) is True) for one in answers]


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    """Different pairs of a kind and an unkind opinion of a thing."""
    rng = random.Random(seed)
    found: dict[tuple[str, str, str], None] = {}
    while len(found) < count:
        found[f"the {rng.choice(THINGS)}: ", opinion(rng, True), opinion(rng, False)] = None
    return [{"prompt": prompt, "chosen": good, "rejected": bad} for prompt, good, bad in found]


def main(words: list[str] | None = None) -> None:
    """Teach, align, report.  words: of the command line, None for the process's own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/preference"), help="default runs/preference")
    parser.add_argument("--method", default="dpo", choices=["dpo", "ipo", "simpo", "orpo"])
    parser.add_argument("--rows", type=int, default=900, help="pairs, default 900; a third is held out")
    parser.add_argument("--epochs", type=int, default=30, help="of teaching, default 30")
    parser.add_argument("--iters", type=int, default=140, help="updates, default 140")
    options = parser.parse_args(words)
    rows = pairs(options.rows, 0)
    ninth = len(rows) // 9
    test, valid, train = rows[: 2 * ninth], rows[2 * ninth : 3 * ninth], rows[3 * ninth :]
    rng = random.Random(1)
    spoken = [{"prompt": row["prompt"], "completion": opinion(rng, rng.random() < 0.5)} for row in train]
    small_model.taught(
        options.output, small_model.write(options.output / "taught", train=spoken), epochs=options.epochs
    )
    data = small_model.write(options.output / "pairs", train=train, valid=valid, test=test)
    report.align(
        options.output,
        {
            "method": options.method, "model": str(options.output / "base"), "data": str(data),
            "reward": "preference:kindness", "fine_tune_type": "full", "iters": options.iters, "batch_size": 16,
            "learning_rate": 3e-4, "beta": 1.0, "max_tokens": 28, "answers": min(64, len(valid)),
            "steps_per_eval": max(options.iters // 6, 1),
        },
        title="preference: share of held-out pairs whose kind opinion is preferred",
    )  # fmt: skip


if __name__ == "__main__":
    main()
