"""Streams of ids: the pieces make the whole, none ends in half a character, each costs the same at any length."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers.detokenizer import compile_stages, drain, push
from mlxlm.tokenizers.tokenizers_backend import TokenizersBackend

EMOJI = [
    "👩‍👩‍👧‍👦",
    "👍🏽",
    "🇩🇪",
    "❤️",
    "🤷‍♀️",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "é",
    "e\u0301",
    "किं",
    "각",
    "\ufffd",
    " ",
    "  ",
    "\n",
    "<s>",
    "</s>",
    "[SEP]",
]
TEXTS = (
    st.lists(st.one_of(st.sampled_from(EMOJI), st.text(max_size=6)), max_size=12)
    .map("".join)
    .filter(lambda text: not any(0xD800 <= ord(character) < 0xE000 for character in text))
)
PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pieces_of(tokenizer, ids, **options):
    stream = tokenizer.detokenizer(**options)
    return [*(stream.add(id) for id in ids), stream.finish()]


@PROPERTY
@given(text=TEXTS, skip=st.booleans())
def test_the_pieces_of_an_encoded_text_make_its_decoded_text(any_tokenizer, text, skip):
    ids = any_tokenizer.encode(text)
    pieces = pieces_of(any_tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=skip)


@PROPERTY
@given(data=st.data(), skip=st.booleans())
def test_the_pieces_of_random_ids_make_their_decoded_text(any_tokenizer, data, skip):
    ids = data.draw(st.lists(st.integers(0, any_tokenizer.vocab_size + 3), max_size=30))
    pieces = pieces_of(any_tokenizer, ids, skip_special_tokens=skip)
    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special_tokens=skip)


@PROPERTY
@given(text=TEXTS)
def test_no_piece_of_a_valid_text_holds_half_a_character(any_tokenizer, text):
    pieces = pieces_of(any_tokenizer, any_tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("emoji", EMOJI[:7])
def test_a_character_of_several_tokens_comes_whole(library_tokenizer, emoji):
    ids = library_tokenizer.encode(emoji, add_special_tokens=False)
    pieces = pieces_of(library_tokenizer, ids)
    assert len(ids) > len([piece for piece in pieces if piece])
    assert "".join(pieces) == emoji


def test_text_round_trips_through_vocabularies_without_loss(library_tokenizer, texts):
    for text in texts:
        ids = library_tokenizer.encode(text, add_special_tokens=False)
        if "e\u0301" not in text and "[MASK]" not in text:  # normal form C and a token that swallows spaces
            assert library_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_ids_that_the_vocabulary_does_not_use_give_nothing(any_tokenizer):
    ids = any_tokenizer.encode("time", add_special_tokens=False)
    beyond = any_tokenizer.vocab_size + 7
    assert any_tokenizer.decode([*ids, beyond]) == any_tokenizer.decode(ids)


@pytest.mark.parametrize("bad", [-1, -100, 1.5, "7", None, 2**40], ids=repr)
def test_what_is_no_id_is_refused(any_tokenizer, bad):
    with pytest.raises(TokenizerError, match="id"):
        any_tokenizer.decode([bad])


def test_ids_may_be_numpy_or_mlx_scalars(library_tokenizer):
    mx = pytest.importorskip("mlx.core")
    np = pytest.importorskip("numpy")
    ids = library_tokenizer.encode("Hello you")
    assert library_tokenizer.decode(np.array(ids)) == library_tokenizer.decode(ids)
    assert library_tokenizer.decode(mx.array(ids)) == library_tokenizer.decode(ids)
    assert library_tokenizer.token(np.int32(ids[1])) == library_tokenizer.token(ids[1])


def test_the_cost_of_a_piece_does_not_grow(any_tokenizer):
    ids = list(itertools.islice(itertools.cycle(any_tokenizer.encode("quick 😀 brown  fox ")), 60_000))
    stream = any_tokenizer.detokenizer()
    start = time.perf_counter()
    for id in ids:
        stream.add(id)
    # A few microseconds each; decoding all that came before, each time, would take minutes.
    assert time.perf_counter() - start < 20


TOKENS = ["▁", "▁a", "a", "b▁c", "▁▁", " x ", "##s", "##", ".", "'s", " do not", "n't", "<0xE2>", "<0x82>", "<0xAC>"]
TOKENS += [
    "<0xF0>",
    "<0x9F>",
    "<0x41>",
    "<0xff>",
    "<0x4>",
    "Ġd",
    "Ã",
    "©",
    "ðŁ",
    "ĺ",
    "Ģ",
    "你",
    "w</w>",
    "</w>",
    "--",
    "-",
]
CHAINS = {
    "byte-level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(),
    "metaspace-first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace-never": decoders.Metaspace(prepend_scheme="never"),
    "word-piece": decoders.WordPiece(),
    "word-piece-raw": decoders.WordPiece(prefix="##", cleanup=False),
    "end-of-word": decoders.BPEDecoder(suffix="</w>"),
    "byte-fallback": decoders.ByteFallback(),
    "strip-tokens": decoders.Strip(" ", 1, 1),  # on texts shorter than what it strips the library panics
    "fallback-chain": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "no-prefix-chain": decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    "strip-text": decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 3, 0)]),
    "replace-text": decoders.Sequence([decoders.Fuse(), decoders.Replace("--", "+"), decoders.Replace("▁a", "[A]")]),
    "replace-tokens": decoders.Sequence([decoders.Replace("▁▁", "="), decoders.Metaspace()]),
    "byte-level-strip": decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)]),
    "ctc": decoders.CTC(pad_token="a"),  # has no streaming form: all comes at the end
    "regex": decoders.Sequence([decoders.Fuse(), decoders.Replace(__import__("tokenizers").Regex("a+"), "b")]),
    "none": None,
}


@pytest.mark.parametrize("name", CHAINS)
@PROPERTY
@given(ids=st.lists(st.integers(0, len(TOKENS) - 1), max_size=12))
def test_every_chain_of_decoders_gives_the_library_s_text(name, ids):
    library = Library(models.WordLevel({token: id for id, token in enumerate(TOKENS)}, unk_token="a"))
    if CHAINS[name] is not None:
        library.decoder = CHAINS[name]
    expected = library.decode(ids, skip_special_tokens=False)
    stream = TokenizersBackend(library).stream()
    assert "".join([stream.add(id) for id in ids]) + stream.finish() == expected


@PROPERTY
@given(tokens=st.lists(st.sampled_from(["a", " ", "  ", "", " a ", "b"]), max_size=10))
def test_stripping_a_whole_text_that_comes_in_chunks(tokens):
    text = "".join(tokens)
    if not text.strip():
        text = text[2:-3] if len(text) > 5 else ""
    else:
        for _ in range(2):
            text = text.removeprefix(" ")
        for _ in range(3):
            text = text.removesuffix(" ")
    spec = {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 2, "stop": 3}],
    }
    stages = compile_stages(spec)()
    assert "".join([push(stages, (token,)) for token in tokens]) + drain(stages) == text


@PROPERTY
@given(
    tokens=st.lists(
        st.sampled_from(["a", " ", " .", ".", " n", "'t", " ' ", "'", " 's", " do", " not", "!"]), max_size=15
    )
)
def test_cleaning_up_spaces_equals_replacing_in_the_whole_text(tokens):
    whole = "".join(tokens)
    for pattern in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        whole = whole.replace(pattern, pattern.strip())
    stages = compile_stages({"type": "Fuse"}, clean_up=True)()
    assert "".join([push(stages, (token,)) for token in tokens]) + drain(stages) == whole


def test_what_is_certain_is_not_held_back(any_tokenizer):
    chain = {
        "type": "Sequence",
        "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    stages = compile_stages(chain, clean_up=True)()
    assert [push(stages, (token,)) for token in (" a", "bc", " ", "d", " n", "'t")] == ["a", "bc", "", " d", "", "n't"]
    stream = any_tokenizer.detokenizer()
    pieces = [stream.add(id) for id in any_tokenizer.encode("the fox", add_special_tokens=False)]
    assert "".join(pieces) == "the fox"
    assert stream.finish() == ""
