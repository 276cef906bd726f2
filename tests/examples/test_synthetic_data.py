"""The synthetic data sets: deterministic, without overlap, and of answers that an independent parser finds too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from mlxlm.data.supervised_rows import read_splits

FOLDER = Path(__file__).parent.parent.parent / "examples" / "synthetic_data"
sys.path.insert(0, str(FOLDER))

import checking  # noqa: E402
import generate  # noqa: E402

FORMATS = {
    "instructions": "chat",
    "sentiment": "classification",
    "text-to-text": "seq2seq",
    "dates": "seq2seq",
    "tagging": "tagging",
    "preference": "preference",
}
ANSWERS = {
    "instructions": lambda row: row["messages"][1]["content"],
    "sentiment": lambda row: row["label"],
    "text-to-text": lambda row: row["target"],
    "dates": lambda row: row["target"],
    "tagging": lambda row: row["labels"],
    "preference": lambda row: row["chosen"],
}
TASKS = list(generate.TASKS)


def all_rows(task, count=600, seed=3):
    return [row for rows in generate.make_rows(task, count, seed).values() for row in rows]


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_bytes_and_no_input_is_in_two_splits(task, tmp_path):
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        generate.write(generate.make_rows(task, 300, seed), tmp_path / folder)
    read = {
        folder: {name: (tmp_path / folder / f"{name}.jsonl").read_bytes() for name in ("train", "valid", "test")}
        for folder in ("one", "again", "other")
    }
    assert read["one"] == read["again"]
    assert read["one"] != read["other"]
    given = [generate.TASKS[task].given(row) for rows in generate.make_rows(task, 300, 1).values() for row in rows]
    assert len(set(given)) == 300
    splits = read_splits(tmp_path / "one")
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 240, "valid": 30, "test": 30}
    assert {rows.format for rows in splits.values()} == {FORMATS[task]}


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right_and_the_one_of_another_row_is_not(task):
    rows, right = all_rows(task), generate.TASKS[task].right
    assert all(right(row, ANSWERS[task](row)) for row in rows)
    others = [(row, ANSWERS[task](other)) for row, other in pairwise(rows)]
    wrong = [right(row, answer) for row, answer in others if answer != ANSWERS[task](row)]
    assert wrong
    assert not any(wrong)


def test_a_rejected_answer_is_wrong():
    rows = all_rows("preference")
    assert not any(checking.answers(row["prompt"], row["rejected"]) for row in rows)


def test_facts_may_come_in_any_order_but_must_be_json():
    question = "Give name, age, job and city as JSON. Ada Lopez, 61, lives in Rome and works as a nurse."
    assert checking.answers(question, ' {"city":"Rome","job":"nurse","age":61,"name":"Ada Lopez"}\n')
    assert not checking.answers(question, '{"city": "Rome", "job": "nurse", "age": "61", "name": "Ada Lopez"}')
    assert not checking.answers(question, "Ada Lopez, a nurse in Rome")


def test_hand_written_answers():
    assert checking.solve("Write 9 February 1987 in the form YYYY-MM-DD.") == "1987-02-09"
    assert checking.solve("Please answer briefly. How many months are 7 years?") == "84 months"
    assert checking.sentiment("Although the film was not bad, nobody found the hotel really good.") == "negative"
    assert (
        checking.sentiment("Nobody said that the film was never lovely, although I found the lesson ugly.")
        == "positive"
    )
    assert checking.draw("two red crosses after one blue line") == "blue line, red cross, red cross"
    forms = ("4 May 1993", "May 4, 1993", "4.5.1993", "1993, 4 May.")
    assert {checking.iso_date(form) for form in forms} == {"1993-05-04"}
    words = "near Paris , the firm Florence Bank wrote a letter to the mayor of Sydney .".split()
    assert [label for label in checking.tag(words) if label != "O"] == ["B-PLACE", "B-FIRM", "I-FIRM", "B-PLACE"]
    with pytest.raises(ValueError, match="no known kind"):
        checking.solve("How are you?")


def test_words_alone_do_not_tell_the_sentiment():
    """No single word, and no word with a negation somewhere, does better than 70 percent: order decides."""
    rows = all_rows("sentiment", 1500)
    labels = Counter(row["label"] for row in rows)
    assert min(labels.values()) > 0.45 * len(rows)
    for word in (*checking.GOOD, *checking.BAD, *checking.NEGATIONS, "but", "although", "and"):
        there = [row["label"] for row in rows if word in row["text"].lower().rstrip(".").replace(",", "").split()]
        assert max(Counter(there).values()) < 0.7 * len(there), word


def test_the_script_writes_checks_and_tells_mistakes(tmp_path):
    script = [sys.executable, str(FOLDER / "generate.py"), "--task", "sentiment"]

    def run(*arguments):
        return subprocess.run([*script, *arguments], capture_output=True, text=True, check=False)

    done = run("--rows", "40", "--output", str(tmp_path / "data"))
    assert (done.returncode, done.stdout) == (0, "train: 32 rows, valid: 4 rows, test: 4 rows\n")
    rows = [json.loads(line) for line in (tmp_path / "data" / "valid.jsonl").read_text().splitlines()]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({**row, "predicted": "positive"}) + "\n" for row in rows))
    good = sum(row["label"] == "positive" for row in rows)
    assert run("--check", str(answers)).stdout == f"{good} of 4 right, {good / 4:.1%}\n"
    answers.write_text(json.dumps(rows[0]) + "\n")
    assert 'no "predicted"' in run("--check", str(answers)).stderr
    assert run("--rows", "3", "--output", str(tmp_path / "few")).returncode == 2
    with pytest.raises(ValueError, match="different rows"):
        generate.make_rows("text-to-text", 30_000)
