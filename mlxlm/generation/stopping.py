"""Stop strings: text is held back as long as it may be the beginning of one."""

from __future__ import annotations

from collections.abc import Iterable

from mlxlm.errors import SamplingError


class StopStrings:
    """Passes text on up to the first stop string, which is not passed on.

    strings: what ends the text. Raises SamplingError when one is empty.
    """

    def __init__(self, strings: Iterable[str] = ()):
        self.strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if any(not string for string in self.strings):
            raise SamplingError("a stop string is empty; it would stop every answer at once")
        self.stopped = False
        self._held = ""

    def add(self, text: str) -> str:
        """What can be passed on now. Sets `stopped` when a stop string is complete."""
        if self.stopped or not self.strings:
            return "" if self.stopped else text
        text = self._held + text
        found = [place for place in (text.find(string) for string in self.strings) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(self.beginning(text, string) for string in self.strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back and turned out to be no stop string."""
        rest, self._held = self._held, ""
        return rest

    @staticmethod
    def beginning(text: str, string: str) -> int:
        """Length of the longest end of `text` that begins `string`."""
        longest = min(len(text), len(string) - 1)
        return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)
