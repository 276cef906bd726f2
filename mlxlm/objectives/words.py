"""Where words begin and sentences end, read off the spelling of the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlxlm.errors import TokenizerError

if TYPE_CHECKING:
    from mlxlm.tokenizers import Tokenizer

# What stands for white space at the start of a token: byte-level vocabularies write space, newline, carriage return
# and tab as the first four, SentencePiece writes a space as the last.
_BYTE_LEVEL = ("Ġ", "Ċ", "č", "ĉ")
_SENTENCE_PIECE = "▁"
_CONTINUED = "##"
_SENTENCE_ENDS = (".", "?", "!", "。", "？", "！", "…", "Ċ", "\n", "<0x0A>", "ãĢĤ", "ï¼Ł", "ï¼ģ")


def spellings(tokenizer: Tokenizer) -> list[str]:
    """How the vocabulary spells each id; "" for ids that it does not use."""
    names = []
    for number in range(tokenizer.vocab_size):
        try:
            names.append(tokenizer.token(number))
        except TokenizerError:
            names.append("")
    return names


def unusable(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that never stand for text: special tokens, and ids that the vocabulary does not use."""
    return tokenizer.special_ids | {number for number, name in enumerate(spellings(tokenizer)) if name == ""}


def word_starts(tokenizer: Tokenizer) -> np.ndarray:
    """Whether a token begins a word, bool (vocab_size,); special tokens do.

    Pieces that go on are marked with ## (WordPiece), or those that begin are marked with a space (byte-level and
    SentencePiece vocabularies). Raises TokenizerError for a vocabulary that marks neither.
    """
    names = spellings(tokenizer)
    if any(name.startswith(_CONTINUED) and len(name) > 2 for name in names):
        starts = np.array([not name.startswith(_CONTINUED) for name in names])
    else:
        begun = [name.startswith((*_BYTE_LEVEL, _SENTENCE_PIECE)) for name in names]
        if not any(begun):
            raise TokenizerError("this vocabulary marks no words: neither ## nor spaces begin its tokens")
        starts = np.array(begun)
    starts[list(tokenizer.special_ids)] = True
    return starts


def sentence_ends(tokenizer: Tokenizer) -> np.ndarray:
    """Whether a token ends a sentence, bool (vocab_size,): it ends with . ? ! or a line break, in any script's form."""
    return np.array([name.endswith(_SENTENCE_ENDS) for name in spellings(tokenizer)])
