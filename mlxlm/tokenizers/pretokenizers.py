r"""How byte-level BPE vocabularies cut a text into words before merging: the values of `tokenizer.ggml.pre`.

A GGUF file names the cut, it does not hold it. Each entry follows the published tokenizer.json of the models that the
name was made for; where llama.cpp's reimplementation differs from it, the published one counts.

An expression isolates its matches: each match and each stretch between matches goes on separately to the next step.
`\p{N}` is one digit (or other numeral) at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """One way to cut a text.

    steps: expressions in order; "bytes" turns characters into bytes in between, "words" does that and cuts as GPT-2
    did.  A list without either ends in "bytes".  nfc: the text is put into Unicode normal form C first.
    ignore_merges: a word that is in the vocabulary is taken whole.  add_bos: the vocabulary puts bos in front unless
    the file says otherwise.
    """

    steps: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False

    def build(self, add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
        """The pre-tokenizer of the `tokenizers` library. add_prefix_space: put a space in front of a text without."""
        steps = self.steps if {"bytes", "words"} & {*self.steps} else (*self.steps, "bytes")
        parts = []
        for step in steps:
            if step in ("bytes", "words"):
                parts.append(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=step == "words"))
            else:
                parts.append(pre_tokenizers.Split(Regex(step), behavior="isolated"))
        return parts[0] if len(parts) == 1 else pre_tokenizers.Sequence(parts)


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CHINESE = "[一-龥ࠀ-一가-퟿]+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(numbers: str, letters: str = r"\p{L}", contractions: str = _CONTRACTIONS + "|") -> str:
    """Contractions, words with one leading mark, numbers, marks with line ends, white space."""
    marks = r"[^\s\p{L}\p{N}]" if letters == r"\p{L}" else r"[^\s\p{L}\p{M}\p{N}]"
    return rf"{contractions}[^\r\n\p{{L}}\p{{N}}]?{letters}+|{numbers}| ?{marks}+[\r\n]*|{_TAIL}"


def _cased_words(numbers: str, suffix: str) -> str:
    """As `_words`, but an upper-case run and the lower-case run behind it are one word."""
    lead = r"[^\r\n\p{L}\p{N}]?"
    return (
        f"{lead}{_UPPER}*{_LOWER}+{suffix}|{lead}{_UPPER}+{_LOWER}*{suffix}"
        rf"|{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
    )


# Cased letters as of Unicode 11, mathematical alphabets excluded: spans of code points.
_CASED = "".join(
    "-".join(rf"\x{{{end}}}" for end in span.split("-"))
    for span in (
        "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
        "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
        "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
        "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
        "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
        "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
        "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
        "1E900-1E943 "
    ).split()
)
_PUNCTUATION = r"[\p{P}$+<=>^`|~]+"
_SPACED = r" ?[^(\s|.,!?…。，、।۔،)]+"

_GPT2 = PreTokenizer(steps=("words",))
_GPT2_NFC = PreTokenizer(steps=("words",), nfc=True)
_DIGITS = PreTokenizer(steps=(r"\p{N}", "words"))
_LLAMA3 = PreTokenizer(steps=(_words(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_TRIPLES = PreTokenizer(steps=(_words(r"\p{N}{1,3}"),))
_QWEN2 = PreTokenizer(steps=(_words(r"\p{N}"),), nfc=True)
_SINGLES = PreTokenizer(steps=(_words(r"\p{N}"),))
_GPT4O = PreTokenizer(steps=(_cased_words(r"\p{N}{1,3}", f"{_CONTRACTIONS}?"),))

_GROUPS: tuple[tuple[PreTokenizer, tuple[str, ...]], ...] = (
    (
        PreTokenizer(steps=(r"[\p{P}$+<=>^~|]+", "words", r"\p{N}+", "[0-9][0-9][0-9]")),
        ("default",),
    ),
    (_GPT2, ("gpt-2", "phi-2", "mpt", "jais", "exaone4", "trillion", "granite-docling", "mellum", "gigachat")),
    (_GPT2, ("roberta-bpe", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de", "jina-v2-code")),
    (_GPT2_NFC, ("olmo", "modern-bert")),
    (_DIGITS, ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")),
    (_LLAMA3, ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2")),
    (_TRIPLES, ("dbrx", "smaug-bpe", "chatglm-bpe", "glm4")),
    (_QWEN2, ("qwen2", "deepseek-r1-qwen", "megrez")),
    (_SINGLES, ("stablelm2", "hunyuan", "grok-2")),
    (PreTokenizer(steps=(_words(r"\p{N}", letters=r"[\p{L}\p{M}]"),), nfc=True), ("qwen35",)),
    (_GPT4O, ("gpt-4o", "llama4", "kanana2", "minimax-m2")),
    (
        PreTokenizer(steps=(_cased_words(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
        ("tekken",),
    ),
    (
        # The last two steps run on bytes spelled as characters, as published.
        PreTokenizer(steps=(_PUNCTUATION, "words", r"\p{N}+", "[0-9][0-9][0-9]")),
        ("falcon",),
    ),
    (
        PreTokenizer(
            steps=(
                r"[\r\n]",
                rf"\s?[{_CASED}]+",
                r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
                r"\s+$",
                _CHINESE,
                r"\p{N}",
            )
        ),
        ("deepseek-llm",),
    ),
    (
        PreTokenizer(steps=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CHINESE, r"\p{N}")),
        ("deepseek-coder",),
    ),
    (
        PreTokenizer(
            steps=(
                r"\p{N}{1,3}",
                "[一-龥぀-ゟ゠-ヿ]+",
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
                rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}",
            )
        ),
        ("deepseek-v3", "hunyuan-dense"),
    ),
    (PreTokenizer(steps=(_SPACED,)), ("bloom", "poro-chat", "gpt3-finnish")),
    (PreTokenizer(steps=(_SPACED, r"\p{N}")), ("viking",)),
)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {name: entry for entry, names in _GROUPS for name in names}
