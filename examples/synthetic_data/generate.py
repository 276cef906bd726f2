"""Small data sets with answers that can be checked exactly, drawn from grammars with a seed.

    python examples/synthetic_data/generate.py --task sentiment --rows 3000 --output runs/sentiment
    python examples/synthetic_data/generate.py --task instructions --check answers.jsonl

Writes train.jsonl, valid.jsonl and test.jsonl (80, 10 and 10 percent), no input in two of them; the same arguments give
the same bytes. With --check, every row of a file is a row of the task with one more key, "predicted", as
`mlxlm evaluate --predictions` and `mlxlm classify` write them; printed is how many are right. Needs nothing but Python.

    instructions   {"messages"}              dates, units, and facts of a sentence as JSON
    sentiment      {"text", "label"}         negations, and clauses of which one decides
    text-to-text   {"source", "target"}      a list of shapes, in the order in which they are to be drawn
    dates          {"source", "target"}      dates in many forms, in one form
    tagging        {"tokens", "labels"}      persons, places and firms, some under the same names
    preference     {"prompt", "chosen", "rejected"}   instructions with a right and a wrong answer
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checking

Row = dict[str, Any]
SHARES = {"train": 0.8, "valid": 0.1, "test": 0.1}

NAMES = "Ada Ben Carla David Elena Felix Grace Hugo Irene Jonas Kira Leo Maria Nils Olga Paul Rosa Simon Tara Victor"
SURNAMES = "Abel Berger Costa Dietz Evans Fischer Garcia Hansen Ivanov Jensen Keller Lopez Meyer Novak Olsen Peters"
CITIES = "Athens Berlin Cairo Dublin Geneva Hamburg Lima Lisbon Madrid Nairobi Oslo Prague Rome Seoul Tokyo Vienna"
JOBS = "baker carpenter doctor engineer farmer gardener lawyer nurse painter pilot tailor teacher"
BOTH = "Austin Florence Georgia Jordan Madison Paris Sydney Victoria"  # names of persons, of places and of firms
FIRMS = "Motors Foods Bank Press Systems Energy"
COLOURS = "red blue green black white yellow"
SHAPES = "circle square star triangle line cross"


def _one(rng: random.Random, words: str) -> str:
    return rng.choice(words.split())


def _date(rng: random.Random) -> tuple[str, str]:
    """A question about a date, and its answer."""
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2049)
    number = f"{day:02}", f"{month + 1:02}", str(year)
    long, dotted, iso = f"{day} {checking.MONTHS[month]} {year}", ".".join(number), "-".join(reversed(number))
    return rng.choice(
        [
            (f"Write {long} in the form YYYY-MM-DD.", iso),
            (f"Write {dotted} in the form YYYY-MM-DD.", iso),
            (f"Which year is {long} in? Answer with the number alone.", str(year)),
            (f"Write {iso} in the form DD.MM.YYYY.", dotted),
            (f"Which month is {iso} in? Answer with its name alone.", checking.MONTHS[month]),
        ]
    )


def _unit(rng: random.Random) -> tuple[str, str]:
    """A question about units, and its answer."""
    (many, few), factor = rng.choice(list(checking.UNITS.items()))
    number = rng.randint(2, 99) if factor % 10 == 0 else rng.randint(2, 12)
    wording = rng.choice(["How many {few} are {number} {many}?", "Convert {number} {many} to {few}."])
    polite = rng.choice(["", "Please answer briefly. ", "A question about units: "])
    return polite + wording.format(few=few, many=many, number=number), f"{number * factor} {few}"


def _facts(rng: random.Random) -> tuple[str, str]:
    """A sentence whose facts are to be given as JSON, and that JSON."""
    name, age = f"{_one(rng, NAMES)} {_one(rng, SURNAMES)}", rng.randint(18, 89)
    job, city = _one(rng, JOBS), _one(rng, CITIES)
    sentence = rng.choice(
        [
            f"{name}, {age}, lives in {city} and works as a {job}.",
            f"{name} is a {job} from {city} and is {age} years old.",
            f"At {age}, {name} still works as a {job} in {city}.",
        ]
    )
    facts = json.dumps({"name": name, "age": age, "job": job, "city": city})
    return f"Give name, age, job and city as JSON. {sentence}", facts


def _question(rng: random.Random) -> tuple[str, str]:
    return rng.choice([_date, _unit, _facts])(rng)


def _instruction(rng: random.Random) -> Row:
    question, answer = _question(rng)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _preference(rng: random.Random) -> Row:
    """Of the two answers the chosen one is right and nothing else; the other is wrong, or wrapped in chatter."""
    question, right = _question(rng)
    if rng.random() < 0.5:
        wrong = rng.choice(["Well, I think it is {}, but do check.", "Good question! Perhaps {}?"]).format(right)
    elif right in checking.MONTHS:
        wrong = rng.choice([month for month in checking.MONTHS if month != right])
    else:
        place = rng.choice([place for place, letter in enumerate(right) if letter.isdigit()])
        digit = rng.choice([digit for digit in "123456789" if digit != right[place]])
        wrong = right[:place] + digit + right[place + 1 :]
    return {"prompt": question, "chosen": right, "rejected": wrong}


def _clause(rng: random.Random, positive: bool) -> str:
    """A statement of that opinion about one thing; an odd number of negations turns the opinion of its word around."""
    thing = rng.choice(checking.THINGS)
    negations = rng.choice([0, 0, 1, 1, 2])
    words = checking.GOOD if positive == (negations % 2 == 0) else checking.BAD
    word = f"{rng.choice(['', '', 'very ', 'really ', 'quite '])}{rng.choice(words)}"
    if negations == 0:
        return rng.choice([f"the {thing} was {word}", f"I found the {thing} {word}"])
    if negations == 1:
        return rng.choice(
            [
                f"the {thing} was {rng.choice(['not', 'never'])} {word}",
                f"nobody found the {thing} {word}",
                f"I did not find the {thing} {word}",
            ]
        )
    return f"nobody said that the {thing} was {rng.choice(['not', 'never'])} {word}"


def _sentiment(rng: random.Random) -> Row:
    positive = rng.random() < 0.5
    main = _clause(rng, positive)
    form = rng.choice(["{main}", "{other}, but {main}", "although {other}, {main}", "{main}, although {other}", "and"])
    if form == "and":
        text = f"{main} and {_clause(rng, positive)}"
    else:
        text = form.format(main=main, other=_clause(rng, not positive))
    return {"text": text[0].upper() + text[1:] + ".", "label": "positive" if positive else "negative"}


def _drawing(rng: random.Random) -> Row:
    """Groups of shapes; "then" keeps their order, "after" turns it around."""
    wanted, drawn = [], []
    for _ in range(rng.choice([1, 2, 2])):
        count, colour, shape = rng.randint(1, 3), _one(rng, COLOURS), _one(rng, SHAPES)
        plural = shape if count == 1 else f"{shape}es" if shape.endswith("s") else f"{shape}s"
        wanted.append(f"{checking.COUNTS[count - 1]} {colour} {plural}")
        drawn.append([f"{colour} {shape}"] * count)
    word = rng.choice(["then", "after"])
    if word == "after":
        drawn.reverse()
    return {"source": f" {word} ".join(wanted), "target": ", ".join(one for group in drawn for one in group)}


def _dated(rng: random.Random) -> Row:
    """A date as people write it, and as YYYY-MM-DD."""
    day, month, year = rng.randint(1, 28), rng.randrange(12), rng.randint(1950, 2049)
    name = checking.MONTHS[month]
    forms = f"{day} {name} {year}", f"{name} {day}, {year}", f"{day}.{month + 1}.{year}", f"{year}, {day} {name[:3]}."
    return {"source": rng.choice(forms), "target": f"{year}-{month + 1:02}-{day:02}"}


Words = list[tuple[str, str]]  # a word and its label


def _plain(words: str) -> Words:
    return [(word, "O") for word in words.split()]


def _named(kind: str, *words: str) -> Words:
    return [(word, f"{'I' if number else 'B'}-{kind}") for number, word in enumerate(words)]


def _person(rng: random.Random) -> Words:
    first = _one(rng, BOTH if rng.random() < 0.5 else NAMES)
    return _named("PERSON", first, *([_one(rng, SURNAMES)] if rng.random() < 0.4 else []))


def _place(rng: random.Random, *before: str) -> Words:
    return [*_plain(rng.choice(before)), *_named("PLACE", _one(rng, BOTH if rng.random() < 0.5 else CITIES))]


def _party(rng: random.Random) -> Words:
    """Somebody: a person or a firm."""
    if rng.random() < 0.7:
        return _person(rng)
    return [*_plain("the firm"), *_named("FIRM", _one(rng, f"{BOTH} {SURNAMES}"), _one(rng, FIRMS))]


def _tagged(rng: random.Random) -> Row:
    """A sentence in which what stands before a name tells what it names."""
    where = _place(rng, "in", "near") if rng.random() < 0.6 else []
    opening = [*where, *_plain(",")] if where else []
    forms = [
        lambda: [*_plain("yesterday"), *_party(rng), *_plain("called"), *_party(rng), *where],
        lambda: [*_party(rng), *_plain("met"), *_person(rng), *where, *_plain("and"), *_person(rng), *_plain("paid")],
        lambda: [*_person(rng), *_plain("moved"), *_place(rng, "from"), *_place(rng, "to")],
        lambda: [*opening, *_party(rng), *_plain("wrote a letter to the mayor"), *_place(rng, "of")],
    ]
    words = [*rng.choice(forms)(), (".", "O")]
    return {"tokens": [word for word, _ in words], "labels": [label for _, label in words]}


@dataclass(frozen=True)
class Task:
    """make: draws a row.  given: what a model is given of a row, as text; no two rows share it.  right: whether an
    answer is right for a row, decided from what is given alone.
    """

    make: Callable[[random.Random], Row]
    given: Callable[[Row], str]
    right: Callable[[Row, Any], bool]


TASKS = {
    "instructions": Task(
        _instruction,
        lambda row: row["messages"][0]["content"],
        lambda row, answer: checking.answers(row["messages"][0]["content"], answer),
    ),
    "sentiment": Task(
        _sentiment, lambda row: row["text"], lambda row, answer: answer == checking.sentiment(row["text"])
    ),
    "text-to-text": Task(
        _drawing, lambda row: row["source"], lambda row, answer: answer.strip() == checking.draw(row["source"])
    ),
    "dates": Task(
        _dated, lambda row: row["source"], lambda row, answer: answer.strip() == checking.iso_date(row["source"])
    ),
    "tagging": Task(
        _tagged, lambda row: " ".join(row["tokens"]), lambda row, answer: answer == checking.tag(row["tokens"])
    ),
    "preference": Task(
        _preference, lambda row: row["prompt"], lambda row, answer: checking.answers(row["prompt"], answer)
    ),
}


def make_rows(task: str, count: int, seed: int = 0) -> dict[str, list[Row]]:
    """Rows by split, `count` in all, no input twice. Raises ValueError when the grammar has too few."""
    rng = random.Random(f"{task} {seed}")
    found: dict[str, Row] = {}
    stale = 0  # draws since the last one that was new
    while len(found) < count:
        row = TASKS[task].make(rng)
        given = TASKS[task].given(row)
        stale = stale + 1 if given in found else 0
        found.setdefault(given, row)
        if stale == 200:
            raise ValueError(f"task {task} has hardly more than {len(found)} different rows; {count} are too many")
    rows, splits, start = list(found.values()), {}, 0.0
    for name, share in SHARES.items():
        splits[name] = rows[round(start * count) : round((start + share) * count)]
        start += share
    return splits


def write(splits: dict[str, list[Row]], output: Path) -> None:
    """One file a split, each under a temporary name first."""
    output.mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        temporary = output / f".{name}.jsonl"
        temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        os.replace(temporary, output / f"{name}.jsonl")


def check(task: str, path: Path) -> tuple[int, int]:
    """How many answers of a file are right, and how many there are. Raises ValueError for a row without one."""
    right = count = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        row = json.loads(line)
        if "predicted" not in row:
            raise ValueError(f'{path}, line {number}: the row has no "predicted"')
        right += TASKS[task].right(row, row["predicted"])
        count += 1
    return right, count


def main() -> None:
    """Write a data set, or check answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--rows", type=int, default=3000, help="of all three files together, default 3000")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, help="folder for train.jsonl, valid.jsonl and test.jsonl")
    target.add_argument("--check", type=Path, metavar="FILE", help="rows with answers to check")
    arguments = parser.parse_args()
    if arguments.rows < 10:
        parser.error("--rows is at least 10, so that every file has one")
    try:
        if arguments.check is not None:
            right, count = check(arguments.task, arguments.check)
            print(f"{right} of {count} right, {right / max(count, 1):.1%}")
            return
        splits = make_rows(arguments.task, arguments.rows, arguments.seed)
        write(splits, arguments.output)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(", ".join(f"{name}: {len(rows)} rows" for name, rows in splits.items()))


if __name__ == "__main__":
    main()
