"""Stop strings: nothing of them is ever shown, and nothing else is lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxlm.errors import SamplingError
from mlxlm.generation.stopping import StopStrings


def stream(pieces, strings):
    stops = StopStrings(strings)
    shown = []
    for piece in pieces:
        shown.append(stops.add(piece))
        if stops.stopped:
            return "".join(shown), True
    return "".join(shown) + stops.finish(), False


@given(st.lists(st.text("ab\n", max_size=4)), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_however_the_text_is_cut_it_ends_at_the_first_stop_string(pieces, strings):
    text = "".join(pieces)
    places = [text.find(string) for string in strings if string in text]
    shown, stopped = stream(pieces, strings)
    assert stopped == bool(places)
    if not stopped:
        assert shown == text
    else:
        # A string that is complete earlier may stop the text before a longer one that began further left is complete.
        ends = {string: text.find(string) + len(string) for string in strings if string in text}
        assert shown == text[: len(shown)]
        assert any(text[len(shown) :].startswith(string) for string in ends)
        assert not any(string in shown for string in strings)


def test_text_is_shown_as_soon_as_it_can_be_no_stop_string():
    stops = StopStrings(["END"])
    assert stops.add("the E") == "the "
    assert stops.add("N") == ""
    assert stops.add("ough") == "ENough"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(SamplingError, match="empty"):
        StopStrings(["a", ""])
