"""What the key of a payload's entry says about its value: text, an id, a secret, or nothing."""

from __future__ import annotations

import enum
import re
from itertools import pairwise
from typing import Final

#: Digits are no words: what goes for ``name`` goes for ``name_2``.
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

#: A key whose last word is one of these holds text that people wrote or that names a person.
_TEXT_WORDS: Final = frozenset((
    "abstract", "address", "answer", "answers", "argument", "arguments", "body", "caption", "chunk", "chunks",
    "comment", "comments", "completion", "content", "contents", "conversation", "description", "detail",
    "details", "document", "documents", "email", "emails", "excerpt", "fact", "facts", "history", "input",
    "inputs", "instruction", "instructions", "memories", "memory", "message", "messages", "msg", "name", "names",
    "note", "notes", "observation", "observations", "output", "outputs", "passage", "passages", "phone", "prompt",
    "prompts", "q", "queries", "query", "question", "questions", "quote", "reason", "reasoning", "reply",
    "sentence", "sentences", "snippet", "subject", "summary", "text", "texts", "thought", "thoughts", "title",
    "titles", "transcript", "turn", "turns", "username", "utterance", "utterances",
))  # fmt: skip
#: A key that holds one of these words, anywhere, holds a secret, …
_SECRET_WORDS: Final = frozenset((
    "authorization", "authorisation", "bearer", "cookie", "cookies", "credential", "credentials", "passphrase",
    "passcode", "passwd", "password", "passwords", "pwd", "secret", "secrets", "apikey", "apikeys", "accesskey",
    "privatekey", "secretkey", "dsn", "otp", "pin", "ssn",
))  # fmt: skip
#: … or one that ends so, as where words are run together (``PGPASSWORD``, ``clientsecret``), …
_SECRET_ENDINGS: Final = ("password", "passwd", "passphrase", "secret", "apikey")
_SECRET_PAIRS: Final = frozenset(
    [("api", "key"), ("api", "keys"), ("access", "key"), ("private", "key"), ("secret", "key"), ("signing", "key"),
     ("encryption", "key"), ("session", "key"), ("hash", "key"),
     ("access", "tokens"), ("api", "tokens"), ("auth", "tokens"), ("refresh", "tokens")]
)  # fmt: skip
#: … and so does one that ends in one of these (``access_token``, but not ``token_count``).
_SECRET_LAST_WORDS: Final = frozenset(
    ["auth", "jwt", "pass", "pw", "token", "accesstoken", "authtoken", "refreshtoken"]
)
#: A key that ends in one of these names a thing: its value may look random without being a secret.
_ID_WORDS: Final = frozenset(["id", "ids", "uuid", "guid", "hash", "sha", "digest", "fingerprint"])


class Rule(enum.Enum):
    """What may become of the value under a key."""

    PLAIN = enum.auto()
    ID = enum.auto()
    TEXT = enum.auto()
    KEEP = enum.auto()
    HASH = enum.auto()
    REDACT = enum.auto()
    DROP = enum.auto()


def inherited(outer: Rule, own: Rule) -> Rule:
    """Return the rule under a key that holds text, or that is kept or hashed: the same, unless its own is stricter.

    Among text, ids stay ids. A setting that names the inner key itself is obeyed.
    """
    if outer not in (Rule.TEXT, Rule.KEEP, Rule.HASH):
        return own
    if own is Rule.PLAIN or own is Rule.TEXT or (own is Rule.ID and outer is not Rule.TEXT):
        return outer
    return own


def classify(key: str) -> Rule:
    """Return the rule that a key suggests by the words in it, in snake_case, camelCase or kebab-case."""
    words = [word.lower() for word in _WORD.findall(key)]
    if not words:
        return Rule.PLAIN
    if not _SECRET_WORDS.isdisjoint(words) or words[-1] in _SECRET_LAST_WORDS:
        return Rule.REDACT
    if not _SECRET_PAIRS.isdisjoint(pairwise(words)) or any(word.endswith(_SECRET_ENDINGS) for word in words):
        return Rule.REDACT
    if words[-1] in _TEXT_WORDS:
        return Rule.TEXT
    return Rule.ID if words[-1] in _ID_WORDS else Rule.PLAIN
