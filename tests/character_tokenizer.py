"""A tokenizer of single characters for models of 67 words."""

from __future__ import annotations

import json
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write_character_tokenizer(directory, template=TEMPLATE):
    """Tokenizer files of 67 words, mostly single characters, with a chat template."""
    words = ["<pad>", "<s>", "</s>", "<user>", "<assistant>", "<system>", "<unk>"]
    words += [*string.ascii_letters, " ", ".", ",", "?", "!", "'", "\n", "0"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(words[:7])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
