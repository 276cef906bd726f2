"""What a finished run has learned of what its objective hides: masked words, spans, blanks or the next token.

    python examples/what_it_learned.py runs/tiny/bert [--batches 20] [--show 8]

Hides tokens of the run's validation texts as in training and prints how many the model finds (its likeliest token is
the right one, the right one is among the likeliest five), beside always guessing the most frequent token; then how many
when it is told that an end or a sentinel is no answer, as the other guess is; then some of them.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

import mlxlm
from mlxlm.objectives.words import unusable
from mlxlm.training import recipe

NOT_GIVEN = ("tokens", "targets", "next_sentence_labels")


def main() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--batches", type=int, default=20, help="of the validation texts, default 20")
    parser.add_argument("--show", type=int, default=8, help="examples to print, default 8")
    arguments = parser.parse_args()
    import mlx.core as mx

    if not (arguments.run / "model").exists():
        parser.error(f"{arguments.run} holds no finished run; mlxlm pretrain --resume --output {arguments.run} goes on")
    model, tokenizer = mlxlm.load(arguments.run / "model")
    source = recipe.check(recipe.read(arguments.run / "recipe.yaml")).trainer(resume=True).valid()
    marks = sorted(unusable(tokenizer))  # sentinels, ends and the like are no words
    answers: Counter[int] = Counter()
    rng = np.random.default_rng(0)

    def text(ids: Iterable[int]) -> str:
        return tokenizer.decode([int(id) for id in ids], skip_special_tokens=False)

    found, among, told, shown = 0, 0, 0, []
    for _ in range(arguments.batches):
        batch = source.next()
        if batch is None:
            break
        given = {name: mx.array(array) for name, array in batch.items() if name not in NOT_GIVEN}
        logits = model(mx.array(batch["tokens"]), **given)
        best = np.array(mx.argpartition(-logits, 5, axis=-1)[..., :5])
        first = np.array(logits.argmax(-1))
        hidden = (batch["targets"] != -100) & ~np.isin(batch["targets"], marks)
        answers.update(batch["targets"][hidden].tolist())
        words = np.array(logits.astype(mx.float32))
        words[..., marks] = -np.inf
        told += int((words.argmax(-1) == batch["targets"])[hidden].sum())
        found += int((first == batch["targets"])[hidden].sum())
        among += int((best == batch["targets"][..., None]).any(-1)[hidden].sum())
        read = batch.get("decoder_tokens", batch["tokens"])
        row, place = rng.choice(np.argwhere(hidden))
        before = text(read[row, max(0, place - 12) : place + 1])
        shown.append(
            f"{before[-50:]!r:56} -> {text([first[row, place]])!r:14} {text([batch['targets'][row, place]])!r}"
        )
    total = answers.total()
    print(f"{total:,} hidden tokens: {found / total:.1%} found, {among / total:.1%} among five; "
          f"always guessing the most frequent: {answers.most_common(1)[0][1] / total:.1%}; "
          f"told that it is a word: {told / total:.1%} found")  # fmt: skip
    print("before -> found, right", *shown[: arguments.show], sep="\n")


if __name__ == "__main__":
    main()
