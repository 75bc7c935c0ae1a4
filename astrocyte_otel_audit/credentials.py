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
_MIN_FRAGMENTS = 16
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
    if is_id or len(token) < _MIN_FRAGMENTS:
        return False
    runs = _SEPARATOR.split(token)
    return any(map(_is_random, runs)) or _are_random_fragments(runs)


def _is_random(run: str) -> bool:
    if len(run) < _MIN_RUN or _HEX.fullmatch(run):
        return False
    if run.isdigit() or (run.isalpha() and (run.islower() or run.isupper())):
        return False
    return _entropy_bits(run) >= _MIN_ENTROPY_BITS


def _are_random_fragments(runs: list[str]) -> bool:
    """Base64 has separators among its digits, which cut one token in three into runs too short to judge alone."""
    joined = "".join(run for run in runs if not _is_word_or_number(run))
    if len(joined) < _MIN_FRAGMENTS or not all(
        any(map(kind, joined)) for kind in (str.islower, str.isupper, str.isdigit)
    ):
        return False
    return _entropy_bits(joined) >= _MIN_ENTROPY_BITS


def _is_word_or_number(run: str) -> bool:
    is_word = run.isalpha() and (run.islower() or run.isupper() or run.istitle())
    return is_word or run.isdigit() or _HEX.fullmatch(run) is not None


def _entropy_bits(text: str) -> float:
    length = len(text)
    return -sum(count / length * math.log2(count / length) for count in Counter(text).values())
