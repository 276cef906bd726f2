"""The house rules that a machine can check: floors, families, names, sizes."""

from __future__ import annotations

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "mlxlm"
FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]

# A package imports only from lower floors, or from itself.
FLOORS = {
    "errors": 0,
    "interruption": 0,
    "runtime": 0,
    "version": 0,
    "kernels": 1,
    "checkpoint": 1,
    "tokenizers": 1,
    "layers": 2,
    "data": 2,
    "models": 3,
    "peft": 4,
    "objectives": 4,
    "generation": 4,
    "distributed": 4,
    "conversion": 4,
    "training": 5,
    "server": 5,
    "alignment": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}
FAMILIES = re.compile(
    r"\b(llama|mistral|qwen|gemma|falcon|bloom|chatglm|glm|roberta|modernbert|bert|gpt(?!q)|palm|umt5|mt5|t5|phi)\w*",
    re.I,
)
# Names that others chose: a value of `rope_type`, an example in an error message, a program of llama.cpp.
NOT_OURS = {"rotary_config.py": {"llama3"}, "saving.py": {"gpt2"}, "gguf_tensors.py": {"llama"}}
NAMES_THAT_HIDE = {"utils.py", "helpers.py", "common.py", "misc.py"}


def part(path: Path) -> str:
    """The package or module under mlxlm that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """The parts of mlxlm that a file imports, anywhere in it but under TYPE_CHECKING."""
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "mlxlm":
                names.update(alias.name for alias in node.names)
            elif node.module.startswith("mlxlm."):
                names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mlxlm."))
    return names


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_go_down_only(path):
    here = part(path)
    for other in imports(ast.parse(path.read_text())):
        if other != here and other in FLOORS:
            assert FLOORS[other] < FLOORS[here], (
                f"{here} (floor {FLOORS[here]}) imports {other} (floor {FLOORS[other]})"
            )


def test_every_part_has_a_floor():
    assert {part(path) for path in FILES} <= set(FLOORS)


def without_prose(text: str) -> str:
    """Code without comments and docstrings."""
    tree = ast.parse(text)
    docs = {
        node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    code = "\n".join(line.split("#")[0] for line in text.split("\n"))
    for doc in docs:
        code = code.replace(doc, "")
    return code


@pytest.mark.parametrize(
    "path", [p for p in FILES if "families" not in p.relative_to(PACKAGE).parts and part(p) != "tokenizers"], ids=str
)
def test_no_family_is_named_outside_its_folder(path):
    found = FAMILIES.search(without_prose(path.read_text()))
    assert found is None or found.group(0) in NOT_OURS.get(path.name, ())


@pytest.mark.parametrize("path", [p for p in FILES if "families" in p.relative_to(PACKAGE).parts], ids=str)
def test_a_family_defines_no_class(path):
    assert not [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]


@pytest.mark.parametrize("path", sorted((PACKAGE / "models" / "families").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_family_s_file_is_thin(path):
    # What takes more belongs to a shape that others may share, in mlxlm/models.
    assert path.read_text().count("\n") <= 150


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_are_of_a_readable_size_and_say_what_they_are(path):
    text = path.read_text()
    assert path.name not in NAMES_THAT_HIDE
    assert text.count("\n") <= 520
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "no docstring"
    public = [n for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")]
    assert [n.name for n in public if not ast.get_docstring(n)] == []


def test_no_two_files_of_tests_have_one_name():
    # pytest imports them by their name alone; the second would be taken for the first.
    names = Counter(
        path.name for path in Path(__file__).parent.rglob("*.py") if path.name not in ("__init__.py", "conftest.py")
    )
    assert [name for name, count in names.items() if count > 1] == []
