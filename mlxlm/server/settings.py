"""What a server allows, and where it listens."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlxlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Limits of a server; each is checked before anything is computed.

    name: of the model, as clients ask for it.  api_key: what clients must send as bearer token, default None, nothing.
    hosts: names in the Host header that are answered, so that no page of another site reaches a server of this machine
    through a name of its own (DNS rebinding); "*" for any. Default those of loopback.
    max_rows: answers made at once.  max_waiting: answers that may wait for them; more get status 429.
    max_tokens: of one answer.  max_prompt_tokens: default what the model's context holds.
    max_choices: answers one request may ask for, over all its prompts.  max_inputs: texts of one embeddings request.
    max_body: bytes of a request.  body_seconds: until it must be there.  timeout: seconds of a whole request.
    grace: seconds that running requests get when the server is told to stop.  max_connections: at once.
    """

    name: str
    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]", "::1")
    max_rows: int = 16
    max_waiting: int = 64
    max_tokens: int = 4096
    max_prompt_tokens: int | None = None
    max_choices: int = 16
    max_inputs: int = 256
    max_body: int = 4 * 2**20
    body_seconds: float = 30.0
    timeout: float = 600.0
    grace: float = 30.0
    max_connections: int = 512

    def __post_init__(self) -> None:
        least = {"max_rows": 1, "max_waiting": 0, "max_tokens": 1, "max_choices": 1, "max_inputs": 1, "max_body": 1}
        for name, low in {**least, "max_connections": 1}.items():
            if getattr(self, name) < low:
                raise UsageError(f"{name} is {getattr(self, name)}, but must be {low} or more")
        if self.max_prompt_tokens is not None and self.max_prompt_tokens < 1:
            raise UsageError(f"max_prompt_tokens is {self.max_prompt_tokens}, but must be 1 or more")
        for name in ("body_seconds", "timeout", "grace"):
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise UsageError(f"{name} is {value}, but must be a number of seconds above 0")
        if self.api_key is not None and (not self.api_key.isascii() or len(self.api_key.strip()) < 8):
            raise UsageError("an API key is at least 8 characters of ASCII")

    @property
    def choices(self) -> int:
        """Answers that one request may ask for: never more than the queue can hold."""
        return min(self.max_choices, self.max_waiting + 1)
