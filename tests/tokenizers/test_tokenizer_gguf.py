"""Vocabularies of GGUF metadata, rebuilt from the fixtures, against the originals they were taken from."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizer_fixtures import byte_level_metadata, read, sentencepiece_metadata, word_piece_metadata
from tokenizers import pre_tokenizers

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers import tokenizer_from_gguf
from mlxlm.tokenizers.detokenizer import BYTE_TO_CHARACTER, spell_bytes
from mlxlm.tokenizers.pretokenizers import PRE_TOKENIZERS

TEMPLATE = "{{ messages[0]['content'] }}<|im_end|>"


def test_a_sentencepiece_vocabulary_is_that_of_its_model(texts):
    tokenizer, goldens = tokenizer_from_gguf(sentencepiece_metadata()), read("sentencepiece_bpe/goldens.json")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.pad_id) == (1, 2, 0, None)
    assert tokenizer.vocab_size == len(goldens["pieces"])
    for text, ids in zip(texts, goldens["ids"], strict=True):
        if not any(token in text for token in ("<s>", "</s>", "<unk>")):
            assert tokenizer.encode(text) == [1, *ids]  # llama.cpp's default for this kind: bos in front
    for stream in goldens["streams"]:
        if 0 not in stream["ids"]:
            assert tokenizer.decode(stream["ids"]) == stream["text"]


def test_a_byte_level_vocabulary_is_that_of_its_files(texts):
    goldens = read("byte_level_files/goldens.json")["decoder"]
    tokenizer = tokenizer_from_gguf(byte_level_metadata())
    for text, ids in zip(texts, goldens["ids"], strict=True):
        if "<" not in text:  # the files know fewer special tokens
            assert tokenizer.encode(text) == ids
            assert tokenizer.decode(ids) == text


def test_a_word_piece_vocabulary_is_that_of_its_file(texts, pairs):
    goldens = read("word_piece/goldens.json")
    tokenizer = tokenizer_from_gguf(word_piece_metadata())
    assert [tokenizer.encode(text) for text in texts] == goldens["uncased"]["ids"]
    assert [list(tokenizer.encode_with_types(*pair)) for pair in pairs] == goldens["uncased"]["pairs"]
    special = goldens["uncased"]["special"]
    assert {role: getattr(tokenizer, f"{role}_id") for role in special} == special
    cased = tokenizer_from_gguf(word_piece_metadata(**{"normalizer.lowercase": False}))
    assert [cased.encode(text) for text in texts] == goldens["cased"]["ids"]


def test_values_may_be_arrays(texts):
    metadata = sentencepiece_metadata()
    arrays = {
        **metadata,
        "tokenizer.ggml.scores": np.array(metadata["tokenizer.ggml.scores"], np.float32),
        "tokenizer.ggml.token_type": np.array(metadata["tokenizer.ggml.token_type"], np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
        "tokenizer.ggml.add_bos_token": np.bool_(True),
    }
    assert tokenizer_from_gguf(arrays).encode(texts[5]) == tokenizer_from_gguf(metadata).encode(texts[5])


def test_values_may_be_mlx_arrays():
    mx = pytest.importorskip("mlx.core")
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.token_type"] = mx.array(metadata["tokenizer.ggml.token_type"])
    metadata["tokenizer.ggml.bos_token_id"] = mx.array(metadata["tokenizer.ggml.bos_token_id"])
    metadata["tokenizer.ggml.add_bos_token"] = mx.array(True)
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("a")[0] == tokenizer.bos_id


def test_flags_set_bos_and_eos_around_a_text():
    for make in (byte_level_metadata, sentencepiece_metadata):
        both = tokenizer_from_gguf(make(add_bos_token=True, add_eos_token=True))
        none = tokenizer_from_gguf(make(add_bos_token=False, add_eos_token=False))
        assert both.encode("a b") == [both.bos_id, *none.encode("a b"), both.eos_id]


def test_a_space_in_front_can_be_turned_off_or_on():
    spaced, bare = (tokenizer_from_gguf(sentencepiece_metadata(add_space_prefix=flag)) for flag in (True, False))
    assert spaced.token(spaced.encode("a")[1]) == "▁a"
    assert bare.token(bare.encode("a")[1]) == "a"
    assert bare.decode(bare.encode(" a")) == spaced.decode(spaced.encode(" a")) == " a"
    spaced, bare = (tokenizer_from_gguf(byte_level_metadata(add_space_prefix=flag)) for flag in (True, False))
    assert spaced.encode("the") == bare.encode(" the") != bare.encode("the")


def test_control_tokens_are_special_and_user_defined_ones_whole():
    golden = read("sentencepiece_bpe/goldens.json")
    pieces, types = list(golden["pieces"]), list(golden["types"])
    pieces[-1], types[-1] = "<|im_end|>", 3
    pieces[-2], types[-2] = "  x", 4  # converters write its spaces as spaces
    tokenizer = tokenizer_from_gguf(
        sentencepiece_metadata(tokens=pieces, token_type=types) | {"tokenizer.chat_template": TEMPLATE}
    )
    last = len(pieces) - 1
    assert tokenizer.encode("a<|im_end|>", add_special_tokens=False)[-1] == last
    assert last in tokenizer.special_ids
    assert tokenizer.encode("a  xa", add_special_tokens=False)[1] == last - 1
    assert last - 1 not in tokenizer.special_ids
    assert tokenizer.decode([last - 1]) == " x"
    assert tokenizer.stop_ids == {2, last}  # the template writes it


def test_templates_limits_and_end_tokens_are_read():
    metadata = byte_level_metadata(eot_token_id=7, eom_token_id=8) | {
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.chat_template.tool_use": "{{ tools | length }}",
        "general.architecture": "x",
        "x.context_length": np.uint32(2048),
    }
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == 2048
    assert tokenizer.stop_ids == {7, 8, tokenizer.eos_id}
    assert tokenizer.render_chat([{"role": "user", "content": "x"}], tools=[{}, {}]) == "2"


# What each published pre-tokenizer makes of this text, written down from its definition.
SAMPLE = "It's 1234 naïve\n\n  y=x²"
WORDS = {
    "gpt-2": ["It", "'s", " 1234", " naïve", "\n\n ", " y", "=", "x", "²"],
    "olmo": ["It", "'s", " 1234", " naïve", "\n\n ", " y", "=", "x", "²"],
    "smollm": ["It", "'s", " ", "1", "2", "3", "4", " naïve", "\n\n ", " y", "=", "x", "²"],
    "starcoder": ["It", "'s", " ", "1", "2", "3", "4", " naïve", "\n\n ", " y", "=", "x", "²"],
    "llama-bpe": ["It", "'s", " ", "123", "4", " naïve", "\n\n", " ", " y", "=x", "²"],
    "glm4": ["It", "'s", " ", "123", "4", " naïve", "\n\n", " ", " y", "=x", "²"],
    "qwen2": ["It", "'s", " ", "1", "2", "3", "4", " naïve", "\n\n", " ", " y", "=x", "²"],
    "tekken": ["It", "'s", " ", "1", "2", "3", "4", " naïve", "\n\n", " ", " y", "=x", "²"],
    "gpt-4o": ["It's", " ", "123", "4", " naïve", "\n\n", " ", " y", "=x", "²"],
    "deepseek-coder": ["It", "'", "s", " ", "1", "2", "3", "4", " naïve", "\n", "\n", " ", " y", "=", "x", "²"],
    "deepseek-v3": ["It", "'s", " ", "123", "4", " naïve", "\n\n", " ", " y", "=x", "²"],
    "falcon": ["It", "'", "s", " ", "123", "4", " naïve", "\n\n ", " y", "=", "x", "²"],
    "bloom": ["It's", " 1234", " naïve", "\n\n ", " y=x²"],
    "viking": ["It's", " ", "1", "2", "3", "4", " naïve", "\n\n ", " y=x", "²"],
    "default": ["It", "'", "s", " ", "123", "4", " naïve", "\n\n ", " y", "=", "x", "²"],
}


CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def unspell(words):
    """Byte-level words as bytes: one may be part of a character only."""
    return [bytes(CHARACTER_TO_BYTE[character] for character in word) for word, _ in words]


def test_bytes_are_spelled_as_the_library_spells_them():
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert set(BYTE_TO_CHARACTER.values()) == set(level.alphabet())
    for character in [*map(chr, range(0x900)), "你", "\uffff", "😀", "\U0010ffff"]:
        assert spell_bytes(character) == level.pre_tokenize_str(character)[0][0]


@pytest.mark.parametrize("name", WORDS)
def test_a_pre_tokenizer_cuts_as_its_models_were_trained(name):
    words = unspell(PRE_TOKENIZERS[name].build().pre_tokenize_str(SAMPLE))
    assert b"".join(words) == SAMPLE.encode()
    if name in ("falcon", "default"):  # digits are cut after the bytes: "²" is the two characters "Â" and "²"
        assert words[-2:] == [b"\xc2", b"\xb2"]
        words[-2:] = [b"\xc2\xb2"]
    assert [word.decode() for word in words] == WORDS[name]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_pre_tokenizer_keeps_the_whole_text(name, texts):
    cut = PRE_TOKENIZERS[name].build()
    for text in texts:
        assert b"".join(unspell(cut.pre_tokenize_str(text))) == text.encode()


def test_a_name_decides_about_bos_and_whole_words():
    words = byte_level_metadata(pre="llama-bpe")
    tokens = [*words["tokenizer.ggml.tokens"], "quack"]  # no merges lead to it
    words |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [*words["tokenizer.ggml.token_type"], 1]}
    assert tokenizer_from_gguf(words).encode("quack") == [tokenizer_from_gguf(words).bos_id, len(tokens) - 1]
    merged = tokenizer_from_gguf({**words, "tokenizer.ggml.pre": "gpt-2"})
    assert len(tokens) - 1 not in merged.encode("quack")
    assert merged.bos_id not in merged.encode("quack")


def test_text_is_composed_where_the_published_tokenizer_does_it():
    composed, plain = (tokenizer_from_gguf(byte_level_metadata(pre=name)) for name in ("qwen2", "gpt-2"))
    assert composed.encode("e\u0301") == composed.encode("é")
    assert plain.decode(plain.encode("e\u0301")) == "e\u0301"


def test_a_missing_pre_tokenizer_is_llama_cpp_s_default_and_a_warning():
    with pytest.warns(UserWarning, match="tokenizer.ggml.pre"):
        tokenizer = tokenizer_from_gguf(byte_level_metadata(pre=None))
    assert tokenizer.encode("It's 1234") == tokenizer_from_gguf(byte_level_metadata(pre="default")).encode("It's 1234")


def test_an_empty_token_gets_a_name():
    metadata = byte_level_metadata()
    metadata["tokenizer.ggml.tokens"] = [
        "" if token == "<mask>" else token for token in metadata["tokenizer.ggml.tokens"]
    ]
    assert tokenizer_from_gguf(metadata).token(4) == "[EMPTY_4]"


BROKEN = {
    "no-model": (byte_level_metadata(model=None), "no key tokenizer.ggml.model"),
    "unknown-model": (
        byte_level_metadata(model="rwkv"),
        "'rwkv' is not implemented; valid: bert, gpt2, llama",
    ),
    "unknown-pre": (byte_level_metadata(pre="smolm"), "'smolm' .*known: .*smollm"),
    "no-tokens": (byte_level_metadata(tokens=None), "no key tokenizer.ggml.tokens"),
    "empty-tokens": (byte_level_metadata(tokens=[]), "tokens: is empty"),
    "tokens-of-numbers": (byte_level_metadata(tokens=[1, 2]), "tokens: expected a list of strings"),
    "twice": (byte_level_metadata(tokens=["a", "b", "a"], token_type=None), "'a' stands at 0 and at 2"),
    "no-merges": (byte_level_metadata(merges=None), "no key tokenizer.ggml.merges"),
    "bad-merge": (byte_level_metadata(merges=["ab"]), "merges: 'ab' is not two parts"),
    "merge-of-strangers": (byte_level_metadata(merges=["qqq zzz"]), "the merges don't fit the vocabulary"),
    "types-too-short": (byte_level_metadata(token_type=[1, 1]), "token_type: 2 entries for 600 tokens"),
    "scores-too-short": (sentencepiece_metadata(scores=[0.0]), "scores: 1 entries for 600 tokens"),
    "no-scores": (sentencepiece_metadata(scores=None), "no key tokenizer.ggml.scores"),
    "bos-outside": (byte_level_metadata(bos_token_id=600), "bos_token_id: 600 is outside a vocabulary of 600"),
    "bos-text": (byte_level_metadata(bos_token_id="x"), "bos_token_id: expected a number, got 'x'"),
    "pre-number": (byte_level_metadata(pre=3), "tokenizer.ggml.pre: expected text, got int"),
    "no-separator": (
        word_piece_metadata(
            tokens=["[CLS]", "[UNK]", "▁a"],
            token_type=[3, 3, 1],
            unknown_token_id=1,
            bos_token_id=0,
            seperator_token_id=None,
            padding_token_id=None,
        ),
        "sep token",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damaged_metadata_is_one_clear_error(name):
    metadata, message = BROKEN[name]
    with pytest.raises(TokenizerError, match=message) as raised:
        tokenizer_from_gguf(metadata)
    assert "\n" not in str(raised.value)
