"""`Allowlist`: which actions are audited."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable

from astrocyte_otel_audit.memo import Memo


class Allowlist:
    """Actions and globs (``*``, ``?``, ``[…]``; case counts). Empty allows nothing. Thread-safe and immutable."""

    def __init__(self, actions: Iterable[str]) -> None:
        self.actions = tuple(actions)
        self._pattern = re.compile("|".join(map(fnmatch.translate, self.actions))) if self.actions else None
        #: Says whether an action is audited; asked at every span's start and end.
        self.allows: Callable[[str], bool] = Memo(self._allows).__getitem__

    def _allows(self, action: str) -> bool:
        return self._pattern is not None and self._pattern.match(action) is not None
