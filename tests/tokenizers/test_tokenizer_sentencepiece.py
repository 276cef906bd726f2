"""SentencePiece models against the sentencepiece library itself, and what checkpoints put around them."""

from __future__ import annotations

import pytest
import sentencepiece
from tokenizer_fixtures import FIXTURES, read

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers import load_tokenizer
from mlxlm.tokenizers.model_proto import UNIGRAM, PieceType, write_model

KINDS = ("sentencepiece_bpe", "sentencepiece_unigram")
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
T5 = {"tokenizer_class": "T5Tokenizer"}


def processor_of(kind):
    return sentencepiece.SentencePieceProcessor(model_file=str(FIXTURES / kind / "tokenizer.model"))


def spelled(tokenizer, ids):
    return [tokenizer.token(id) for id in ids]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_get_the_ids_of_the_library(kind, texts):
    tokenizer, goldens = load_tokenizer(FIXTURES / kind), read(f"{kind}/goldens.json")
    special = [tokenizer.token(id) for id in tokenizer.special_ids]
    for text, ids in zip(texts, goldens["ids"], strict=True):
        if not any(token in text for token in special):
            assert tokenizer.encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_ids_get_the_texts_of_the_library(kind):
    tokenizer, goldens = load_tokenizer(FIXTURES / kind), read(f"{kind}/goldens.json")
    streams = [*zip(goldens["ids"], goldens["decoded"], strict=True)]
    streams += [(stream["ids"], stream["text"]) for stream in goldens["streams"]]
    for ids, text in streams:
        if tokenizer.unk_id not in ids:  # the library writes " ⁇ " there, transformers the token
            assert tokenizer.decode(ids) == text


def test_the_unknown_token_is_special():
    tokenizer = load_tokenizer(FIXTURES / "sentencepiece_unigram")
    ids = tokenizer.encode("a¤a", add_special_tokens=False)
    assert tokenizer.unk_id in ids
    assert tokenizer.decode(ids) == "aa"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<unk>a"


def test_bos_is_set_in_front_unless_told_otherwise(directory_of):
    text = "Hello you"
    plain = processor_of("sentencepiece_bpe").encode(text)
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", LLAMA))
    assert tokenizer.encode(text) == [1, *plain]
    assert tokenizer.encode(text, add_special_tokens=False) == plain
    assert tokenizer.encode_with_types("a", "b") == (
        [1, *tokenizer.encode("a")[1:], 1, *tokenizer.encode("b")[1:]],
        [0, 0, 1, 1],
    )


@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (False, False), (True, False)])
def test_flags_say_what_is_set_around_a_text(directory_of, bos, eos):
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", {**LLAMA, "add_bos_token": bos, "add_eos_token": eos}))
    plain = processor_of("sentencepiece_bpe").encode("Hello you")
    assert tokenizer.encode("Hello you") == [1] * bos + plain + [2] * eos


def test_special_tokens_in_a_text_become_their_ids(directory_of):
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", LLAMA))
    encode = processor_of("sentencepiece_bpe").encode
    assert tokenizer.encode("<s>one</s> two<unk>") == [1, 1, *encode("one"), 2, *encode(" two"), 0]


def test_a_user_defined_piece_is_left_to_the_library(directory_of):
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", LLAMA))
    assert tokenizer.encode("one<user> two", add_special_tokens=False) == processor_of("sentencepiece_bpe").encode(
        "one<user> two"
    )
    assert tokenizer.token_id("<user>") not in tokenizer.special_ids


def test_byte_pieces_in_a_text_are_text(directory_of):
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", LLAMA))
    assert tokenizer.decode(tokenizer.encode("<0x0A>")) == "<0x0A>"
    assert tokenizer.token_id("<0x0A>") not in tokenizer.encode("<0x0A>")


