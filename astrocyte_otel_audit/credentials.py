"""Does a short string look like a credential? Guessing wrong towards yes costs a length in place of a token."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Final

#: How the keys of well-known services begin.
_PREFIXES: Final = (
    "sk-", "sk_", "pk_live", "pk_test", "rk_live", "rk_test",
    "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "gldt-",
    "xoxa-", "xoxb-", "xoxp-", "xoxr-", "xoxs-", "xapp-",
    "AKIA", "ASIA", "AIza", "ya29.", "hf_", "npm_", "pypi-", "dop_v1_", "SG.", "shpat_", "lin_api_",
    "whsec_", "vault:", "hvs.", "lf_sk_", "pplx-", "gsk_", "r8_", "eyJ",
)  # fmt: skip
#: A URL or DSN that carries a user's name or password has an @, which no token has; these have not.
_SEPARATOR = re.compile(r"[_.:/-]")
_HEX = re.compile(r"[0-9a-f]+|[0-9A-F]+")
_MIN_RUN = 20
_MIN_ENTROPY_BITS = 3.5


def looks_like_credential(token: str, *, is_id: bool) -> bool:
    """Say whether a token should be treated as a secret.

    Args:
        token: letters, digits and ``_.:/-`` only.
        is_id: the token stands under a key that names an id, where randomness is expected: only a known
            prefix counts there. Hexadecimal runs and UUIDs are taken for ids everywhere.
    """
    if token.startswith(_PREFIXES):
        return True
    if is_id or len(token) < _MIN_RUN:
        return False
    return any(_is_random(run) for run in _SEPARATOR.split(token))


def _is_random(run: str) -> bool:
    if len(run) < _MIN_RUN or _HEX.fullmatch(run):
        return False
    if run.isdigit() or (run.isalpha() and (run.islower() or run.isupper())):
        return False
    length = len(run)
    entropy = -sum(count / length * math.log2(count / length) for count in Counter(run).values())
    return entropy >= _MIN_ENTROPY_BITS
