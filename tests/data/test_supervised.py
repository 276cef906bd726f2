"""Supervised data: what is learned from a row, truncation, batches, packing, exact resume."""

import json

import numpy as np
import pytest

from mlxlm.data.supervised import Encoding, Example, encode_rows, label_names
from mlxlm.data.supervised_batches import SupervisedSource, pack_examples, pad_examples
from mlxlm.data.supervised_rows import check_rows, read_rows, read_splits, renaming
from mlxlm.errors import DataError, UsageError

IGNORE = -100
TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
OPENING = "{% if add_generation_prompt %}<assistant>{% endif %}"
# Drops the answers of earlier turns once a later one follows, as templates of reasoning models do.
REWRITING = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' and not loop.last %}-{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}" + OPENING
)
# Opens a block in an answer that the rendered answer doesn't have.
THINKING = TURNS + "{% if add_generation_prompt %}<assistant><think>{% endif %}"
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yo"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "ok"},
]


class Letters:
    """A tokenizer whose tokens are characters, and </s>."""

    eos_id, sep_id, bos_id = 1, None, None
    stop_ids, special_ids = frozenset({1}), frozenset({1})

    def __init__(self, chat_template=None):
        self.chat_template = chat_template

    def encode(self, text, pair=None, *, add_special_tokens=True):
        parts = text.split("</s>")
        ids = [ord(letter) for letter in parts[0]]
        for part in parts[1:]:
            ids += [1, *map(ord, part)]
        return ids

    def decode(self, ids, *, skip_special_tokens=True):
        return "".join(self.token(id) for id in ids)

    def token(self, id):
        return "</s>" if id == 1 else chr(id)

    def render_chat(self, messages, *, tools=None, add_generation_prompt=True, **variables):
        import jinja2

        environment = jinja2.Environment(trim_blocks=False)
        return environment.from_string(self.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt
        )


def rows(*values):
    return check_rows("data", [(f"line {number}", value) for number, value in enumerate(values, 1)])


def encoded(row, template=None, **settings):
    tokenizer = Letters(template)
    examples, report = encode_rows(rows(row), tokenizer, Encoding(**{"max_length": 500, **settings}))
    return examples, report, tokenizer


def learned(example, tokenizer):
    """The learned stretches of a text, separated by |, as their targets spell them."""
    targets = np.array(example.tokens)[np.array(example.scored)]
    return tokenizer.decode(targets.tolist())


def test_all_assistant_turns_are_learned_with_their_ends_and_nothing_else():
    (example,), _, tokenizer = encoded({"messages": CHAT}, TURNS + OPENING)
    assert learned(example, tokenizer) == "yo</s>ok</s>"
    text = "<user>hi</s>\n<assistant>yo</s>\n<user>and</s>\n<assistant>ok</s>"
    assert tokenizer.decode(example.tokens) == text


def test_completion_only_learns_the_last_turn():
    (example,), _, tokenizer = encoded({"messages": CHAT}, TURNS + OPENING, loss_on="completion")
    assert learned(example, tokenizer) == "ok</s>"


def test_loss_on_all_learns_every_token():
    (example,), _, _ = encoded({"messages": CHAT}, TURNS + OPENING, loss_on="all")
    assert all(example.scored)


def test_a_template_that_rewrites_earlier_turns_gives_an_example_a_turn_and_says_so():
    examples, report, tokenizer = encoded({"messages": CHAT}, REWRITING)
    assert [learned(example, tokenizer) for example in examples] == ["yo</s>", "ok</s>"]
    assert "<assistant>-</s>" in tokenizer.decode(examples[1].tokens)
    assert report.split == 1
    assert "one turn at a time" in str(report)


def test_chats_without_a_template_are_told_what_to_do():
    with pytest.raises(DataError, match="line 1: the rows are chats, and this model has no chat template"):
        encoded({"messages": CHAT})


def test_an_opening_that_the_answer_lacks_is_not_taken_for_it():
    (example,), _, tokenizer = encoded({"messages": CHAT}, THINKING)
    assert learned(example, tokenizer) == "yo</s>ok</s>"


def test_turns_that_cannot_be_told_apart_are_an_error_with_the_line():
    with pytest.raises(DataError, match="line 1: message 2"):
        encoded({"messages": CHAT}, "{{ messages | length }} messages {{ messages[-1].content | reverse }}")


def test_a_template_without_an_end_gets_the_end_of_text():
    (example,), _, tokenizer = encoded(
        {"messages": CHAT[:2]}, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}" + OPENING
    )
    assert learned(example, tokenizer) == "yo</s>"


@pytest.mark.parametrize("template", [None, TURNS + OPENING], ids=["plain", "chat"])
def test_of_prompt_and_completion_the_completion_is_learned(template):
    (example,), _, tokenizer = encoded({"prompt": "2+2=", "completion": "4"}, template)
    assert learned(example, tokenizer) == "4</s>"


