"""Side by side with transformers, where it is installed: what is saved, and the real vocabularies."""

from __future__ import annotations

import enum
import random
import re
from typing import Any, Literal

import pytest
from tokenizer_fixtures import byte_level_metadata, sentencepiece_metadata

from mlxlm.tokenizers import load_tokenizer, tokenizer_from_gguf
from mlxlm.tokenizers.pretokenizers import PRE_TOKENIZERS
from mlxlm.tokenizers.tool_schemas import describe_function

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")

POOLS = (
    "abcdefghij ",
    "0123456789 .,",
    "  \t\n\r",
    "äöüßéñ çøå",
    "你好世界日本語한국어",
    "👨‍👩‍👧🏽🇩🇪❤️ 😀",
    "def f(x):\n    return x+1 # ok\n",
    "'s 're 'LL <|im_end|><|endoftext|>",
    "Привет мир مرحبا שלום नमस्ते",
    "\u200b\ufeff\u00a0\u3000\u0301\x00\x7f²½Ⅷ",
)


def random_texts(count: int) -> list[str]:
    """Strings of characters, and sometimes whole runs, of many scripts; the same ones each time."""
    source = random.Random(0)

    def part() -> str:
        pool = source.choice(POOLS)
        return pool if source.random() < 0.1 else source.choice(pool)

    return ["".join(part() for _ in range(source.randint(0, 60))) for _ in range(count)]


def random_ids(size: int, count: int) -> list[list[int]]:
    source = random.Random(1)
    return [[source.randrange(size) for _ in range(source.randint(0, 30))] for _ in range(count)]


def compare(ours, theirs, texts, streams):
    assert [text for text in texts if ours.encode(text) != theirs.encode(text)] == []
    for ids in streams:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == theirs.decode(ids)


@pytest.fixture
def checkpoint(request):
    import checkpoints

    path = checkpoints.find(request.param)
    if path is None:
        pytest.skip(f"{request.param} has not been fetched (python tests/checkpoints.py)")
    return path


@pytest.mark.checkpoint
@pytest.mark.parametrize("checkpoint", ["smollm2"], indirect=True)
def test_the_smollm2_vocabulary(checkpoint, tmp_path):
    import mlx.core as mx

    _, metadata = mx.load(str(checkpoint), return_metadata=True)
    ours = tokenizer_from_gguf(metadata)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint.parent, gguf_file=checkpoint.name)
    texts, streams = random_texts(1000), random_ids(ours.vocab_size, 300)
    # transformers does not know "smollm" and cuts words as GPT-2 did. The vocabulary was trained with single digits:
    # it has no token with a digit and anything else, and all texts that come out differently have a numeral.
    spelled = [ours.token(id) for id in range(ours.vocab_size)]
    assert [token for token in spelled if any(map(str.isdigit, token)) and len(token) > 1 and token.isascii()] == []
    different = [text for text in texts if ours.encode(text) != theirs.encode(text)]
    assert different
    assert all(any(map(str.isnumeric, text)) for text in different)
    theirs.backend_tokenizer.pre_tokenizer = PRE_TOKENIZERS["smollm"].build()
    compare(ours, theirs, texts, streams)
    messages = [
        {"role": "user", "content": "Hi <b> é"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": ""},
    ]
    assert ours.encode_chat(messages) == theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    ours.save(tmp_path)
    compare(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), texts, streams)
    compare(load_tokenizer(tmp_path), theirs, texts, streams)


@pytest.mark.checkpoint
@pytest.mark.parametrize("checkpoint", ["minilm"], indirect=True)
def test_the_minilm_vocabulary(checkpoint, tmp_path):
    ours, theirs = load_tokenizer(checkpoint), transformers.AutoTokenizer.from_pretrained(checkpoint)
    texts, streams = random_texts(1000), random_ids(ours.vocab_size, 300)
    compare(ours, theirs, texts, streams)
    for text, pair in zip(texts[::2], texts[1::2], strict=True):
        if pair:
            expected = theirs(text, pair)
            assert ours.encode_with_types(text, pair) == (expected["input_ids"], expected["token_type_ids"])
    ours.save(tmp_path)
    compare(ours, transformers.AutoTokenizer.from_pretrained(tmp_path), texts, streams)


KINDS = {
    "library": ("library", None),
    "byte-level": ("byte_level_files", {"tokenizer_class": "GPT2Tokenizer"}),
    "encoder": ("byte_level_files", {"tokenizer_class": "RobertaTokenizer"}),
    "word-piece": ("word_piece", {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
    "sentencepiece-bpe": ("sentencepiece_bpe", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}),
    "sentencepiece-unigram": ("sentencepiece_unigram", {"tokenizer_class": "T5Tokenizer"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_from_our_files_what_it_loads_from_the_originals(kind, directory_of, tmp_path, texts):
    name, config = KINDS[kind]
    source = directory_of(name, config)
    load_tokenizer(source).save(tmp_path / "saved")
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (source, tmp_path / "saved"))
    assert [after.encode(text) for text in texts] == [before.encode(text) for text in texts]
    assert len(after) == len(before)
    assert after.special_tokens_map == before.special_tokens_map
    assert after.chat_template == before.chat_template
    for ids in random_ids(len(before), 100):
        assert after.decode(ids, skip_special_tokens=True) == before.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("metadata", [byte_level_metadata, sentencepiece_metadata], ids=["gpt2", "llama"])
def test_transformers_loads_what_came_from_gguf(metadata, tmp_path, texts):
    ours = tokenizer_from_gguf(metadata())
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in texts:
        # Of a part that starts with a space transformers' LLaMA class makes something else than SentencePiece does.
        parts = re.split("<s>|</s>|<unk>", text)
        if metadata is byte_level_metadata or not any(part.startswith((" ", "\u2581")) for part in parts):
            assert theirs.encode(text) == ours.encode(text)


def test_a_leading_space_differs_in_transformers_as_described(directory_of):
    directory = directory_of("sentencepiece_bpe", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True})
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.convert_ids_to_tokens(theirs.encode(" a")) == ["<s>", "▁a"]
    assert [ours.token(id) for id in ours.encode(" a")] == ["<s>", "▁▁", "a"]


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "TokenizersBackend"])
def test_transformers_too_lets_tokenizer_json_win_over_flags(directory_of, name):
    flags = {
        "tokenizer_class": name,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "add_eos_token": True,
    }
    directory = directory_of("library", flags)
    ours, theirs = load_tokenizer(directory), transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.encode("a b") == ours.encode("a b")
    assert theirs.encode("a b")[0] == ours.bos_id


class Unit(enum.Enum):
    CELSIUS = "C"
    KELVIN = 1


def plain(city: str, days: int = 1, warm: bool | None = None) -> list[str]:
    """Short.

    Args:
        city: The city
        days: How many, with a
            second line: and a colon
        warm: Or not (choices: ["a ", 2])

    Returns:
        Lines.
    """
    return []


def nested(
    a: list[dict[str, float]],
    b: int | str | None,
    c: Literal["x", 3],
    d: Unit,
    e: dict,
    f: tuple[int, str],
    g: list[int] | str,
    h: Any,
):
    """Long.
    Still the description.

    Args:
        a: A
        b: B
        c: C
        d: D
        e: E
        f: F
        g: G
        h: H
    """


def test_functions_become_the_schemas_that_transformers_makes():
    from transformers.utils import get_json_schema

    for function in (plain, nested):
        assert describe_function(function) == get_json_schema(function)
