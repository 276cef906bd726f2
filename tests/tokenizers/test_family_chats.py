"""The chat of every family that has one: from template and special tokens, as its publisher documents them, to ids.

Templates of checkpoints come with them; those here are short ones of the same effect. Models whose prompts were made by
remote code have theirs in the package.
"""

from __future__ import annotations

import json

import pytest

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers import load_tokenizer

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}
MORE = {"role": "user", "content": "Bye"}
CHAT = [SYSTEM, USER, ANSWER, MORE]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOL_JSON = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'

# The role between two texts, what is said, an end.
TURNS = """{{ opening }}{% for m in messages %}{{ before ~ m.role ~ behind ~ m.content | trim ~ end }}{% endfor %}
{%- if add_generation_prompt %}{{ before ~ 'assistant' ~ behind }}{% endif %}"""


def turns(opening: str, before: str, behind: str, end: str) -> str:
    """A template whose turns differ by the name of the role only."""
    names = {"opening": opening, "before": before, "behind": behind, "end": end}
    return "".join(f"{{% set {name} = {json.dumps(text)} %}}" for name, text in names.items()) + TURNS


INSTRUCTION = """{{ bos_token }}{% set told = namespace(text='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set told.text = '<<SYS>>\\n' ~ m.content ~ '\\n<</SYS>>\\n\\n' %}
{%- elif m.role == 'user' %}
    {%- if not loop.first and not messages[loop.index0 - 1].role == 'system' %}{{ bos_token }}{% endif %}
    {{- '[INST] ' ~ told.text ~ m.content ~ ' [/INST]' }}{% set told.text = '' %}
{%- else %}{{ ' ' ~ m.content ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"""

# Tools stand before the last question; there is a token for everything and no system token.
BRACKETS = """{{ bos_token }}{% set told = namespace(text='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set told.text = m.content ~ '\\n\\n' %}
{%- elif m.role == 'user' %}
    {%- if loop.last and tools %}{{ '[AVAILABLE_TOOLS] ' ~ tools | tojson ~ '[/AVAILABLE_TOOLS]' }}{% endif %}
    {{- '[INST] ' }}{% if loop.last %}{{ told.text }}{% endif %}{{ m.content ~ '[/INST]' }}
{%- else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endfor %}"""