@pytest.mark.parametrize(
    ("policy", "tokens"), [("cut-left", "efgh</s>"), ("cut-right", "abcde")], ids=["left", "right"]
)
def test_cutting_keeps_the_other_end_and_is_counted(policy, tokens):
    (example,), report, tokenizer = encoded({"text": "abcdefgh"}, max_length=5, truncation=policy)
    assert tokenizer.decode(example.tokens) == tokens
    assert report.cut == 1
    assert report.longest == 9
    assert f"policy {policy}): 1 cut" in str(report)


def test_rows_left_without_a_target_are_dropped_and_counted():
    both = rows({"prompt": "abcdefgh", "completion": "z"}, {"prompt": "a", "completion": "z"})
    examples, report = encode_rows(both, Letters(), Encoding(max_length=5))
    assert (len(examples), report.cut, report.dropped_empty) == (1, 1, 1)


def test_too_long_rows_can_be_dropped_or_refused():
    both = rows({"text": "abcdefgh"}, {"text": "a"})
    examples, report = encode_rows(both, Letters(), Encoding(max_length=5, truncation="drop"))
    assert (len(examples), report.dropped_long) == (1, 1)
    with pytest.raises(DataError, match="line 1: 9 tokens are more than the 5 allowed"):
        encode_rows(both, Letters(), Encoding(max_length=5, truncation="error"))
    with pytest.raises(UsageError, match="did you mean 'cut-left'"):
        Encoding(max_length=5, truncation="cut-lef")


def test_tags_stand_on_the_first_token_of_each_word():
    data = rows({"tokens": ["ab", "c"], "labels": ["X", "O"]})
    (example,), _ = encode_rows(data, Letters(), Encoding(max_length=9, labels=label_names(data)))
    assert example.label == [1, IGNORE, 0, IGNORE] or example.label == [1, IGNORE, 0]
    assert example.num_targets == 2


def test_rows_of_another_purpose_are_told_with_the_columns_that_would_help(tmp_path):
    with pytest.raises(DataError, match="are for preference learning, not for this; did you mean"):
        encoded({"prompt": "a", "reply": "b"})
    with pytest.raises(DataError, match="'choices' are for evaluation"):
        encoded({"prompt": "a", "choices": ["b", "c"], "answer": 0})
    (tmp_path / "empty.md").write_text(" \n\n")
    with pytest.raises(DataError, match=r"empty.md has no text$"):
        read_rows(tmp_path / "empty.md")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        (
            {"question": "a", "answer": "b"},
            "{prompt, completion}? Say so with --columns prompt=question --columns comp",
        ),
        ({"sentence": "a", "label": 1}, "{text, label}? Say so with --columns text=sentence"),
        ({"words": ["a"], "ner_tags": ["O"]}, "{tokens, labels}? Say so with --columns tokens=words --columns labels"),
        ({"article": "a", "summary": "b"}, "{source, target}? Say so with --columns source=article"),
        ({"text": "a", "id": 3}, ""),
        ({"text": "a", "label": "b", "response": "c"}, ""),
        ({"messages": []}, ""),
    ],
)
def test_usual_names_of_columns_are_known(row, hint):
    assert hint in renaming(row)
    assert bool(renaming(row)) == bool(hint)


def test_an_unknown_label_is_an_error_with_the_line():
    with pytest.raises(DataError, match="line 1: unknown label 'goo'; did you mean 'good'"):
        encode_rows(rows({"text": "a", "label": "goo"}), Letters(), Encoding(max_length=9, labels=("bad", "good")))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([{"txt": "a"}], "line 1: .*did you mean 'text'"),
        ([{"text": "a"}, {"prompt": "a", "completion": "b"}], "line 2: the row lacks text"),
        ([{"text": "a"}, {"text": "a", "label": "b"}], "line 2: the row is of format 'classification'"),
        ([{"prompt": 3, "completion": "b"}], "line 1: 'prompt' must be text"),
        ([{"messages": CHAT[:1]}], "line 1: no message has the role 'assistant'"),
        ([{"tokens": ["a"], "labels": []}], "line 1: 1 tokens but 0 labels"),
    ],
    ids=["unknown", "mixed", "more", "type", "no-answer", "tags"],
)
def test_bad_rows_are_errors_with_their_line(values, message):
    with pytest.raises(DataError, match=message):
        rows(*values)


def test_splits_are_read_from_a_folder_and_lines_are_counted_with_empty_ones(tmp_path):
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": "a"}) + "\n\n" + json.dumps({"text": "b"}) + "\n")
    splits = read_splits(tmp_path)
    assert {name: len(found) for name, found in splits.items()} == {"train": 2, "valid": 2}
    assert splits["train"].rows[1][0].endswith("line 3")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{"text": 1}\n')
    with pytest.raises(DataError, match="line 3: 'text' must be text"):
        read_rows(tmp_path / "bad.jsonl")


def word_examples(count, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 40, count)
    return [Example([i + 1, *rng.integers(2, 90, n).tolist()], [False, *[True] * n]) for i, n in enumerate(lengths)]


