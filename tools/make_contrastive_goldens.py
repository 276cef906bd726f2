"""Record contrastive search over transformers' hidden states in float64, for tests/generation/test_contrastive.py.

usage: python tools/make_contrastive_goldens.py        (needs the `parity` extra)

The search is written out here after Su et al. 2022 (arXiv:2202.06417, equation 5), in numpy and without a cache: every
candidate is a forward pass of its own over the whole text. Writes tests/fixtures/goldens/contrastive.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TESTS = Path(__file__).parent.parent / "tests"
FIXTURES = TESTS / "fixtures" / "models"
NAMES = ("llama", "gpt2", "gemma2", "gemma3", "mistral", "qwen3", "bloom", "falcon", "phi", "gpt_neox", "mpt", "gptj",
         "t5", "umt5")  # fmt: skip
TOKENS = 14
OPTIONS = ((0.6, 4), (0.3, 7), (0.9, 3), (1.0, 5))


def states(model: Any, prompt: list[int], answer: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Hidden states (n, D) of all that the decoder reads, and logits (V,) of what follows, float64."""
    if model.config.is_encoder_decoder:
        start = model.config.decoder_start_token_id
        given = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[start, *answer]])}
    else:
        given = {"input_ids": torch.tensor([[*prompt, *answer]])}
    with torch.no_grad():
        out = model(**given, output_hidden_states=True, use_cache=False)
    hidden = out.decoder_hidden_states if model.config.is_encoder_decoder else out.hidden_states
    return hidden[-1][0].numpy(), out.logits[0, -1].numpy()


def search(model: Any, prompt: list[int], alpha: float, k: int) -> tuple[list[int], float]:
    """The answer, and by how much the closest of its decisions was made."""
    answer: list[int] = []
    closest = np.inf
    for _ in range(TOKENS):
        _, logits = states(model, prompt, answer)
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        order = np.argsort(-shares)
        closest = min(closest, shares[order[k - 1]] - shares[order[k]])
        worth = []
        for token in order[:k].tolist():
            hidden, _ = states(model, prompt, [*answer, token])
            unit = hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)
            worth.append((1 - alpha) * shares[token] - alpha * (unit[:-1] @ unit[-1]).max())
        ranked = np.argsort(-np.array(worth))
        closest = min(closest, worth[ranked[0]] - worth[ranked[1]])
        answer.append(int(order[ranked[0]]))
    return answer, float(closest)


def record(name: str) -> list[dict[str, Any]]:
    """Answers to a short and a longer prompt; prompts on which rounding could decide are passed over."""
    values = json.loads((FIXTURES / name / "config.json").read_text())
    kind = getattr(transformers, values["architectures"][0])
    model = kind.from_pretrained(FIXTURES / name, dtype=torch.float64, attn_implementation="eager").eval()
    drawn = np.random.default_rng(len(name))
    rows = []
    for (alpha, k), length in zip(OPTIONS, (9, 3, 17, 1), strict=True):
        for _ in range(30):
            prompt = drawn.integers(2, model.config.vocab_size, length).tolist()
            answer, closest = search(model, prompt, alpha, k)
            if closest > 3e-5:
                rows.append({"fixture": name, "prompt": prompt, "alpha": alpha, "top_k": k, "answer": answer})
                break
        else:
            raise SystemExit(f"{name}: no prompt of {length} tokens is decided clearly")
    return rows


if __name__ == "__main__":
    rows = [row for name in NAMES for row in record(name)]
    golden = {"transformers": transformers.__version__, "rows": rows}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps({**golden, "rows": []})[:-2] + f"\n{lines}\n]}}\n"
    (TESTS / "fixtures" / "goldens" / "contrastive.json").write_text(text)
    print(f"{len(rows)} answers, {len({tuple(row['answer']) for row in rows})} of them different")
