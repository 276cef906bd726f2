"""Chat templates: which one is used, what it is given, and that a stranger's template can do no harm."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Literal, Optional

import numpy as np
import pytest
from tokenizer_fixtures import read

from mlxlm.errors import TokenizerError
from mlxlm.tokenizers import load_tokenizer
from mlxlm.tokenizers.sandbox import MAX_OUTPUT
from mlxlm.tokenizers.tool_schemas import describe_function

USER = [{"role": "user", "content": "Hi"}]
GOLDENS = read("library/goldens.json")


def render(tokenizer, source, messages=USER, **options):
    return tokenizer.render_chat(messages, chat_template=source, **options)


@pytest.mark.parametrize("chat", GOLDENS["chats"], ids=lambda chat: f"{len(chat['messages'])}-{chat['prompt']}")
def test_a_chat_is_rendered_as_by_transformers(library_tokenizer, chat):
    options = {"add_generation_prompt": chat["prompt"]}
    assert library_tokenizer.render_chat(chat["messages"], **options) == chat["text"]
    assert library_tokenizer.encode_chat(chat["messages"], **options) == chat["ids"]


def test_tools_choose_the_template_for_tools(library_tokenizer):
    golden = GOLDENS["tools"]
    messages = GOLDENS["chats"][0]["messages"]
    assert library_tokenizer.render_chat(messages, tools=[golden["tool"]]) == golden["tool_use"]
    options = {"tools": [golden["tool"]], "chat_template": "default"}
    assert library_tokenizer.render_chat(messages, **options) == golden["default"]


def test_special_tokens_of_the_template_are_set_once(library_tokenizer):
    ids = library_tokenizer.encode_chat(USER)
    assert ids.count(library_tokenizer.bos_id) == 1
    assert library_tokenizer.token_id("<|end|>") in ids


def test_the_caller_s_variables_reach_the_template(library_tokenizer):
    source = "{{ enable_thinking }} {{ documents[0].text }} {{ bos_token }} {{ missing }}|"
    documents = [{"text": "x"}]
    assert render(library_tokenizer, source, enable_thinking=False, documents=documents) == "False x <s> |"


def test_blocks_are_trimmed_and_loops_controlled(library_tokenizer):
    source = """{% for x in range(9) %}
    {% if x == 1 %}{% continue %}{% endif %}
{{ x }}
    {% if x > 2 %}
{% break %}
    {% endif %}
{% endfor %}"""
    assert render(library_tokenizer, source) == "0\n2\n3\n"


def test_generation_blocks_are_accepted(library_tokenizer):
    source = "a{% generation %}{{ messages[0].content }}{% endgeneration %}b{%- generation -%} c {%- endgeneration -%}"
    assert render(library_tokenizer, source) == "aHibc"


def test_json_is_not_escaped(library_tokenizer):
    value = {"b": "<é&'\">", "a": [1, None, True]}
    assert render(library_tokenizer, "{{ v | tojson }}", v=value) == json.dumps(value, ensure_ascii=False)
    expected = json.dumps(value, indent=2, sort_keys=True)
    assert (
        render(library_tokenizer, "{{ v | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}", v=value) == expected
    )
    source = "{{ v | tojson(separators=(',', ':')) }}"
    assert render(library_tokenizer, source, v={"a": 1}) == '{"a":1}'


def test_the_date_is_today_s(library_tokenizer):
    before = datetime.now().strftime("%Y-%m-%d")
    text = render(library_tokenizer, "{{ strftime_now('%Y-%m-%d') }}")
    assert before <= text <= datetime.now().strftime("%Y-%m-%d")


def test_a_namespace_and_dict_work(library_tokenizer):
    source = (
        "{% set n = namespace(x=1) %}{% for i in [1, 2] %}{% set n.x = n.x + i %}{% endfor %}{{ n.x }}{{ dict(a=1).a }}"
    )
    assert render(library_tokenizer, source) == "41"


def test_formatting_and_joining_work_as_in_jinja(library_tokenizer):
    source = "{{ '%s-%02d' % ('a', 3) }} {{ '{}:{x}'.format(1, x=2) }} {{ ['a', 1] | join('+') }} {{ 'a' ~ 1 ~ none }}"
    source += (
        " {{ 'aXa' | replace('a', 'b') }} {{ '-'.join(['x', 'y']) }} {{ 'a-b'.replace('-', '+') }} {{ 'x'.center(3) }}|"
    )
    source += "{{ messages | map(attribute='role') | join(', ') }} {{ [{'k': 1}] | join('', attribute='k') }}"
    source += " {{ '{{}}'.format() }}"
    assert render(library_tokenizer, source) == "a-03 1:2 a+1 a1None bXb x-y a+b  x |user 1 {}"


def test_objects_of_the_caller_are_plain_data_in_the_template(library_tokenizer):
    class Image:
        secret = "s"

    message = {
        "role": "user",
        "content": [{"type": "image", "image": Image()}, {"n": np.int64(3), "b": np.bool_(False)}],
    }
    source = (
        "{{ messages[0].content[0].image }}{{ messages[0].content[0].image.secret }} {{ messages[0].content[1].n + 1 }}"
    )
    source += "{% if messages[0].content[1].b %}true{% endif %}"
    assert render(library_tokenizer, source, [message]) == "<Image> 4"
    assert message["content"][0]["image"].secret == "s"


def test_a_missing_template_is_a_clear_error(directory_of):
    tokenizer = load_tokenizer(directory_of("word_piece", {}))
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match=r"this tokenizer has no chat template.*plain text"):
        tokenizer.render_chat(USER)
    assert tokenizer.render_chat(USER, chat_template="{{ messages[0].content }}") == "Hi"


def test_an_unknown_name_lists_the_known_ones(library_tokenizer):
    with pytest.raises(TokenizerError, match="no chat template 'toool'; this tokenizer has: default, tool_use"):
        render(library_tokenizer, "toool")


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ("{{ 1 }}", {None: "1"}),
        ([{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}], {None: "d", "rag": "r"}),
        ({"default": "d", "tool_use": "t"}, {None: "d", "tool_use": "t"}),
        ([{"name": "only", "template": "o"}], {None: "o", "only": "o"}),
    ],
    ids=["text", "list", "object", "one"],
)
def test_templates_of_the_config_in_each_form(directory_of, value, names):
    tokenizer = load_tokenizer(directory_of("word_piece", {"chat_template": value}))
    for name, text in names.items():
        assert render(tokenizer, name) == text


def test_files_win_over_the_config(directory_of):
    directory = directory_of("word_piece", {"chat_template": "config"})
    (directory / "chat_template.json").write_text('{"chat_template": "json"}')
    assert load_tokenizer(directory).chat_template == "json"
    (directory / "chat_template.jinja").write_text("jinja")
    (directory / "chat_templates").mkdir()
    (directory / "chat_templates" / "rag.jinja").write_text("rag")
    tokenizer = load_tokenizer(directory)
    assert tokenizer.chat_template == "jinja"
    assert render(tokenizer, "rag") == "rag"


def test_several_templates_without_a_default_must_be_chosen(directory_of):
    tokenizer = load_tokenizer(directory_of("word_piece", {"chat_template": {"a": "1", "b": "2"}}))
    assert tokenizer.chat_template is None
    with pytest.raises(TokenizerError, match="several chat templates and no default: a, b"):
        tokenizer.render_chat(USER)
    assert render(tokenizer, "b") == "2"


@pytest.mark.parametrize("value", [3, [{"template": "x"}], {"a": 1}, [1]], ids=repr)
def test_a_malformed_entry_is_refused(directory_of, value):
    with pytest.raises(TokenizerError, match="chat_template must be"):
        load_tokenizer(directory_of("word_piece", {"chat_template": value}))


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "messages is empty"),
        ("Hi", "must be a list of objects.*got str"),
        ({"role": "user"}, "must be a list of objects.*got dict"),
        ([{"content": "x"}], "message 0 must be an object with a 'role'"),
        ([*USER, "x"], "message 1 must be an object"),
        ([{"role": 3, "content": "x"}], "message 0"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_malformed_messages_are_refused(library_tokenizer, messages, problem):
    with pytest.raises(TokenizerError, match=problem):
        library_tokenizer.render_chat(messages)


def test_the_template_s_own_refusal_is_passed_on(library_tokenizer):
    with pytest.raises(TokenizerError, match="refuses these messages: unknown role robot"):
        library_tokenizer.render_chat([{"role": "robot", "content": "x"}])


HARMFUL = {
    "syntax": ("{% if %}", "syntax error in line 1"),
    "late-syntax": ("\n\n{{ 1 +* }}", "syntax error in line 3"),
    "undefined": ("{{ nothing.here }}", "fails on these messages: UndefinedError"),
    "type": ("{{ 1 + 'a' }}", "fails on these messages: TypeError"),
    "nesting": ("{% for x in [1] %}" * 30 + "{% endfor %}" * 30, "can't be compiled"),
    "class": ("{{ ''.__class__.__mro__ }}", "stopped|fails"),
    "attribute": ("{{ ''|attr('__class__') }}x{{ (''|attr('__class__')).__mro__ }}", "stopped|fails"),
    "subclasses": ("{{ dict.__class__.__base__.__subclasses__() }}", "stopped|fails"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "stopped|fails"),
    "namespace": ("{% set n = namespace(__class__=1) %}", "stopped"),
    "change": ("{{ messages.append(1) }}", "stopped"),
    "format": ("{{ '{0.__class__.__mro__[1]}'.format('') }}", "stopped|fails"),
    "import": ("{% import 'os' as os %}", "fails|syntax|compiled"),
    "output": (
        "{% for i in range(99999) %}{% for j in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "stopped: its output grows",
    ),
    "repeat": ("{{ 'a' * 10**12 }}", "stopped"),
    "repeat-list": ("{{ 10**12 * [0] }}", "stopped"),
    "power": ("{{ 9**99999999 }}", "stopped"),
    "shift": ("{% set n = namespace(x=99) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}", "stopped"),
    "doubling": (
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "stopped",
    ),
    "doubling-tilde": (
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "stopped",
    ),
    "doubling-block": (
        "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set b %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = b %}{% endfor %}",
        "stopped",
    ),
    "doubling-list": (
        "{% set n = namespace(s=[1]) %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
        "stopped",
    ),
    "center": ("{{ 'a'.center(10**11) }}", "stopped"),
    "center-filter": ("{{ 'a' | center(10**11) }}", "stopped"),
    "indent": ("{{ 'a\nb' | indent(10**11) }}", "stopped"),
    "percent": ("{{ '%99999999999d' % 1 }}", "stopped"),
    "percent-star": ("{{ '%*d' % (10**11, 1) }}", "stopped"),
    "format-width": ("{{ '{:99999999999}'.format(1) }}", "stopped"),
    "format-nested": ("{{ '{:{}}'.format(1, 10**11) }}", "stopped"),
    "format-filter": ("{{ '%99999999999d' | format(1) }}", "stopped"),
    "replace": ("{% set x = 'a' * 10**6 %}{{ x.replace('a', x) }}", "stopped"),
    "replace-filter": ("{% set x = 'a' * 10**6 %}{{ x | replace('a', x) }}", "stopped"),
    "join": ("{{ range(99999) | join('a' * 10**6) }}", "stopped"),
    "join-method": ("{{ ('a' * 10**6).join('b' * 10**6) }}", "stopped"),
    "json": ("{{ range(9999) | list | tojson(indent=10**9) }}", "stopped"),
    "batch": ("{{ [1] | batch(10**11, 'x') | list }}", "stopped"),
    "round": ("{{ 5.5 | round(10**9, 'ceil') }}", "stopped"),
    "range": ("{{ range(10**12) | list }}", "fails|stopped"),
}


@pytest.mark.parametrize("name", HARMFUL)
def test_a_harmful_template_is_stopped_with_one_clear_error(library_tokenizer, name):
    source, problem = HARMFUL[name]
    with pytest.raises(TokenizerError, match=f"the chat template .*({problem})") as raised:
        render(library_tokenizer, source)
    assert "\n" not in str(raised.value)


def test_a_long_but_honest_prompt_is_rendered(library_tokenizer):
    content = "x" * (MAX_OUTPUT // 4)
    assert len(library_tokenizer.render_chat([{"role": "user", "content": content}])) > len(content)


def weather(
    city: str, unit: Literal["C", "F"] = "C", days: int | None = None, tags: list[str] = (), *, deep: Any = 0
) -> str:
    """The weather of a city.

    Now with more than one line.

    Args:
        city: Name of the city, and its
            country.
        unit: Unit of the answer
        days (int): How many days: 1 to 7
        tags: Tags (choices: ["a", "b"])
        deep: Anything

    Returns:
        A sentence.
    """
    return city


def test_a_function_becomes_a_schema():
    assert describe_function(weather) == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.\n\nNow with more than one line.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Name of the city, and its country."},
                    "unit": {"type": "string", "enum": ["C", "F"], "description": "Unit of the answer"},
                    "days": {"type": "integer", "nullable": True, "description": "How many days: 1 to 7"},
                    "tags": {"type": "array", "items": {"type": "string"}, "enum": ["a", "b"], "description": "Tags"},
                    "deep": {"description": "Anything"},
                },
                "required": ["city"],
            },
            "return": {"type": "string", "description": "A sentence."},
        },
    }


def test_functions_and_methods_can_be_tools(library_tokenizer):
    class Box:
        def add(self, x: float, y: Optional[dict[str, int]]) -> None:  # noqa: UP045
            """Adds.

            Args:
                x: first
                y: second
            """

    text = library_tokenizer.render_chat(USER, tools=[Box().add, weather, {"type": "function"}])
    schemas = json.loads(text.split("|")[0])
    assert schemas[0]["function"]["parameters"] == {
        "type": "object",
        "properties": {
            "x": {"type": "number", "description": "first"},
            "y": {
                "type": "object",
                "additionalProperties": {"type": "integer"},
                "nullable": True,
                "description": "second",
            },
        },
        "required": ["x", "y"],
    }
    assert schemas[2] == {"type": "function"}


def no_doc(x: int): ...


def no_hint(x):
    """Doc.

    Args:
        x: y
    """


def no_text(x: int):
    """Doc."""


def odd_type(x: complex):
    """Doc.

    Args:
        x: y
    """


def bad_choices(x: str):
    """Doc.

    Args:
        x: y (choices: a, b)
    """


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        (no_doc, "the tool no_doc has no docstring"),
        (no_hint, "'x' of the tool no_hint has no type hint"),
        (no_text, "no_text does not describe its argument 'x'"),
        (odd_type, "'x' of the tool odd_type has the type .*complex"),
        (bad_choices, "choices of the argument 'x' of the tool bad_choices are not a JSON list"),
        (3, "a tool must be a JSON schema .* got int"),
    ],
    ids=["no_doc", "no_hint", "no_text", "odd_type", "bad_choices", "number"],
)
def test_a_tool_that_can_t_be_described_is_refused(library_tokenizer, tool, problem):
    with pytest.raises(TokenizerError, match=problem):
        library_tokenizer.render_chat(USER, tools=[tool])
