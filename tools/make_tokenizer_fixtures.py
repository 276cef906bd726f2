"""Makes tests/fixtures/tokenizers/: tiny vocabularies of each kind, and what the reference libraries do with them.

    python tools/make_tokenizer_fixtures.py [directory]

Needs transformers, tokenizers and sentencepiece (the `parity` extra). The vocabularies are trained on the text below,
so nothing is downloaded. `goldens.json` in each folder holds texts with the ids and the decoded texts of transformers
(tokenizer.json, WordPiece, byte-level BPE) or of sentencepiece itself (its models); the tests compare with those.
The trainers break ties at random, so another run makes other vocabularies, and goldens that fit them.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

CORPUS = """
The quick brown fox jumps over the lazy dog. It wasn't the first time, and it won't be the last!
A tokenizer cuts text into pieces; a model only ever sees their numbers. Isn't that strange?
In 1905 there were 12345 of them, in 2024 about 3.14 million (up 27%).
def add(first, second):
    # returns the sum
    if first is None:
        return second
    return first + second

for (int i = 0; i < 10; ++i) { printf("%d\\n", i); }
<html><body class="main">&nbsp;</body></html>  https://example.org/path?query=value&x=1
Der Käse schmeckt übrigens großartig, sagte die Ärztin. Où est la bibliothèque déjà vue?
El niño comió piñas; ¿quién más vendrá mañana? São Paulo fica longe. Zażółć gęślą jaźń.
Быстрая коричневая лиса прыгает через ленивую собаку. Η γρήγορη αλεπού πηδάει.
敏捷的棕色狐狸跳过了懒狗。今天天气很好，我们去公园吧。
素早い茶色の狐がのろまな犬を飛び越える。東京は今日も晴れです。
빠른 갈색 여우가 게으른 개를 뛰어넘는다. مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี
Emoji: 😀 😅 👍🏽 👩‍👩‍👧‍👦 🇩🇪 ❤️ 🤷‍♀️ and arrows → ← ↔ and maths ∑ ∫ √ ≤ ≥ ≠.
ABCDEFGHIJKLMNOPQRSTUVWXYZ 6789 [_] (A) "B" <C> {D} @E #F $G ^H &I *J ~K `L` |M|
\tTabs\tand  double  spaces,   triple   spaces,    and\n\n\nblank lines\r\nand Windows lines.
""".strip()

TEXTS = [
    "",
    " ",
    "a",
    "Hello",
    " Hello",
    "  Hello  world  ",
    "Hello, world! Isn't it? I'll say: they've won't.",
    "HELLO World héllo ÜBER naïve Ångström İstanbul ǅ",
    "The year 2024, 3.14159 and 1,000,000; x²+½=Ⅷ ٣٤٥ 12345678901",
    "def f(x):\n    return x+1  # ok\n\n\tprint('%s' % x)\r\n",
    "tabs\t\tand\n\n\nnewlines \n \n end ",
    "   ",
    "\n",
    "\n\n  \n",
    "敏捷的棕色狐狸跳过了懒狗。東京は今日も晴れ 빠른 여우",
    "Быстрая лиса مرحبا بالعالم שלום नमस्ते สวัสดี",
    "👩‍👩‍👧‍👦👍🏽🇩🇪❤️🤷‍♀️😀 x 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "e\u0301 \u00e9 \ufb01 \u2126 \u212b a\u0300\u0316b ｆｕｌｌ　ｗｉｄｔｈ",
    "zero\u200bwidth\u200djoin\u00a0nbsp\ufeffbom\u2028line\u2029para\u0085nel",
    "\u2581already\u2581marked \u2581 text",
    "control \x00\x01\x1f\x7f bytes",
    "special <s> inside </s> and <|end|> or [MASK] text <unk> <pad>",
    "<|end|>",
    "<|end|><|end|>  <|end|> Hello",
    "[CLS] a [SEP] b[MASK]c",
    "<extra_id_0> fills <extra_id_1>the<extra_id_2>",
    "<s>Hello</s>",
    "<0x0A> is not a byte <0xFF>",
    "##piece ▁piece Ġpiece ĊĠ é",
    "a" * 120,
    "supercalifragilisticexpialidocious",
    "https://example.org/a_b-c?d=e&f=%20#g",
    '{\'json\': [1, 2.5, null], "k": "v"}',
    "!!!???...---___***///\\\\\\|||~~~```",
    "don't DON'T Don'T 's 're 'LL ''",
    "𝒳𝒴𝒵 𐍈 \U0001f9ff\U000e0041",
]
PAIRS = [("Hello world", "How are you?"), ("a", "b"), ("", "x"), ("Isn't it?", "[MASK] it is.")]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] not in ['system', 'user', 'assistant', 'tool'] %}
    {{ raise_exception('unknown role ' ~ message['role']) }}
{% endif %}
{{ '<|start|>' + message['role'] + '\\n' + message['content'] | trim + '<|end|>' + '\\n' }}
{% endfor %}
{% if tools %}
{{ tools | tojson(indent=2) }}
{% endif %}
{% if add_generation_prompt %}
{{ '<|start|>assistant\\n' }}
{% endif %}"""
CHATS = [
    [{"role": "user", "content": "Hello <b>&amp;</b> 'quoted' 😀"}],
    [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": " Hi\n"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye <|end|> now"},
    ],
]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Größe <b>",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "a city"}}},
    },
}


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "tests/fixtures/tokenizers")
    root.mkdir(parents=True, exist_ok=True)
    make_library_file(root / "library")
    make_byte_level_files(root / "byte_level_files")
    make_word_list(root / "word_piece")
    make_sentencepiece(root / "sentencepiece_bpe", kind="bpe")
    make_sentencepiece(root / "sentencepiece_unigram", kind="unigram")
    (root / "texts.json").write_text(_dump({"texts": TEXTS, "pairs": PAIRS}), encoding="utf-8")