def test_the_space_in_front_follows_the_legacy_flag(directory_of):
    directory = directory_of("sentencepiece_bpe", LLAMA)
    config = directory / "tokenizer_config.json"
    text = "a<s>a"
    always = load_tokenizer(directory)
    config.write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": false}')
    first = load_tokenizer(directory)
    config.write_text('{"tokenizer_class": "LlamaTokenizer", "add_prefix_space": false}')
    never = load_tokenizer(directory)
    assert spelled(always, always.encode(text)) == ["<s>", "▁a", "<s>", "▁a"]
    assert spelled(first, first.encode(text)) == ["<s>", "▁a", "<s>", "a"]
    assert spelled(never, never.encode(text)) == ["<s>", "a", "<s>", "a"]
    assert (
        always.decode(always.encode(" a "))
        == first.decode(first.encode(" a "))
        == never.decode(never.encode(" a "))
        == " a "
    )


def test_a_special_token_in_the_decoded_text_keeps_the_space_behind_it(directory_of):
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", LLAMA))
    assert tokenizer.decode(tokenizer.encode("a b"), skip_special_tokens=False) == "<s> a b"
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"


def test_sentinels_stand_behind_the_vocabulary_highest_first(directory_of):
    tokenizer = load_tokenizer(directory_of("sentencepiece_unigram", T5, tokenizer_model="spiece.model"))
    size = processor_of("sentencepiece_unigram").get_piece_size()
    assert tokenizer.vocab_size == size + 100
    assert [tokenizer.token_id(f"<extra_id_{n}>") for n in (99, 98, 0)] == [size, size + 1, size + 99]
    ids = tokenizer.encode("the <extra_id_0> fox <extra_id_1>")
    encode = processor_of("sentencepiece_unigram").encode
    assert ids == [*encode("the"), size + 99, *encode("fox"), size + 98, 1]
    assert tokenizer.decode(ids) == "the fox"
    assert tokenizer.encode("a", "b") == [*encode("a"), 1, *encode("b"), 1]


def test_the_number_of_sentinels_can_be_set(directory_of):
    config = {**T5, "extra_ids": 3, "additional_special_tokens": ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]}
    tokenizer = load_tokenizer(directory_of("sentencepiece_unigram", config, tokenizer_model="spiece.model"))
    size = processor_of("sentencepiece_unigram").get_piece_size()
    assert [tokenizer.token_id(f"<extra_id_{n}>") for n in (2, 1, 0)] == [size, size + 1, size + 2]
    assert tokenizer.vocab_size == size + 3


def test_shifted_ids_make_room_for_pad_and_mask(directory_of):
    config = {"tokenizer_class": "XLMRobertaTokenizer"}
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", config, tokenizer_model="sentencepiece.bpe.model"))
    processor = processor_of("sentencepiece_bpe")
    moved = {0: 3, 1: 0, 2: 2}
    shifted = [moved.get(id, id + 1) for id in processor.encode("Hello you")]
    assert tokenizer.encode("Hello you") == [0, *shifted, 2]
    assert (tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2, 3)
    assert tokenizer.mask_id == processor.get_piece_size() + 1
    assert tokenizer.vocab_size == processor.get_piece_size() + 2
    assert tokenizer.decode(tokenizer.encode("Hello you")) == "Hello you"
    assert tokenizer.encode("a", "a") == [0, *tokenizer.encode("a")[1:-1], 2, 2, *tokenizer.encode("a")[1:-1], 2]
    # The mask takes the space in front of it along.
    assert spelled(tokenizer, tokenizer.encode("a <mask> a")) == ["<s>", "▁a", "<mask>", "▁▁", "a", "</s>"]