def test_targets_are_the_real_ones_and_no_padding():
    """Bug 1 of the field: one padding token a row counted as a target (160 for 156)."""
    examples = word_examples(7)
    batch = pad_examples(examples, 64)
    assert (batch["targets"] != IGNORE).sum() == sum(len(example.tokens) - 1 for example in examples)
    for row, example in enumerate(examples):
        length = batch["key_lengths"][row]
        assert batch["tokens"][row, :length].tolist() == example.tokens[:-1]
        assert batch["targets"][row, :length].tolist() == example.tokens[1:]
        assert (batch["targets"][row, length:] == IGNORE).all()


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("count", [1, 7, 130])
def test_every_row_of_the_data_is_trained_once_an_epoch(count, packing):
    """Bug 3: the rows of a last partial batch were never trained."""
    examples = word_examples(count)
    source = SupervisedSource(examples, 4, max_length=64, packing=packing, epochs=2)
    for _ in range(2):
        seen, epoch = [], source.epoch
        while source.epoch == epoch:
            batch = source.next()
            starts = batch["positions"] == 0 if packing else np.arange(batch["tokens"].shape[1])[None] == 0
            found = batch["tokens"][starts & (batch["tokens"] > 0)] if packing else batch["tokens"][:, 0]
            seen += found.tolist()
        assert sorted(seen) == list(range(1, count + 1))
    assert source.next() is None


def test_rows_of_a_batch_are_of_like_length():
    """Bug 2: the sort by length sorted by something else."""
    examples = word_examples(256)
    source = SupervisedSource(examples, 8, max_length=64, epochs=1, multiple=1)
    padded = real = 0
    while (batch := source.next()) is not None:
        padded, real = padded + batch["tokens"].size, real + int(batch["key_lengths"].sum())
    assert real / padded > 0.9


def test_packed_targets_do_not_cross_examples():
    batch = pack_examples([[Example([5, 6, 7], [False, False, True]), Example([8, 9], [False, True])]], 6)
    assert batch["tokens"].tolist() == [[5, 6, 8, 0, 0, 0]]
    assert batch["targets"].tolist() == [[IGNORE, 7, 9, IGNORE, IGNORE, IGNORE]]
    assert batch["positions"].tolist() == [[0, 1, 0, 0, 0, 0]]
    assert batch["segments"].tolist() == [[1, 1, 2, 0, 0, 0]]


def test_a_decoder_starts_with_its_start_token_and_learns_the_end():
    data = rows({"source": "ab", "target": "c"})
    examples, _ = encode_rows(data, Letters(), Encoding(max_length=8, seq2seq=True))
    batch = pad_examples(examples, 8, 1, decoder_start=0)
    assert batch["decoder_tokens"].tolist() == [[0, ord("c")]]
    assert batch["targets"].tolist() == [[ord("c"), 1]]


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("after", [0, 3, 20, 45])
def test_a_restored_source_goes_on_exactly(after, packing):
    def make(size=4):
        return SupervisedSource(word_examples(70), size, max_length=64, packing=packing, seed=3)

    source, other = make(), make()
    for _ in range(after):
        source.next()
    other.restore(json.loads(json.dumps(source.state())))
    for _ in range(25):
        mine, theirs = source.next(), other.next()
        assert all((mine[name] == theirs[name]).all() for name in mine)
    assert source.state() == other.state()
    with pytest.raises(DataError, match="other data or other batches"):
        make(5).restore(source.state())


def test_a_source_is_not_restored_on_other_contents_of_the_same_size():
    """Rows that were edited in place have the same counts, and yet are other data."""
    examples, edited = word_examples(9), word_examples(9)
    edited[4].tokens[1] += 1
    state = SupervisedSource(examples, 4, max_length=64).state()
    assert sum(len(example.tokens) for example in examples) == sum(len(example.tokens) for example in edited)
    with pytest.raises(DataError, match="other data or other batches"):
        SupervisedSource(edited, 4, max_length=64).restore(state)
    relabelled = [Example(one.tokens, [False] * len(one.tokens), label=0) for one in examples]
    other = [*relabelled[:-1], Example(examples[-1].tokens, relabelled[-1].scored, label=1)]
    state = SupervisedSource(relabelled, 4, max_length=64).state()
    with pytest.raises(DataError, match="other data or other batches"):
        SupervisedSource(other, 4, max_length=64).restore(state)


def test_a_pair_has_types_only_for_models_that_read_them():
    class Pairs(Letters):
        def encode_with_types(self, text, pair=None):
            ids = [ord(c) for c in text + pair]
            return ids, [0] * len(text) + [1] * len(pair)

    data = rows({"text": "ab", "pair": "c", "label": "x"})
    for wanted, types in ((True, [0, 0, 1]), (False, None)):
        (example,), _ = encode_rows(data, Pairs(), Encoding(max_length=9, labels=("x",), token_types=wanted))
        assert example.types == types