def make_library_file(folder: Path) -> None:
    """A byte-level BPE as decoder models have it: bos template, chat template, a token that strips spaces."""
    library = Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    library.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS.split("\n"), trainer)
    library.add_special_tokens([AddedToken("[MASK]", lstrip=True, special=True)])
    library.add_tokens([AddedToken("naïve", single_word=True), AddedToken("  ", normalized=False)])
    library.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", library.token_to_id("<s>"))]
    )
    library.enable_truncation(max_length=16)
    library.enable_padding(length=16, pad_id=library.token_to_id("<pad>"), pad_token="<pad>")
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(library.to_str(), encoding="utf-8")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
            "pad_token": "<pad>",
            "mask_token": {"__type": "AddedToken", "content": "[MASK]", "lstrip": True, "special": True},
            "model_max_length": 1000000000000000019884624838656,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    (folder / "additional_chat_templates").mkdir(exist_ok=True)
    tool_use = "{{ tools | tojson }}|{{ messages[0]['content'] }}"
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(tool_use, encoding="utf-8")
    write_json(folder / "generation_config.json", {"eos_token_id": [1, 4]})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    goldens = golden(tokenizer)
    goldens["chats"] = [
        {
            "messages": chat,
            "prompt": prompt,
            "text": tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False),
            "ids": tokenizer.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"],
        }
        for chat in CHATS
        for prompt in (True, False)
    ]
    goldens["tools"] = {
        "tool": TOOL,
        "tool_use": tokenizer.apply_chat_template(CHATS[0], tools=[TOOL], tokenize=False),
        "default": tokenizer.apply_chat_template(
            CHATS[0], tools=[TOOL], chat_template="default", tokenize=False, add_generation_prompt=True
        ),
    }
    write_json(folder / "goldens.json", goldens)


def make_byte_level_files(folder: Path) -> None:
    """vocab.json and merges.txt, as the first byte-level models had them, and the same with an encoder's frame."""
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS.split("\n"), trainer)
    folder.mkdir(exist_ok=True)
    library.model.save(str(folder))
    merges = folder / "merges.txt"
    merges.write_text("#version: 0.2\n" + merges.read_text(encoding="utf-8").removeprefix("#version: 0.2\n"), "utf-8")
    goldens = {}
    encoder = {"bos": "<s>", "eos": "</s>", "sep": "</s>", "cls": "<s>", "unk": "<unk>", "pad": "<pad>"}
    encoder = {f"{role}_token": text for role, text in encoder.items()}
    mask = {"__type": "AddedToken", "content": "<mask>", "lstrip": True, "special": True}
    for name, config in {
        "decoder": {"tokenizer_class": "GPT2Tokenizer"},
        "decoder_prefix": {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        "decoder_bos": {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True},
        "encoder": {"tokenizer_class": "RobertaTokenizer", **encoder, "mask_token": mask},
    }.items():
        write_json(folder / "tokenizer_config.json", config)
        goldens[name] = {"config": config, **golden(AutoTokenizer.from_pretrained(folder))}
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "goldens.json", goldens)


