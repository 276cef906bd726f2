"""What a `tokenizer_class` of tokenizer_config.json implies for directories that hold no tokenizer.json.

Such directories carry only the bare vocabulary; how text is split, which special tokens exist and where they stand
was code of the class named. The names are data of the file format. A class that isn't here is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxlm.tokenizers.chats_of_code import ROLES, ROUNDS

# Classes that read a vocab.txt with lower-casing WordPiece and frame a text as [CLS] A [SEP] (B [SEP]).
WORD_PIECE_CLASSES = frozenset(
    {
        "BertTokenizer",
        "ConvBertTokenizer",
        "DistilBertTokenizer",
        "DPRContextEncoderTokenizer",
        "DPRQuestionEncoderTokenizer",
        "DPRReaderTokenizer",
        "ElectraTokenizer",
        "LayoutLMTokenizer",
        "LxmertTokenizer",
        "MobileBertTokenizer",
        "RealmTokenizer",
        "RetriBertTokenizer",
        "SqueezeBertTokenizer",
    }
)
WORD_PIECE_TOKENS = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}

_END_OF_TEXT = {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "unk": "<|endoftext|>"}
_ANGLED = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}
_ENCODER = {**_ANGLED, "sep": "</s>", "cls": "<s>", "pad": "<pad>", "mask": "<mask>"}


@dataclass(frozen=True, kw_only=True)
class ByteLevelClass:
    """A vocab.json with merges.txt.

    pre: name in `pretokenizers.PRE_TOKENIZERS`.  tokens: default special tokens.  paired: frames a text as
    cls A sep (sep B sep).
    """

    pre: str = "gpt-2"
    tokens: dict[str, str] = field(default_factory=lambda: _END_OF_TEXT)
    paired: bool = False


BYTE_LEVEL_CLASSES = {
    "GPT2Tokenizer": ByteLevelClass(),
    "CodeGenTokenizer": ByteLevelClass(),
    "GPTNeoXTokenizer": ByteLevelClass(pre="olmo"),
    "Qwen2Tokenizer": ByteLevelClass(pre="qwen2", tokens={"eos": "<|endoftext|>", "pad": "<|endoftext|>"}),
    "RobertaTokenizer": ByteLevelClass(tokens=_ENCODER, paired=True),
    "LongformerTokenizer": ByteLevelClass(tokens=_ENCODER, paired=True),
    "BartTokenizer": ByteLevelClass(tokens=_ENCODER, paired=True),
}


@dataclass(frozen=True, kw_only=True)
class SentencePieceClass:
    """A SentencePiece model file.

    add_bos, add_eos: defaults of the flags add_bos_token and add_eos_token.  tokens: default special tokens.
    extra_ids: sentinels <extra_id_N> behind the vocabulary, the highest number first.  shifted: ids start with
    <s> <pad> </s> <unk>, the model's follow one higher, <mask> is last.  before: tokens that open every text.
    reserved: further tokens behind the vocabulary, in the order of their ids; matched: those found in a text.
    follows: of the others, text -> the token right behind which it is
    found.  ends: those that end an answer besides eos.  pair_type: token type of the second text of a pair.  templates:
    part of a model's name -> chat template, for models whose files have none.
    """

    add_bos: bool = False
    add_eos: bool = False
    tokens: dict[str, str] = field(default_factory=lambda: _ANGLED)
    extra_ids: int = 0
    shifted: bool = False
    before: tuple[str, ...] = ()
    reserved: tuple[str, ...] = ()
    matched: tuple[str, ...] = ()
    follows: dict[str, str] = field(default_factory=dict)
    ends: tuple[str, ...] = ()
    templates: dict[str, str] = field(default_factory=dict)
    pair_type: int = 1


_SENTINELS = SentencePieceClass(
    add_eos=True, extra_ids=100, pair_type=0, tokens={"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}
)
_CHAT_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

SENTENCEPIECE_CLASSES = {
    "LlamaTokenizer": SentencePieceClass(add_bos=True),
    "CodeLlamaTokenizer": SentencePieceClass(add_bos=True),
    "GemmaTokenizer": SentencePieceClass(
        add_bos=True, tokens={"bos": "<bos>", "eos": "<eos>", "unk": "<unk>", "pad": "<pad>"}
    ),
    "T5Tokenizer": _SENTINELS,
    "MT5Tokenizer": _SENTINELS,
    "XLMRobertaTokenizer": SentencePieceClass(tokens=_ENCODER, shifted=True, pair_type=0),
    "ChatGLMTokenizer": SentencePieceClass(
        tokens={"eos": "</s>", "unk": "<unk>", "pad": "<unk>"},
        before=("[gMASK]", "sop"),
        reserved=("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", *_CHAT_ROLES),
        # "sop" and "eop" are pieces of ordinary words too
        matched=("[MASK]", "[gMASK]", "[sMASK]", *_CHAT_ROLES),
        follows={"sop": "[gMASK]"},
        ends=("<|user|>", "<|observation|>"),
        templates={"chatglm2": ROUNDS, "chatglm3": ROLES},
    ),
}

# Texts that encoders usually give their special tokens.
CONVENTIONS = (WORD_PIECE_TOKENS, {role: _ENCODER[role] for role in ("cls", "sep", "mask", "pad", "unk")})


def default_tokens(name: str | None) -> dict[str, str]:
    """The special tokens that a class has when no file names them; {} for an unknown class."""
    if name in WORD_PIECE_CLASSES:
        return WORD_PIECE_TOKENS
    kind = BYTE_LEVEL_CLASSES.get(name or "") or SENTENCEPIECE_CLASSES.get(name or "")
    return kind.tokens if kind else {}
