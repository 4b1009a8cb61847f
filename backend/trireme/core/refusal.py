"""Refusal: the one way to say no to a user. What cannot be done, why, and how to fix it."""

from __future__ import annotations

from typing import Literal

Kind = Literal["invalid", "unavailable", "cancelled", "deadline", "internal"]


class Refusal(ValueError):
    """A request, setting or machine that Trireme turns down; `str()` is one line for a user to read.

    `kind` becomes the server's error code: invalid -> INVALID_ARG, unavailable -> UNAVAILABLE, and so on.
    Faults of our own code are assertions, never refusals.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "", kind: Kind = "invalid"):
        self.what, self.why, self.fix, self.kind = what, why, fix, kind
        super().__init__(f"{what}{f': {why}' if why else ''}{f' (fix: {fix})' if fix else ''}")

    def __reduce__(self):
        return (_again, (self.what, self.why, self.fix, self.kind))


def _again(what: str, why: str, fix: str, kind: Kind) -> Refusal:
    return Refusal(what, why=why, fix=fix, kind=kind)
