"""Lines of Python and what they are about, drawn from a grammar with a seed: a task for the model that mlxlm ships.

    python examples/finetune/make_data.py --output runs/snippets

Writes train.jsonl, valid.jsonl and test.jsonl with rows {"text", "label"}; no line is in two of them. The same
arguments give the same bytes. Labels: files, numbers, text and errors. Names of variables tell nothing: each class has
them all. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

NAMES = "path name text line total count value data result item key file number word error index source target".split()
LINES = {
    "files": (
        "with open({a}, 'rb') as {b}:", "{a} = os.path.join({b}, {c})", "{a} = os.listdir({b})",
        "shutil.copyfile({a}, {b})", "os.remove({a})", "if os.path.isdir({a}):", "{a} = os.stat({b}).st_size",
        "os.makedirs({a}, exist_ok=True)", "{a} = tempfile.mkdtemp(dir={b})", "for {a} in os.walk({b}):",
    ),
    "numbers": (
        "{a} = math.sqrt({b} ** 2 + {c} ** 2)", "{a} = sum({b}) / len({b})", "{a} = round({b} * {c}, {n})",
        "{a} += {b} // {n}", "if {a} % {n} == 0:", "{a} = max({b}, {c}) - {n}", "{a} = ({b} + {c}) * {n}",
        "{a} = abs({b} - {c}) < 1e-{n}", "{a} = divmod({b}, {n})", "{a} = math.log({b}) / math.log({n})",
    ),
    "text": (
        "{a} = {b}.strip().split(',')", "{a} = {b}.lower().replace('-', '_')", "{a} = ', '.join({b})",
        "if {a}.startswith({b}):", "{a} = {b}.encode('utf-8')", "{a} = '%s: %s' % ({b}, {c})",
        "{a} = re.sub(r'\\s+', ' ', {b})", "{a} = {b}.title() + {c}.upper()", "{a} = textwrap.dedent({b})",
        "{a} = {b}.partition('=')",
    ),
    "errors": (
        "raise ValueError({a})", "except KeyError as {a}:", "raise TypeError('bad %s' % {a})",
        "assert {a} is not None, {b}", "except (OSError, {a}):", "raise NotImplementedError({a})",
        "traceback.print_exc(file={a})", "raise RuntimeError({a}) from {b}", "with self.assertRaises({a}):",
        "warnings.warn({a}, stacklevel={n})",
    ),
}  # fmt: skip


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """That many different rows, as many of each label as can be."""
    rng = random.Random(seed)
    labels = list(LINES)
    found: dict[str, str] = {}
    while len(found) < count:
        label = labels[len(found) % len(labels)]
        a, b, c = rng.sample(NAMES, 3)
        found.setdefault(rng.choice(LINES[label]).format(a=a, b=b, c=c, n=rng.randint(2, 9)), label)
    return [{"text": text, "label": label} for text, label in found.items()]


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder for the three files")
    parser.add_argument("--rows", type=int, default=1000, help="of all three together, default 1000")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.rows < 20:
        parser.error("--rows is at least 20")
    made = rows(options.rows, options.seed)
    random.Random(options.seed + 1).shuffle(made)
    cuts = {"train": (0, 0.6), "valid": (0.6, 0.8), "test": (0.8, 1)}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, (first, last) in cuts.items():
        part = made[round(first * len(made)) : round(last * len(made))]
        text = "".join(json.dumps(row) + "\n" for row in part)
        (options.output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(made)} rows in {options.output}")


if __name__ == "__main__":
    main()