def make_word_list(folder: Path) -> None:
    """vocab.txt, with and without lower-casing."""
    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=False)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    library.train_from_iterator([CORPUS, CORPUS.lower()], trainer)
    folder.mkdir(exist_ok=True)
    words = sorted(library.get_vocab(), key=library.get_vocab().__getitem__)
    (folder / "vocab.txt").write_text("".join(word + "\n" for word in words), encoding="utf-8")
    goldens = {}
    for name, config in {
        "uncased": {},
        "cased": {"do_lower_case": False},
        "accents": {"do_lower_case": True, "strip_accents": False},
        "no_accents": {"do_lower_case": False, "strip_accents": True},
        "no_ideographs": {"tokenize_chinese_chars": False},
        "clean_up": {"clean_up_tokenization_spaces": True},
    }.items():
        config = {"tokenizer_class": "BertTokenizer", **config}
        write_json(folder / "tokenizer_config.json", config)
        goldens[name] = {"config": config, **golden(AutoTokenizer.from_pretrained(folder))}
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "goldens.json", goldens)


def make_sentencepiece(folder: Path, kind: str) -> None:
    """A SentencePiece model: BPE with byte fallback as in LLaMA, or Unigram with text rules as in T5."""
    folder.mkdir(exist_ok=True)
    prefix = folder / "model"
    options: dict[str, Any] = {"model_type": kind, "vocab_size": 600, "character_coverage": 1.0, "minloglevel": 2}
    if kind == "bpe":
        options |= {
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "split_digits": True,
            "allow_whitespace_only_pieces": True,
            "character_coverage": 0.98,
            "user_defined_symbols": ["<user>"],
        }
    else:
        rules = folder / "rules.tsv"
        lines = [(0xFB01, "fi"), (0x3000, " "), (0x00A0, " "), (0x0009, " "), (0x000A, " "), (0x212B, "Å")]
        lines += [(0xFF41 + index, chr(ord("a") + index)) for index in range(26)]
        rules.write_text("".join(f"{a:X}\t{' '.join(f'{ord(c):X}' for c in b)}\n" for a, b in lines), encoding="utf-8")
        options |= {"normalization_rule_tsv": str(rules), "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        options |= {"hard_vocab_limit": False}
    corpus = folder / "corpus.txt"
    corpus.write_text(CORPUS, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(input=str(corpus), model_prefix=str(prefix), **options)
    for path in (corpus, prefix.with_suffix(".vocab"), folder / "rules.tsv"):
        path.unlink(missing_ok=True)
    prefix.with_suffix(".model").rename(folder / "tokenizer.model")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    proto = sentencepiece_model_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    ids = [processor.encode(text) for text in TEXTS]
    random.seed(0)
    streams = [[random.randrange(3, processor.get_piece_size()) for _ in range(count)] for count in range(40)]
    if kind == "bpe":  # byte pieces alone: mostly invalid UTF-8
        first = processor.piece_to_id("<0x00>")
        streams += [[first + random.randrange(256) for _ in range(count)] for count in range(1, 40)]
        streams += [[first + byte for byte in text.encode()] for text in TEXTS]
    write_json(
        folder / "goldens.json",
        {
            "ids": ids,
            "decoded": [processor.decode(row) for row in ids],
            "streams": [{"ids": row, "text": processor.decode(row)} for row in streams],
            "pieces": [piece.piece for piece in proto.pieces],
            "scores": [piece.score for piece in proto.pieces],
            "types": [piece.type for piece in proto.pieces],
        },
    )


def golden(tokenizer: Any) -> dict[str, Any]:
    """What transformers' tokenizer makes of all texts and of random ids."""
    random.seed(0)
    streams = [[random.randrange(len(tokenizer)) for _ in range(count)] for count in range(40)]
    ids = [tokenizer.encode(text) for text in TEXTS]
    return {
        "ids": ids,
        "bare_ids": [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS],
        "decoded": [tokenizer.decode(row, skip_special_tokens=True) for row in ids],
        "pairs": [[pair["input_ids"], pair.get("token_type_ids")] for pair in (tokenizer(*pair) for pair in PAIRS)],
        "streams": [
            {"ids": row, "text": tokenizer.decode(row), "skipped": tokenizer.decode(row, skip_special_tokens=True)}
            for row in streams
        ],
        "size": len(tokenizer),
        "special": {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk", "pad", "mask")},
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(_dump(value), encoding="utf-8")


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"


if __name__ == "__main__":
    main()