def test_commands_that_open_every_text_are_not_found_in_it(directory_of):
    tokenizer = load_tokenizer(directory_of("sentencepiece_bpe", {"tokenizer_class": "ChatGLMTokenizer"}))
    size = processor_of("sentencepiece_bpe").get_piece_size()
    assert tokenizer.token_id("[gMASK]") == size + 1
    assert tokenizer.token_id("sop") == size + 3
    assert tokenizer.encode("sop")[:2] == [size + 1, size + 3]
    assert tokenizer.encode("sop", add_special_tokens=False) == processor_of("sentencepiece_bpe").encode("sop")
    assert tokenizer.encode("[MASK]", add_special_tokens=False) == [size]
    assert tokenizer.token_id("<|observation|>") == size + 8


def test_added_tokens_stand_where_the_files_say(directory_of):
    directory = directory_of("sentencepiece_bpe", {**LLAMA, "pad_token": "[PAD]"})
    (directory / "added_tokens.json").write_text('{"[PAD]": 600, "<|im_end|>": 603, "word": 601}')
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (600, 604)
    assert tokenizer.encode("one<|im_end|>word", add_special_tokens=False)[-2:] == [603, 601]
    assert {600} <= tokenizer.special_ids
    assert 601 not in tokenizer.special_ids
    assert tokenizer.decode([602, 601]) == "word"  # 602 is a hole


def test_contradicting_ids_are_an_error(directory_of):
    directory = directory_of("sentencepiece_bpe", LLAMA)
    (directory / "added_tokens.json").write_text('{"<s>": 7}')
    with pytest.raises(TokenizerError, match=r"'<s>' should have id 7, but the vocabulary gives it 1"):
        load_tokenizer(directory)
    (directory / "added_tokens.json").write_text('{"[NEW]": 7}')
    with pytest.raises(TokenizerError, match=r"'\[NEW\]' should have id 7, but that is"):
        load_tokenizer(directory)


def test_tokens_that_take_space_or_want_a_word_of_their_own(directory_of):
    tokens = {
        "600": {"content": "[L]", "lstrip": True, "special": True},
        "601": {"content": "[R]", "rstrip": True, "special": True},
        "602": {"content": "own", "single_word": True, "special": False},
        "603": {"content": "[R]x", "special": False},
    }
    tokenizer = load_tokenizer(
        directory_of("sentencepiece_bpe", {**LLAMA, "add_bos_token": False, "added_tokens_decoder": tokens})
    )
    encode = processor_of("sentencepiece_bpe").encode
    assert tokenizer.encode("a  [L] a") == [*encode("a"), 600, *encode(" a")]
    assert tokenizer.encode("a [R]  a") == [*encode("a "), 601, *encode("a")]
    assert tokenizer.encode("owner own") == [*encode("owner "), 602]
    assert tokenizer.encode("[R]x") == [603]  # the longest wins


def test_an_unknown_class_needs_flags(directory_of):
    directory = directory_of("sentencepiece_bpe", {"tokenizer_class": "LamaTokenizer"})
    with pytest.raises(TokenizerError, match=r"'LamaTokenizer' with tokenizer.model is not known.*'LlamaTokenizer'"):
        load_tokenizer(directory)
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "XTokenizer", "add_eos_token": true}')
    assert load_tokenizer(directory).encode("") == [2]


def test_a_written_model_is_read_by_the_library():
    pieces = [("<unk>", 0.0, PieceType.UNKNOWN), ("▁", -2.0, PieceType.NORMAL), ("▁ab", -1.0, PieceType.NORMAL)]
    pieces += [("<end>", 0.0, PieceType.CONTROL), ("é", -3.5, PieceType.NORMAL), ("<x>", 0.0, PieceType.USER_DEFINED)]
    model = write_model(pieces, kind=UNIGRAM, unk_id=0, eos_id=3, remove_extra_whitespaces=True)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    assert processor.encode("  ab  é<x>q", out_type=str) == ["▁ab", "▁", "é", "<x>", "q"]
    assert (processor.eos_id(), processor.bos_id(), processor.unk_id(), processor.pad_id()) == (3, -1, 0, -1)
    assert processor.get_score(4) == -3.5
    assert processor.is_control(3)
