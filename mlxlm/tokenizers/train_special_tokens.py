"""The special tokens that a training objective needs, by the kind of vocabulary that is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("sentencepiece-bpe", "sentencepiece-unigram", "byte-level-bpe", "wordpiece")
OBJECTIVES = ("causal", "masked", "span-corruption", "blank-infilling")
NUM_SENTINELS = 100

_MASKS = ("[MASK]", "[sMASK]", "[gMASK]", "<|startofpiece|>", "<|endofpiece|>")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """What a vocabulary reserves.

    roles: "pad", "eos", ... -> text.  others: further special tokens, in the order of their ids.
    before, after: roles of the tokens set around a text (after also ends the second text of a pair).
    """

    roles: dict[str, str]
    others: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    sentinels: tuple[str, ...] = field(default=())

    @property
    def first(self) -> list[str]:
        """All but the sentinels, each once."""
        return list(dict.fromkeys([*self.roles.values(), *self.others]))


def special_tokens(kind: str, objective: str, further: tuple[str, ...] = ()) -> SpecialTokens:
    """The tokens of an objective for a kind of vocabulary, and the user's further ones.

    Sentinels stand at the end of the vocabulary, the first one last. The pieces of blank infilling begin and end with
    tokens in angle brackets, since a bare `sop` is part of ordinary words such as "philosophy".
    """
    if kind.startswith("sentencepiece"):
        roles = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
        if kind == "sentencepiece-bpe":
            roles = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}
    elif kind == "wordpiece":
        roles = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]"}
    else:
        roles = {"pad": "<|pad|>"}
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    if objective == "causal":
        roles = {"bos": "<|endoftext|>", "eos": "<|endoftext|>"} | roles if kind == "byte-level-bpe" else roles
    elif objective == "masked":
        roles |= {"cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
        before, after = ("cls",), ("sep",)
    elif objective == "span-corruption":
        roles |= {"eos": "</s>"}
        after = ("eos",)
    else:
        roles |= {"eos": roles.get("eos", "<|endoftext|>"), "cls": "[CLS]", "mask": "[MASK]"}
        others = _MASKS
    if kind == "wordpiece" and not after:
        before, after = ("cls",), ("sep",)
    if kind == "wordpiece" and objective == "causal":
        roles |= {"eos": "[SEP]"}
    count = NUM_SENTINELS if objective == "span-corruption" else 0
    sentinels = tuple(f"<extra_id_{number}>" for number in reversed(range(count)))
    return SpecialTokens(roles=roles, others=(*others, *further), before=before, after=after, sentinels=sentinels)
