"""Tokenizers that are trained: special tokens, lossless text, the same result each time, errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from mlxlm.errors import TokenizerError, UsageError
from mlxlm.tokenizers import load_tokenizer
from mlxlm.tokenizers.train_special_tokens import KINDS, OBJECTIVES
from mlxlm.tokenizers.training import measure_tokenizer, train_tokenizer

SIZE = 640
TEXT = Path(__file__).read_text(encoding="utf-8")


def documents():
    return [TEXT, TEXT.upper(), "naïve café 東京 — philosophy soap\n"]


def size_of(kind, objective):
    """Unigram can't have more pieces than the texts give."""
    return SIZE if kind != "sentencepiece-unigram" else 520 if objective == "span-corruption" else 420


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    made = {}

    def get(kind, objective):
        if (kind, objective) not in made:
            folder = tmp_path_factory.mktemp("trained") / "tokenizer"
            size = size_of(kind, objective)
            made[kind, objective] = train_tokenizer(
                documents, folder, kind=kind, vocab_size=size, objective=objective, special=("<|user|>",)
            )
        return made[kind, objective]

    return get


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_objective_has_its_special_tokens(trained, kind, objective):
    tokenizer = trained(kind, objective)
    assert tokenizer.vocab_size == size_of(kind, objective)
    assert tokenizer.pad_id is not None
    names = {
        "causal": [],
        "masked": ["[CLS]", "[SEP]", "[MASK]"],
        "span-corruption": [f"<extra_id_{number}>" for number in range(100)],
        "blank-infilling": ["[MASK]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>"],
    }[objective]
    for name in [*names, "<|user|>"]:
        number = tokenizer.token_id(name)
        assert number in tokenizer.special_ids
        found = tokenizer.encode(f"a{name}b", add_special_tokens=False)
        assert found.count(number) == 1, name
    if objective == "masked":
        assert None not in (tokenizer.mask_id, tokenizer.cls_id, tokenizer.sep_id)
    else:
        assert tokenizer.eos_id is not None
    if objective == "span-corruption":
        assert tokenizer.token_id("<extra_id_0>") == tokenizer.vocab_size - 1
        assert tokenizer.token_id("<extra_id_99>") == tokenizer.vocab_size - 100
        assert tokenizer.encode("soap")[-1] == tokenizer.eos_id


@pytest.mark.parametrize("kind", KINDS[:3])
def test_text_comes_back_whole(trained, kind):
    tokenizer = trained(kind, "causal")
    for text in ("def f(x):\n    return  x\n", "naïve café", "東京 🙂 \t end", "philosophy soap"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("kind", KINDS[:2])
def test_pieces_are_those_that_sentencepiece_itself_finds(tmp_path, kind):
    made = train_tokenizer(documents, tmp_path / "t", kind=kind, vocab_size=420)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t" / "tokenizer.model"))
    for line in [*TEXT.splitlines(), TEXT, "naïve café", "東京 🙂 \t  end", "  two", ""]:
        assert made.encode(line) == theirs.EncodeAsIds(line), line


def test_word_pieces_are_of_the_text(trained):
    tokenizer = trained("wordpiece", "masked")
    ids = tokenizer.encode("philosophy")
    assert (ids[0], ids[-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert tokenizer.decode(ids) == "philosophy"
    _, types = tokenizer.encode_with_types("soap", "soap")
    assert types[0] == 0
    assert types[-1] == 1


_TRAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from test_training_tokenizers import documents
from mlxlm.tokenizers.training import train_tokenizer
for kind in ("wordpiece", "byte-level-bpe", "sentencepiece-bpe", "sentencepiece-unigram"):
    train_tokenizer(documents, sys.argv[2] + "/" + kind, kind=kind, vocab_size=420, objective="masked")
"""


def test_the_same_texts_give_the_same_files_in_every_process(tmp_path):
    here = str(Path(__file__).parent)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    for name in ("one", "two"):
        arguments = [sys.executable, "-c", _TRAIN, here, str(tmp_path / name)]
        subprocess.run(arguments, env=environment, check=True, timeout=120)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(files) == 10
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_lower_case_is_kept_in_the_file(tmp_path):
    made = train_tokenizer(
        documents, tmp_path / "t", kind="wordpiece", vocab_size=300, objective="masked", lower_case=True
    )
    assert made.encode("SOAP") == made.encode("soap")
    assert load_tokenizer(tmp_path / "t").encode("SOAP") == made.encode("soap")


def test_statistics_count_by_hand(tmp_path):
    made = train_tokenizer(lambda: ["zzzz"], tmp_path / "t", kind="byte-level-bpe", vocab_size=258)
    found = measure_tokenizer(made, ["aé", "aaa"])
    assert (found.documents, found.characters, found.bytes, found.tokens, found.used) == (2, 5, 6, 6, 3)
    assert found.unknown == 0
    assert found.rates()["characters_per_token"] == 5 / 6
    assert found.rates()["bytes_per_token"] == 1.0
    assert found.rates()["vocabulary_use"] == 3 / 258


def test_unknown_tokens_are_counted(tmp_path):
    made = train_tokenizer(lambda: ["ab ab"], tmp_path / "t", kind="wordpiece", vocab_size=20, objective="masked")
    found = measure_tokenizer(made, ["ab xy"])
    assert (found.tokens, found.unknown) == (2, 1)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"kind": "wordpeice"}, UsageError, "unknown tokenizer kind 'wordpeice'; did you mean 'wordpiece'"),
        ({"objective": "casual"}, UsageError, "unknown tokenizer objective 'casual'; did you mean 'causal'"),
        ({"lower_case": True}, UsageError, "lower-casing is for wordpiece only"),
        ({"special": ("a", "a")}, UsageError, "distinct"),
        ({"vocab_size": 200}, TokenizerError, "vocab_size 200 is too small"),
        ({"kind": "sentencepiece-bpe", "vocab_size": 100}, TokenizerError, "vocab_size 100 is too small"),
        ({"kind": "sentencepiece-unigram", "vocab_size": 99999}, TokenizerError, "99999 tokens from these texts"),
    ],
    ids=["kind", "objective", "lower case", "twice", "small", "small sentencepiece", "too few texts"],
)
def test_mistakes_are_named_and_leave_no_folder(tmp_path, wrong, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(documents, tmp_path / "t", **{"kind": "byte-level-bpe", "vocab_size": 300, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_is_not_overwritten(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"precious")
    with pytest.raises(TokenizerError, match=r"holds tokenizer\.model of another tokenizer"):
        train_tokenizer(documents, tmp_path, kind="byte-level-bpe", vocab_size=300)
    assert (tmp_path / "tokenizer.model").read_bytes() == b"precious"


@pytest.mark.parity
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_reads_the_same(trained, tmp_path, kind, objective):
    transformers = pytest.importorskip("transformers")
    made = trained(kind, objective)
    folder = tmp_path / "t"
    size = made.vocab_size
    train_tokenizer(documents, folder, kind=kind, vocab_size=size, objective=objective, special=("<|user|>",))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert len(theirs) == size
    for text in (TEXT[:500], "a <|user|> b", "naïve café 東京 🙂", ""):
        assert theirs.encode(text) == made.encode(text)
    for role in ("pad", "eos", "mask", "cls", "sep"):
        assert getattr(theirs, f"{role}_token_id") == getattr(made, f"{role}_id"), role
