"""`Memo`: answers to questions that are asked at every span, remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeVar

_Question = TypeVar("_Question")
_Answer = TypeVar("_Answer")

_MAX_ANSWERS: Final = 4096
_MAX_LENGTH: Final = 256


class Memo(dict[_Question, _Answer]):
    """What a function answers to a name, or to a tuple with names in it. Thread-safe: ``memo[question]``.

    Names come from data, so it is bounded in both directions: it begins anew when it is full, and does not keep
    names of more than 256 characters, since thousands of them, a megabyte each, would fill the memory.
    """

    def __init__(self, answer: Callable[[_Question], _Answer]) -> None:
        super().__init__()
        self._answer = answer

    def __missing__(self, question: _Question) -> _Answer:
        answer = self._answer(question)
        names = question if isinstance(question, tuple) else (question,)
        if sum(len(name) for name in names if isinstance(name, str)) <= _MAX_LENGTH:
            if len(self) >= _MAX_ANSWERS:
                self.clear()
            self[question] = answer
        return answer
