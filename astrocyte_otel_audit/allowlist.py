"""`Allowlist`: which actions are audited."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache


class Allowlist:
    """Actions and globs (``*``, ``?``, ``[…]``; case counts). Empty allows nothing. Thread-safe and immutable."""

    def __init__(self, actions: Iterable[str]) -> None:
        self.actions = tuple(actions)
        self._pattern = re.compile("|".join(map(fnmatch.translate, self.actions))) if self.actions else None
        # Asked at every span's start and end. Actions come from data, so the cache is bounded.
        self.allows = lru_cache(maxsize=4096)(self._allows)

    def _allows(self, action: str) -> bool:
        return self._pattern is not None and self._pattern.match(action) is not None
