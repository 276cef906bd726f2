"""Training tokenizers: SentencePiece BPE and Unigram, byte-level BPE and WordPiece.

The libraries do the counting; this file gives them the same input in the same order with everything fixed that could
vary, so that the same texts always give the same vocabulary. What is written loads here and in transformers.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxlm.errors import TokenizerError, UsageError, nearest
from mlxlm.tokenizers.loading import VOCABULARY_FILES
from mlxlm.tokenizers.train_special_tokens import KINDS, OBJECTIVES, SpecialTokens, special_tokens

if TYPE_CHECKING:
    import tokenizers

    from mlxlm.tokenizers.tokenizer import Tokenizer

Documents = Callable[[], Iterable[str]]

_THREADS = 4  # part of the recipe: SentencePiece adds up its threads' counts
_LONGEST_LINE = 1 << 14  # characters; SentencePiece's work grows with the square of a line
_ALPHABET = 1000  # characters that a WordPiece vocabulary keeps, the most frequent
_BATCH = 256


def train_tokenizer(
    documents: Documents,
    output: str | Path,
    *,
    kind: str,
    vocab_size: int,
    objective: str = "causal",
    special: Sequence[str] = (),
    lower_case: bool = False,
) -> Tokenizer:
    """Train a tokenizer, write it to a folder and load it from there.

    documents: gives the texts, the same ones at each call.  kind: one of KINDS.  vocab_size: ids in all, special
    tokens included.  objective: one of OBJECTIVES; decides the special tokens.  special: further ones.
    lower_case: WordPiece only.

    Raises UsageError for an unknown kind or objective, TokenizerError when the texts can't give such a vocabulary or
    the folder holds another tokenizer. The folder appears with all its files or unchanged.
    """
    for name, value, choices in (("kind", kind, KINDS), ("objective", objective, OBJECTIVES)):
        if value not in choices:
            raise UsageError(f"unknown tokenizer {name} {value!r}{nearest(value, choices)}")
    if lower_case and kind != "wordpiece":
        raise UsageError(f"lower-casing is for wordpiece only, not for {kind}")
    if "" in special or len(set(special)) != len(special):
        raise UsageError("special tokens must be distinct and not empty")
    output = Path(output)
    present = [name for name in VOCABULARY_FILES if (output / name).exists()]
    if present:
        raise TokenizerError(f"{output} holds {present[0]} of another tokenizer; remove it, or choose another folder")
    tokens = special_tokens(kind, objective, tuple(special))
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}.", suffix=".tmp", dir=output.parent))
    try:
        if kind.startswith("sentencepiece"):
            _train_sentencepiece(documents, scratch, kind.removeprefix("sentencepiece-"), vocab_size, tokens)
        else:
            _train_library(documents, scratch, kind, vocab_size, tokens, lower_case)
        _load(scratch)  # what can't be read again is not handed out
        output.mkdir(exist_ok=True)
        for path in sorted(scratch.iterdir(), key=lambda path: path.name in VOCABULARY_FILES):
            os.replace(path, output / path.name)
    except OSError as error:
        raise TokenizerError(f"{output}: can't be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return _load(output)


def _load(folder: Path) -> Tokenizer:
    from mlxlm.tokenizers import load_tokenizer

    return load_tokenizer(folder)


def _write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def _config(tokens: SpecialTokens, **settings: Any) -> bytes:
    config = {
        **settings,
        **{f"{role}_token": text for role, text in tokens.roles.items()},
        "clean_up_tokenization_spaces": False,
    }
    further = [text for text in (*tokens.others, *tokens.sentinels) if text not in tokens.roles.values()]
    if further:
        config["additional_special_tokens"] = further
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines that are not empty, long ones in pieces."""
    for document in documents:
        for line in document.splitlines():
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]


def _train_sentencepiece(
    documents: Documents, folder: Path, model_type: str, vocab_size: int, tokens: SpecialTokens
) -> None:
    """A tokenizer.model, and the tokenizer.json that is read: the pieces, then the special tokens that are none.

    Text is kept as it is (no normal form, no joined spaces) and characters without a piece become bytes, so that
    every text comes back whole.
    """
    import sentencepiece

    ids = {f"{role}_id": -1 for role in ("unk", "bos", "eos", "pad")}
    own = {role: text for role, text in tokens.roles.items() if f"{role}_id" in ids}
    ids |= {f"{role}_id": number for number, role in enumerate(own)}
    behind = [text for text in tokens.first if text not in own.values()] + list(tokens.sentinels)
    least = len(own) + 256 + len(behind) + 1
    if vocab_size < least:
        raise TokenizerError(f"vocab_size {vocab_size} is too small; expected at least {least}: special tokens, bytes")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_lines(documents()),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size - len(behind),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            split_digits=True,
            max_sentence_length=8 * _LONGEST_LINE,
            character_coverage=0.9999,
            num_threads=_THREADS,
            minloglevel=2,
            **{f"{role}_piece": text for role, text in own.items()},
            **ids,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1].rpartition("] ")[2]
        raise TokenizerError(f"no SentencePiece model of {vocab_size} tokens from these texts: {reason}") from None
    _write(folder, "tokenizer.model", model.getvalue())
    library = sentencepiece_library(model.getvalue(), model_type)
    library.add_special_tokens([*own.values(), *behind])
    _frame(library, tokens)
    _write(folder, "tokenizer.json", library.to_str(pretty=False).encode())
    _write(folder, "tokenizer_config.json", _config(tokens, tokenizer_class="PreTrainedTokenizerFast"))


