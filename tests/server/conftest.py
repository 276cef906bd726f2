"""A small model behind a real socket."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import pytest
from character_tokenizer import write_character_tokenizer
from small_server import served

import mlxlm

MODELS = Path(__file__).parent.parent / "fixtures" / "models"
# Tools are shown by name and asked for in the way of one of the dialects.
TOOL_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}<tool_call>{% endif %}"
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['arguments']['x'] }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def small_directory(tmp_path_factory):
    """A checkpoint of a random decoder with a long context, single characters as tokens, and chats with tools."""
    directory = tmp_path_factory.mktemp("served") / "small"
    shutil.copytree(MODELS / "llama", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    write_character_tokenizer(directory, TOOL_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def small(small_directory):
    """Model and tokenizer of `small_directory`."""
    return mlxlm.load(small_directory)


@pytest.fixture(scope="session")
def service(small):
    """The small model, served to all tests that leave the server's state alone."""
    with served(*small) as running:
        yield running


@pytest.fixture
def client(service):
    """An HTTP client of `service`."""
    with httpx.Client(base_url=service.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def writer(tmp_path_factory):
    """The shipped model, which can write JSON, with a chat template; served."""
    directory = tmp_path_factory.mktemp("served") / "writer"
    shutil.copytree(MODELS.parent.parent.parent / "mlxlm" / "shipped" / "python-stdlib", directory)
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TOOL_TEMPLATE}))
    with served(*mlxlm.load(directory)) as running:
        yield running
