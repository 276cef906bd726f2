"""Record what transformers generates with the parity fixtures, for tests/generation/test_beam.py and test_seq2seq.py.

usage: python tools/make_generation_goldens.py        (needs the `parity` extra)

Writes tests/fixtures/goldens/generation.json: rows of a fixture, prompts, options and the answers, each with tokens and
(for beams) the score.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
import transformers

TESTS = Path(__file__).parent.parent / "tests"
FIXTURES = TESTS / "fixtures" / "models"
TOKENS = 12
# Several tokens end an answer, so that tiny random models finish answers of every length.
STOPS = [1, 5, 9, 14, 22, 31, 40]
FIXTURE_NAMES = ("t5", "umt5", "llama", "gpt2", "qwen3")


def load(name: str) -> Any:
    """The fixture as the transformers class that its config names."""
    values = json.loads((FIXTURES / name / "config.json").read_text())
    return (
        getattr(transformers, values["architectures"][0])
        .from_pretrained(FIXTURES / name, dtype=torch.float32, attn_implementation="eager")
        .eval()
    )


def prompts(name: str, vocab_size: int) -> list[list[int]]:
    """Two prompts of different length."""
    generator = torch.Generator().manual_seed(len(name))
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in (11, 6)]


def answers(model: Any, rows: list[list[int]], options: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """What `generate` gives for each prompt; those of an encoder-decoder are padded and go together."""
    batches = [rows] if model.config.is_encoder_decoder else [[row] for row in rows]
    result = []
    for batch in batches:
        longest = max(map(len, batch))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in batch])
        with torch.no_grad():
            output = model.generate(
                tokens,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=TOKENS,
                eos_token_id=STOPS,
                pad_token_id=0,
                use_cache=False,  # it is made for as many decoder as encoder layers
                return_dict_in_generate=True,
                output_scores=True,
                **options,
            )
        start = 1 if model.config.is_encoder_decoder else longest
        count = options.get("num_return_sequences", 1)
        found = []
        for index, sequence in enumerate(output.sequences[:, start:].tolist()):
            end = next((i + 1 for i, token in enumerate(sequence) if token in STOPS), TOKENS)
            found.append({"tokens": sequence[:end]})
            if "num_beams" in options:
                found[-1]["score"] = round(output.sequences_scores[index].item(), 6)
        result += [found[i : i + count] for i in range(0, len(found), count)]
    return result


def record(name: str) -> list[dict[str, Any]]:
    """Greedy answers and beams with every kind of early stopping, each for both prompts."""
    model = load(name)
    rows = prompts(name, model.config.vocab_size)
    options: list[dict[str, Any]] = [{}]
    options += [
        {"num_beams": beams, "num_return_sequences": count, "length_penalty": penalty, "early_stopping": early}
        for (beams, count), penalty, early in itertools.product(
            [(3, 3), (5, 2)], [1.0, -0.2, 2.5, 0.0], [False, True, "never"]
        )
    ]
    return [{"fixture": name, "prompts": rows, "options": one, "answers": answers(model, rows, one)} for one in options]


if __name__ == "__main__":
    rows = [row for name in FIXTURE_NAMES for row in record(name)]
    golden = {"transformers": transformers.__version__, "max_tokens": TOKENS, "stops": STOPS, "rows": rows}
    (TESTS / "fixtures" / "goldens" / "generation.json").write_text(json.dumps(golden) + "\n")
    lengths = sorted({len(one["tokens"]) for row in rows for answer in row["answers"] for one in answer})
    print(f"{len(rows)} rows, answers of {lengths} tokens")