def sentencepiece_library(model: bytes, model_type: str) -> tokenizers.Tokenizer:
    """A trained SentencePiece model as the `tokenizers` library runs it, which transformers reads without guessing.

    model: the serialized file.  model_type: "bpe" or "unigram".  For models as they are trained here: text unchanged,
    a space in front, bytes for characters without a piece.
    """
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.IdToPiece(number) for number in range(processor.GetPieceSize())]
    scores = [processor.GetScore(number) for number in range(len(pieces))]
    if model_type == "unigram":
        library = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), processor.unk_id(), True))
    else:
        ids = {piece: number for number, piece in enumerate(pieces)}
        merges = [
            (-scores[number], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
            for number, piece in enumerate(pieces)
            if not (processor.IsControl(number) or processor.IsUnknown(number) or processor.IsByte(number))
            for cut in range(1, len(piece))
            if piece[:cut] in ids and piece[cut:] in ids
        ]
        unknown = pieces[processor.unk_id()]
        pairs = [merge[3:] for merge in sorted(merges)]
        library = Tokenizer(models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return library


def _train_library(
    documents: Documents, folder: Path, kind: str, vocab_size: int, tokens: SpecialTokens, lower_case: bool
) -> None:
    """A tokenizer.json: special tokens first, sentinels last."""
    size = vocab_size - len(tokens.sentinels)
    least = len(tokens.first) + (256 if kind == "byte-level-bpe" else 2)
    if size < least:
        raise TokenizerError(
            f"vocab_size {vocab_size} is too small; expected at least {least + len(tokens.sentinels)}: special tokens "
            "and an alphabet"
        )
    if kind == "byte-level-bpe":
        library = _train_byte_level(documents, size, tokens)
    else:
        library = _train_word_piece(documents, size, tokens, lower_case)
    library.add_special_tokens([*tokens.first, *tokens.sentinels])
    _frame(library, tokens)
    _write(folder, "tokenizer.json", library.to_str(pretty=False).encode())
    _write(folder, "tokenizer_config.json", _config(tokens, tokenizer_class="PreTrainedTokenizerFast"))


def _train_byte_level(documents: Documents, size: int, tokens: SpecialTokens) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=tokens.first,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(iter(documents()), trainer)
    return library


def _train_word_piece(documents: Documents, size: int, tokens: SpecialTokens, lower_case: bool) -> tokenizers.Tokenizer:
    """WordPiece, its alphabet counted here: the library's own order of the "##" characters differs from run to run."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    from mlxlm.tokenizers.vocabulary_files import word_piece

    normalizer = normalizers.BertNormalizer(lowercase=lower_case)
    counts: Counter[str] = Counter()
    for document in documents():
        counts.update(normalizer.normalize_str(document))
    characters = [character for character in counts if not character.isspace()]
    if not characters:
        raise TokenizerError("the texts have no characters to make a vocabulary of")
    room = min(_ALPHABET, (size - len(tokens.first)) // 2)
    alphabet = sorted(sorted(characters, key=lambda one: (-counts[one], one))[:room])
    trained = Tokenizer(models.WordPiece(unk_token=tokens.roles["unk"]))
    trained.normalizer, trained.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    # Named as special tokens the "##" characters get their ids before the library meets them in its hash order.
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        special_tokens=[*tokens.first, *alphabet, *("##" + character for character in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    trained.train_from_iterator(iter(documents()), trainer)
    model = json.loads(trained.to_str())["model"]
    return word_piece(model["vocab"], tokens.roles, lower_case=lower_case)


def _frame(library: tokenizers.Tokenizer, tokens: SpecialTokens) -> None:
    from tokenizers import processors

    if not (tokens.before or tokens.after):
        return
    before, after = ([tokens.roles[role] for role in roles] for roles in (tokens.before, tokens.after))
    pair_type = 1 if before else 0
    second = ["$B:%d" % pair_type, *(f"{text}:{pair_type}" for text in after)]  # noqa: UP031
    library.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *second],
        special_tokens=[(text, library.token_to_id(text)) for text in dict.fromkeys([*before, *after])],
    )


@dataclass(frozen=True, kw_only=True)
class TokenStatistics:
    """How a tokenizer treats some texts; special tokens set around a text are not counted.

    documents, characters, bytes (UTF-8), tokens: totals.  unknown: tokens that are the unknown token.
    used: different ids that occur.  vocab_size: ids there are.
    """

    documents: int
    characters: int
    bytes: int
    tokens: int
    unknown: int
    used: int
    vocab_size: int

    def rates(self) -> dict[str, float]:
        """Characters and bytes a token, the unknown rate and the share of the vocabulary in use."""
        tokens = max(self.tokens, 1)
        return {
            "characters_per_token": self.characters / tokens,
            "bytes_per_token": self.bytes / tokens,
            "unknown_rate": self.unknown / tokens,
            "vocabulary_use": self.used / max(self.vocab_size, 1),
        }


def measure_tokenizer(tokenizer: Tokenizer, documents: Iterable[str]) -> TokenStatistics:
    """Count what a tokenizer makes of texts, a few of them at a time."""
    counts: Counter[int] = Counter()
    totals = [0, 0, 0]
    batch: list[str] = []

    def count() -> None:
        for text, ids in zip(batch, tokenizer.encode_batch(batch, add_special_tokens=False), strict=True):
            counts.update(ids)
            for place, value in enumerate((1, len(text), len(text.encode("utf-8")))):
                totals[place] += value
        batch.clear()

    for document in documents:
        batch.append(document)
        if len(batch) == _BATCH:
            count()
    count()
    unknown = 0 if tokenizer.unk_id is None else counts[tokenizer.unk_id]
    used = sum(1 for number in counts.values() if number)
    return TokenStatistics(
        documents=totals[0],
        characters=totals[1],
        bytes=totals[2],
        tokens=sum(counts.values()),
        unknown=unknown,
        used=used,
        vocab_size=tokenizer.vocab_size,
    )
