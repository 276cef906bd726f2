"""Right answers, found from what a model is given alone: small parsers of the grammars in `generate`."""

from __future__ import annotations

import datetime
import json
import re

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
# How many of the second unit the first one has.
UNITS = {
    ("kilometres", "metres"): 1000, ("metres", "centimetres"): 100, ("kilograms", "grams"): 1000,
    ("litres", "millilitres"): 1000, ("centimetres", "millimetres"): 10, ("weeks", "days"): 7, ("years", "months"): 12,
    ("euros", "cents"): 100,
}  # fmt: skip
THINGS = tuple("film book hotel meal song game phone garden lesson party train museum".split())
GOOD = tuple("good great lovely brilliant pleasant useful charming excellent".split())
BAD = tuple("bad awful boring terrible ugly useless annoying dreadful".split())
NEGATIONS = ("not", "never", "nobody")
COUNTS = ("one", "two", "three")

_JSON = "Give name, age, job and city as JSON. "
# Sentences of facts, by what each group is.
_SENTENCES = (
    r"(?P<name>\w+ \w+), (?P<age>\d+), lives in (?P<city>\w+) and works as a (?P<job>\w+)\.",
    r"(?P<name>\w+ \w+) is a (?P<job>\w+) from (?P<city>\w+) and is (?P<age>\d+) years old\.",
    r"At (?P<age>\d+), (?P<name>\w+ \w+) still works as a (?P<job>\w+) in (?P<city>\w+)\.",
)


def solve(question: str) -> str:
    """The answer to an instruction. Raises ValueError for a question of no known kind."""
    return _SOLVERS[kind(question)](question)


def kind(question: str) -> str:
    """What an instruction asks for: "facts", "unit", or the form of date. Raises ValueError for any other."""
    if question.startswith(_JSON):
        return "facts"
    if _asked_units(question):
        return "unit"
    for name, wording in _DATES.items():
        if re.fullmatch(wording.format(date=r"[\w .-]+"), question):
            return name
    raise ValueError(f"a question of no known kind: {question!r}")


def answers(question: str, answer: str) -> bool:
    """Whether an answer is right: facts as any JSON of that content, else the very text, blanks around it aside."""
    if kind(question) != "facts":
        return answer.strip() == solve(question)
    try:
        return json.loads(answer) == json.loads(solve(question))
    except ValueError:
        return False


_DATES = {
    "iso": r"Write {date} in the form YYYY-MM-DD\.",
    "dotted": r"Write {date} in the form DD\.MM\.YYYY\.",
    "year": r"Which year is {date} in\? Answer with the number alone\.",
    "month": r"Which month is {date} in\? Answer with its name alone\.",
}


def _read_date(question: str) -> datetime.date:
    found = re.search(r"(\d{4})-(\d\d)-(\d\d)", question)
    if found:
        return datetime.date(*map(int, found.groups()))
    found = re.search(r"(\d\d)\.(\d\d)\.(\d{4})", question)
    if found:
        return datetime.date(*map(int, reversed(found.groups())))
    found = re.search(rf"(\d+) ({'|'.join(MONTHS)}) (\d{{4}})", question)
    if found is None:
        raise ValueError(f"no date in {question!r}")
    return datetime.date(int(found[3]), MONTHS.index(found[2]) + 1, int(found[1]))


def _asked_units(question: str) -> tuple[int, str, str] | None:
    """Number, unit and unit asked for."""
    found = re.search(r"How many (?P<few>\w+) are (?P<number>\d+) (?P<many>\w+)\?$", question)
    found = found or re.search(r"Convert (?P<number>\d+) (?P<many>\w+) to (?P<few>\w+)\.$", question)
    return (int(found["number"]), found["many"], found["few"]) if found else None


def _solve_unit(question: str) -> str:
    number, many, few = _asked_units(question) or (0, "", "")
    return f"{number * UNITS[many, few]} {few}"


def _solve_facts(question: str) -> str:
    sentence = question.removeprefix(_JSON)
    found = next(filter(None, (re.fullmatch(pattern, sentence) for pattern in _SENTENCES)), None)
    if found is None:
        raise ValueError(f"no facts in {sentence!r}")
    return json.dumps({"name": found["name"], "age": int(found["age"]), "job": found["job"], "city": found["city"]})


_SOLVERS = {
    "iso": lambda question: _read_date(question).isoformat(),
    "dotted": lambda question: f"{_read_date(question):%d.%m.%Y}",
    "year": lambda question: str(_read_date(question).year),
    "month": lambda question: MONTHS[_read_date(question).month - 1],
    "unit": _solve_unit,
    "facts": _solve_facts,
}


def sentiment(text: str) -> str:
    """Opinion of the clause that decides: the one after "but", or the one that "although" does not open."""
    text = text.lower().rstrip(".")
    if ", but " in text:
        text = text.split(", but ")[1]
    elif text.startswith("although "):
        text = text.split(", ")[1]
    else:
        text = text.split(", although ")[0].split(" and ")[0]
    words = text.split()
    opinion = next(word in GOOD for word in words if word in GOOD or word in BAD)
    turned = sum(word in NEGATIONS for word in words) % 2 == 1
    return "positive" if opinion != turned else "negative"


def draw(source: str) -> str:
    """Every shape once for each of its number, in the order of drawing: "a after b" means b, then a."""
    groups = re.split(r" then | after ", source)
    if " after " in source:
        groups.reverse()
    drawn = []
    for group in groups:
        count, colour, shape = group.split()
        one = shape if count == "one" else re.sub(r"(?<=s)es$|s$", "", shape)
        drawn += [f"{colour} {one}"] * (COUNTS.index(count) + 1)
    return ", ".join(drawn)


def iso_date(source: str) -> str:
    """A date in any of its forms as YYYY-MM-DD: the year has four digits, a month is a number where it has no name."""
    words = re.findall(r"\w+", source)
    year = next(word for word in words if len(word) == 4 and word.isdigit())
    named = [number for number, month in enumerate(MONTHS, 1) for word in words if word in (month, month[:3])]
    numbers = [int(word) for word in words if word.isdigit() and word != year]
    month = named[0] if named else numbers[1]
    return f"{year}-{month:02}-{numbers[0]:02}"


def tag(tokens: list[str]) -> list[str]:
    """Labels of the words: what is written large is a place after a preposition, a firm after "firm", else a person."""
    labels: list[str] = []
    for number, token in enumerate(tokens):
        before = tokens[number - 1] if number else ""
        if not token[0].isupper():
            labels.append("O")
        elif before[:1].isupper():
            labels.append(f"I-{labels[-1][2:]}")
        else:
            kinds = {"firm": "FIRM", **dict.fromkeys(("in", "near", "from", "to", "of"), "PLACE")}
            labels.append(f"B-{kinds.get(before, 'PERSON')}")
    return labels