TOOLS_IN_SYSTEM = """{% if messages[0].role == 'system' or tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}
{%- if tools %}{{ '\\n\\n# Tools\\n<tools>' }}{% for t in tools %}{{ '\\n' ~ t | tojson }}{% endfor %}
    {{- '\\n</tools>' }}
{%- endif %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}
{%- else %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}
    {%- set f = call.function %}
    {{- '<tool_call>\\n' ~ {'name': f.name, 'arguments': f.arguments} | tojson ~ '\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

# The first publication refuses a system message; the third puts it before the first question.
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
MODEL_TURNS = """{{ bos_token }}{% set told = namespace(text='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set told.text = m.content ~ '\\n\\n' %}{% else %}
    {{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' ~ told.text ~ m.content | trim }}
    {{- '<end_of_turn>\\n' }}{% set told.text = '' %}
{%- endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

MASKED = """{{ '[gMASK]<sop>' }}{% if tools %}{{ '<|system|>\\n# Tools' }}{% for t in tools %}
    {{- '\\n\\n## ' ~ t.function.name ~ '\\n\\n' ~ t.function | tojson }}{% endfor %}{% endif %}
{%- for m in messages %}{{ '<|' ~ ('observation' if m.role == 'tool' else m.role) ~ '|>\\n' ~ m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

PLAIN = """{% for m in messages %}{{ '' if loop.first else '\\n' }}
    {{- m.role | capitalize ~ ': ' ~ m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '\\n' ~ 'Assistant:' }}{% endif %}"""

HEADERS = turns("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")
ENDED = turns("", "<|", "|>\n", "<|end|>\n")

# family: template, special tokens in the order of their ids, names of bos and eos, tokens of eos_token_id in
# generation_config.json, tokens that end an answer.
FAMILIES = {
    "llama2": (INSTRUCTION, ("<s>", "</s>"), ("<s>", "</s>"), ("</s>",), ("</s>",)),
    "llama3": (
        HEADERS,
        (
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eom_id|>",
            "<|eot_id|>",
        ),
        ("<|begin_of_text|>", "<|eot_id|>"),
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    ),
    "mistral": (
        BRACKETS,
        ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        ("<s>", "</s>"),
        ("</s>",),
        ("</s>",),
    ),
    "qwen2": (
        TOOLS_IN_SYSTEM,
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        (None, "<|im_end|>"),
        ("<|im_end|>", "<|endoftext|>"),
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma": (
        REFUSES_SYSTEM + MODEL_TURNS,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        ("<bos>", "<eos>"),
        ("<eos>",),  # of the first release; the template tells the rest
        ("<eos>", "<end_of_turn>"),
    ),
    "gemma3": (
        MODEL_TURNS,
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        ("<bos>", "<eos>"),
        ("<eos>", "<end_of_turn>"),
        ("<eos>", "<end_of_turn>"),
    ),
    "phi3": (
        ENDED,
        ("<s>", "<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"),
        ("<s>", "<|endoftext|>"),
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
        ("<|endoftext|>", "<|assistant|>", "<|end|>"),
    ),
    "glm4": (
        MASKED,
        ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
        (None, "<|endoftext|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "falcon": (PLAIN, ("<|endoftext|>",), (None, "<|endoftext|>"), ("<|endoftext|>",), ("<|endoftext|>",)),
}
FAMILIES["qwen3"] = FAMILIES["qwen2"]
FAMILIES["gemma2"] = FAMILIES["gemma"]

OPEN = "<|begin_of_text|><|start_header_id|>"
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
RESULT = {"role": "tool", "content": "3"}
TOOLS_TOLD = f"\n\n# Tools\n<tools>\n{TOOL_JSON}\n</tools>"
RENDERED = [
    (
        "llama2",
        CHAT,
        {},
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] Bye [/INST]",
    ),
    (
        "llama3",
        CHAT,
        {},
        OPEN + "system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ("mistral", CHAT, {}, "<s>[INST] Hi[/INST] Hello</s>[INST] Be kind.\n\nBye[/INST]"),
    (
        "mistral",
        [USER],
        {"tools": [TOOL]},
        f"<s>[AVAILABLE_TOOLS] [{TOOL_JSON}][/AVAILABLE_TOOLS][INST] Hi[/INST]",
    ),
    (
        "qwen2",
        CHAT,
        {},
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "qwen3",
        [SYSTEM, USER, CALL, RESULT],
        {"tools": [TOOL], "enable_thinking": False},
        f"<|im_start|>system\nBe kind.{TOOLS_TOLD}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    (
        "gemma2",
        [USER, ANSWER, MORE],
        {},
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        "gemma3",
        [SYSTEM, USER],
        {},
        "<bos><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n",
    ),
    (
        "phi3",
        CHAT,
        {},
        "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello<|end|>\n<|user|>\nBye<|end|>\n"
        "<|assistant|>\n",
    ),
    (
        "glm4",
        CHAT,
        {},
        "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi<|assistant|>\nHello<|user|>\nBye<|assistant|>\n",
    ),
    (
        "glm4",
        [USER, RESULT],
        {"tools": [TOOL]},
        '[gMASK]<sop><|system|>\n# Tools\n\n## add\n\n{"name": "add", "parameters": {"type": "object"}}'
        "<|user|>\nHi<|observation|>\n3<|assistant|>\n",
    ),
    ("falcon", CHAT, {}, "System: Be kind.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:"),
]


@pytest.fixture
def checkpoint(directory_of):
    """A function: family -> its tokenizer, over the vocabulary of one fixture, from the files that it publishes."""

    def make(name: str):
        template, tokens, (bos, eos), ends, _ = FAMILIES[name]
        config = {"bos_token": bos, "eos_token": eos, "additional_special_tokens": list(tokens)}
        directory = directory_of("sentencepiece_bpe", config)
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
        ids = [load_tokenizer(directory).token_id(token) for token in ends]
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}), encoding="utf-8")
        return load_tokenizer(directory)

    return make


def pieces(text: str, tokens) -> list[str]:
    """The special tokens of a text in order."""
    found, left = [], text
    while places := [(left.index(token), -len(token), token) for token in tokens if token in left]:
        place, _, token = min(places)
        found.append(token)
        left = left[place + len(token) :]
    return found


@pytest.mark.parametrize(
    ("name", "messages", "options", "text"),
    RENDERED,
    ids=[f"{name}-{len(messages)}" for name, messages, *_ in RENDERED],
)
def test_a_chat_becomes_the_documented_prompt(checkpoint, name, messages, options, text):
    tokenizer = checkpoint(name)
    assert tokenizer.render_chat(messages, **options) == text
    # Every special token is one id, where it stands in the text, and none is added.
    ids = tokenizer.encode_chat(messages, **options)
    tokens = FAMILIES[name][1]
    assert [tokenizer.token(id) for id in ids if tokenizer.token(id) in tokens] == pieces(text, tokens)
    assert ids == tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_that_end_an_answer_stop_it(checkpoint, name):
    tokenizer = checkpoint(name)
    assert {tokenizer.token(id) for id in tokenizer.stop_ids} == set(FAMILIES[name][4])


def test_a_system_message_that_a_family_lacks_is_refused(checkpoint):
    with pytest.raises(TokenizerError, match="System role not supported"):
        checkpoint("gemma").render_chat(CHAT)


@pytest.fixture
def of_code(directory_of):
    """A function: name of the model, further settings -> the tokenizer of a checkpoint without a template."""

    def make(name: str, **config):
        config = {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": name, **config}
        return load_tokenizer(directory_of("sentencepiece_bpe", config))

    return make


def apart(tokenizer, *parts: str) -> list[int]:
    """Ids as remote code makes them: names of special tokens, or texts each encoded alone."""
    ids: list[int] = []
    for part in parts:
        special = part in ("[gMASK]", "sop") or part.startswith("<|")
        ids += [tokenizer.token_id(part)] if special else tokenizer.encode(part, add_special_tokens=False)
    return ids


def test_roles_of_remote_code(of_code):
    tokenizer = of_code("THUDM/chatglm3-6b")
    call = {"role": "assistant", "metadata": "add", "content": "f(a=1)"}
    messages = [SYSTEM, USER, call, RESULT]
    parts = ["[gMASK]", "sop", "<|system|>", "\n", "Be kind.", "<|user|>", "\n", "Hi"]
    parts += ["<|assistant|>", "add\n", "f(a=1)", "<|observation|>", "\n", "3", "<|assistant|>"]
    assert tokenizer.encode_chat(messages) == apart(tokenizer, *parts)
    assert tokenizer.render_chat([SYSTEM, USER]) == "[gMASK]sop<|system|>\n Be kind.<|user|>\n Hi<|assistant|>"
    assert {tokenizer.token(id) for id in tokenizer.stop_ids} == {"</s>", "<|user|>", "<|observation|>"}
    assert tokenizer.encode_chat([{"role": "user", "content": ""}])[-3:] == apart(tokenizer, "\n", "<|assistant|>")[-3:]


def test_tools_of_remote_code_are_indented_json_behind_the_system_message(of_code):
    tokenizer = of_code("THUDM/chatglm3-6b")
    described = json.dumps([TOOL["function"]], indent=4)
    text = tokenizer.render_chat([SYSTEM, USER], tools=[TOOL])
    assert text == f"[gMASK]sop<|system|>\n Be kind.\n{described}<|user|>\n Hi<|assistant|>"
    with pytest.raises(TokenizerError, match="part of the system message"):
        tokenizer.render_chat([USER], tools=[TOOL])
    with pytest.raises(TokenizerError, match="no role robot"):
        tokenizer.render_chat([{"role": "robot", "content": "x"}])


def test_rounds_of_remote_code(of_code):
    tokenizer = of_code("THUDM/chatglm2-6b")
    text = "[Round 1]\n\n问：Hi\n\n答：Hello\n\n[Round 2]\n\n问：Bye\n\n答："
    assert tokenizer.render_chat([USER, ANSWER, MORE]) == "[gMASK]sop" + text
    assert tokenizer.encode_chat([USER, ANSWER, MORE]) == tokenizer.encode(text)
    with pytest.raises(TokenizerError, match="user and assistant only, not system"):
        tokenizer.render_chat(CHAT)


def test_a_template_in_the_files_wins_over_that_of_the_code(of_code):
    tokenizer = of_code("THUDM/chatglm3-6b", chat_template="[gMASK]sop{{ messages[0].content }}")
    assert tokenizer.encode_chat([USER]) == apart(tokenizer, "[gMASK]", "sop", "Hi")


@pytest.mark.parametrize("name", ["", "bigscience/bloomz"])
def test_models_without_a_chat_say_so(of_code, name):
    tokenizer = of_code(name)
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.render_chat([USER])


def test_a_command_is_found_right_behind_its_mask_only(of_code):
    tokenizer = of_code("THUDM/chatglm3-6b")
    mask, start = tokenizer.token_id("[gMASK]"), tokenizer.token_id("sop")
    assert tokenizer.encode("[gMASK]sop", add_special_tokens=False) == [mask, start]
    for text in ("philosophy", "[gMASK] sop", "[MASK]sop"):
        assert start not in tokenizer.encode(text, add_special_tokens=False)
