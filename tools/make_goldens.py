"""Record what transformers computes with the real checkpoints, for tests/models/test_real_checkpoints.py.

usage: python tools/make_goldens.py        (needs the `parity` extra and the `gguf` package, and the checkpoints of
tests/checkpoints.py)

Writes tests/fixtures/goldens/smollm2.json (greedy tokens for five prompts) and minilm.json (embeddings of 20
sentences).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import checkpoints  # noqa: E402

GOLDENS = ROOT / "tests" / "fixtures" / "goldens"
PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three prime numbers and explain why they are prime.",
    "Translate 'good morning' to German.",
    "def fibonacci(n):",
]
SENTENCES = [
    "A man is playing a guitar.",
    "Someone strums an instrument.",
    "The stock market fell sharply on Tuesday.",
    "Shares lost much of their value this week.",
    "How do I bake sourdough bread?",
    "Mix flour, water and salt, then let the dough rest overnight.",
    "The cat sat on the mat.",
    "A feline rested on a rug.",
    "Quantum computers use qubits instead of bits.",
    "Apple silicon shares one memory between CPU and GPU.",
    "Attention is all you need.",
    "Ärger mit Umlauten? Über allen Gipfeln ist Ruh.",
    "日本語の文も埋め込みます。",
    "Émile Zola wrote 'Germinal' in 1885.",
    "12 + 30 = 42, isn't it?",
    "print('hello, world')",
    "ok",
    "THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG!!!",
    "An emoji 🙂 in the middle of a sentence, and an unusual word: floccinaucinihilipilification.",
    "This sentence is rather long, because a batch of sentences of different lengths has to be padded, and padding "
    "must not change what the shorter ones of them mean, whatever the order in which they were given to the program.",
]
TOKENS = 48


def smollm2() -> dict:
    """Greedy tokens of transformers, which dequantizes the GGUF file to float32."""
    path = checkpoints.fetch("smollm2")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows = []
    for prompt in PROMPTS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(tokens, max_new_tokens=TOKENS, do_sample=False, eos_token_id=2, pad_token_id=2)
        answer = output[0, tokens.shape[1] :].tolist()
        rows.append({"prompt": prompt, "text": text, "prompt_tokens": tokens[0].tolist(), "answer_tokens": answer})
        print(prompt, "->", tokenizer.decode(answer)[:70].replace("\n", " "))
    return {"transformers": transformers.__version__, "torch": torch.__version__, "rows": rows}


def minilm() -> dict:
    """Mean-pooled, normalised embeddings of transformers."""
    path = checkpoints.fetch("minilm")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    rows = []
    for sentence in SENTENCES:
        inputs = tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state[0]
        vector = torch.nn.functional.normalize(hidden.mean(0), dim=0)
        embedding = [round(x, 7) for x in vector.tolist()]
        rows.append({"text": sentence, "tokens": inputs.input_ids[0].tolist(), "embedding": embedding})
    return {"transformers": transformers.__version__, "torch": torch.__version__, "rows": rows}


if __name__ == "__main__":
    GOLDENS.mkdir(parents=True, exist_ok=True)
    for name, record in (("smollm2", smollm2), ("minilm", minilm)):
        (GOLDENS / f"{name}.json").write_text(json.dumps(record(), ensure_ascii=False) + "\n")
