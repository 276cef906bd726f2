"""A small T5 with drawn weights, and a tokenizer of the words in its data: a model that knows nothing yet.

    python examples/synthetic_data/generate.py --task dates --rows 5000 --output runs/dates
    python examples/finetune_tasks/draw_t5.py --data runs/dates --output runs/tiny-t5

Reads train.jsonl with rows {"source", "target"}. The folder is a checkpoint as any other, which mlxlm and transformers
load.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from mlx.utils import tree_flatten
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from mlxlm.data import read_jsonl
from mlxlm.models import Transformer, family_of, save
from mlxlm.tokenizers import load_tokenizer
from mlxlm.training.initialisation import initialise

PIECE = r" ?\w+|[^\w]"  # a word with the space before it, or one other character
SPECIAL = ["<pad>", "</s>", "<unk>"]


def pieces(data: Path) -> list[str]:
    """All pieces of the training rows, sorted."""
    texts = [row[key] for row in read_jsonl(data / "train.jsonl") for key in ("source", "target")]
    return sorted({piece for text in texts for piece in re.findall(PIECE, text)})


def write_tokenizer(words: list[str], folder: Path) -> None:
    """A tokenizer.json that ends each text with </s>, as T5 wants it."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(SPECIAL)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def draw(data: Path, folder: Path, *, width: int = 96, layers: int = 2, seed: int = 0) -> Transformer:
    """Write tokenizer and model; gives the model."""
    words = pieces(data)
    write_tokenizer(words, folder)
    values = {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": len(SPECIAL) + len(words),
        "d_model": width, "d_kv": width // 8, "num_heads": 8, "d_ff": 4 * width, "num_layers": layers,
        "num_decoder_layers": layers, "feed_forward_proj": "relu", "dropout_rate": 0.0, "tie_word_embeddings": True,
        "eos_token_id": 1, "pad_token_id": 0, "decoder_start_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    model = Transformer(family_of(values).read_config(values))
    initialise(model, seed, scale=width**-0.5)  # as T5's authors do; the default is for models ten times as wide
    for stack in (model.encoder, model.decoder):  # where words stand counts from the first step on
        stack.positions.weight = 10 * stack.positions.weight
    save(model, load_tokenizer(folder), folder, family="t5")
    return model


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help="folder with train.jsonl")
    parser.add_argument("--output", required=True, type=Path, help="folder of the model")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = draw(options.data, options.output, seed=options.seed)
    count = sum(array.size for _, array in tree_flatten(model.parameters()))
    vocab_size = model.config.embeddings.vocab_size
    print(f"a T5 of {count:,} parameters and {vocab_size} tokens in {options.output}")


if __name__ == "__main__":
    main()
