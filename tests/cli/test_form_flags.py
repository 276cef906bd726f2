"""--json-schema and --regex."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("llguidance", reason="the extra `constrain` isn't installed")
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}


def test_answers_keep_to_the_form(mlxlm_command, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    for given in (path, json.dumps(SCHEMA)):
        status, out, _ = mlxlm_command("generate", "-p", "x = ", "--json-schema", given)
        assert status == 0
        assert json.loads(out)["n"] in (1, 22)
    status, out, _ = mlxlm_command("generate", "-p", "x = ", "--regex", "[0-9]{4}", "--temp", "1")
    assert status == 0
    assert re.fullmatch("[0-9]{4}\n", out)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--regex", "("], "unclosed group"),
        (["--regex", "a", "--json-schema", "{}"], "goes without --regex"),
        (["--regex", "a", "--num-beams", "2"], "a beam search (--num-beams) goes without --regex"),
        (["--regex", "a", "--prompt-lookup", "2"], "goes without --prompt-lookup"),
        (["--json-schema", "/no/such/file"], "can't be read"),
        (["--json-schema", '{"not": {}}'], "Unimplemented"),
    ],
)
def test_forms_that_are_none_are_one_line(mlxlm_command, flags, message):
    status, _, err = mlxlm_command("generate", "-p", "x = ", *flags)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
