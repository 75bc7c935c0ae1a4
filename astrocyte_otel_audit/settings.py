"""Every setting, once: its argument, its environment variable, its default and what it accepts.

An argument wins over its variable, a variable over the default. A value that can't be used is refused here,
before anything runs, by a `ConfigurationError` that names the argument or the variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from astrocyte_otel_audit.errors import ConfigurationError

PREFIX: Final = "OTEL_ASTROCYTE_AUDIT_"
DEFAULT_TABLE: Final = "astrocyte_audit_log"
DEFAULT_SCHEMA: Final = "public"
DEFAULT_ROLE_PREFIX: Final = "astrocyte_audit"
#: In place of a number of days.
FOREVER: Final = "forever"

#: Postgres cuts names at 63 bytes; the longest name derived from the table's has 19 more than it.
_MAX_TABLE_NAME = 44
#: The longest that a role's name has more than the prefix: _sweeper.
_MAX_ROLE_PREFIX = 55
#: Milliseconds that a timeout of Postgres can be: 24 days.
_MAX_MILLIS = 2_147_483_647
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_$-]{0,62}")


class Setting(NamedTuple):
    """One setting of `configure_audit`."""

    name: str
    #: Environment variables that are read in this order.
    variables: tuple[str, ...]
    default: Any
    #: Turns an argument into the value that is used, or raises with what is accepted.
    accept: Callable[[Any, str], Any]
    help: str
    #: Turns a variable's text into an argument; by default the text itself.
    parse: Callable[[str], Any] = str

    def resolve(self, argument: Any = None, environ: Mapping[str, str] | None = None) -> Any:
        """Return the argument if there is one, else the variable's value, else the default.

        Raises:
            ConfigurationError: naming the argument or the variable that holds an unusable value.
        """
        if argument is not None:
            return self.accept(argument, self.name)
        environ = os.environ if environ is None else environ
        for variable in self.variables:
            if text := environ.get(variable, "").strip():
                return self.read(text, variable)
        return self.default

    def read(self, text: str, source: str) -> Any:
        """Return the value that a text says, of a variable or of a command's option.

        Raises:
            ConfigurationError: naming the source that holds an unusable value.
        """
        try:
            parsed = self.parse(text)
        except ValueError:
            parsed = text  # refused below, with what is accepted
        return self.accept(parsed, source)


def identifier(value: object, source: str, *, longest: int = 63) -> str:
    """Return the name of a table or schema, checked. It is always quoted in SQL; this is the second lock.

    Raises:
        ConfigurationError: not a name, too long, or one that Postgres keeps for itself.
    """
    if not isinstance(value, str) or not _IDENTIFIER.fullmatch(value) or len(value) > longest:
        raise ConfigurationError(
            source,
            f"got {shown(value)}; accepted is a name of 1 to {longest} letters, digits, '_', '$' or '-', "
            "beginning with a letter or '_' (case counts, as names are quoted)",
        )
    if value.lower().startswith("pg_") or value.lower() == "information_schema":
        raise ConfigurationError(source, f"got {shown(value)}; names that begin with pg_ belong to Postgres")
    return value


def is_identifier(value: object) -> bool:
    """Say whether `identifier` would accept a schema's name; never raises."""
    try:
        identifier(value, "schema")
    except ConfigurationError:
        return False
    return True


def role_prefix(value: object, source: str) -> str:
    """Return what the names of the roles begin with, checked as `identifier` does."""
    return identifier(value, source, longest=_MAX_ROLE_PREFIX)


def _table(value: object, source: str) -> str:
    return identifier(value, source, longest=_MAX_TABLE_NAME)


def _schema(value: object, source: str) -> Any:
    return value if callable(value) else identifier(value, source)


def _dsn(value: object, source: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ConfigurationError(source, "not a connection string; accepted is postgresql://… or key=value pairs")
    return value  # parsed by `postgres`, which knows the grammar


def actions(value: object, source: str) -> tuple[str, ...]:
    """Return an allowlist: a list of actions or globs, or ``"*"``.

    Raises:
        ConfigurationError: a bare string other than ``"*"`` (upstream took it for a list of its letters), or a
            member that isn't a string.
    """
    if value == "*":
        return ("*",)
    accepted = "accepted is a list of actions or globs, such as ['retain', 'recall.*'], or '*' for all"
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ConfigurationError(source, f"got {shown(value)}; {accepted}")
    members = tuple(value)
    for member in members:
        if not isinstance(member, str) or not member.strip():
            raise ConfigurationError(source, f"holds {shown(member)}; {accepted}")
    return members


def _name(value: object, source: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_.:/-]{1,64}", value):
        raise ConfigurationError(source, f"got {shown(value)}; accepted is a name of up to 64 of A-Z a-z 0-9 _ . : / -")
    return value


def _mappings(value: object, source: str) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise ConfigurationError(
            source, f"got {shown(value)}; accepted is a list of SpanMapping or preset names, such as ['astrocyte']"
        )
    return tuple(value)


def _keys(value: object, source: str) -> tuple[str, ...]:
    members = tuple(value) if isinstance(value, Iterable) and not isinstance(value, (str, bytes)) else (None,)
    if not all(isinstance(member, str) and member for member in members):
        raise ConfigurationError(source, f"got {shown(value)}; accepted is a list of keys, such as ['enduser.id']")
    return members


def _days(value: object, source: str) -> int | str:
    if value != FOREVER and (type(value) is not int or value < 1):
        raise ConfigurationError(source, f"got {shown(value)}; accepted is a whole number of days, or {FOREVER!r}")
    return value


def _days_by_name(value: object, source: str) -> dict[str, int | None]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise ConfigurationError(
            source,
            "not days by name; accepted is recall=30,forget=forever in a variable, and {'recall': 30, 'forget': None} "
            "as an argument",
        )
    given = ((name, None if days == FOREVER else days) for name, days in value.items())
    return {name: None if days is None else positive_int(days, source) for name, days in given}


def _parse_days(text: str) -> int | str:
    return text if text == FOREVER else int(text)


def _parse_by_name(text: str) -> dict[str, int | str]:
    parted = [member.rpartition("=") for member in _comma_list(text)]
    found = {name.strip(): _parse_days(days.strip()) for name, _, days in parted}
    if len(found) < len(parted):
        raise ValueError  # which of them is meant?
    return found


def _minimum(value: object, source: str) -> int | str:
    # Which rules there are is the policy's to know.
    return _name(value, source) if isinstance(value, str) else positive_int(value, source)


def _parse_minimum(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _comma_list(text: str) -> list[str] | str:
    return text if text == "*" else [member.strip() for member in text.split(",") if member.strip()]


def _spool_dir(value: object, source: str) -> Path | Literal[False]:
    if value is False:
        return False
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ConfigurationError(source, f"got {shown(value)}; accepted is a directory, or False for no spool")
    return Path(os.fspath(value)).expanduser().absolute()


#: Where records go that another process writes, unless they have a place by another name.
DEFAULT_DESTINATION: Final = "default"


def default_spool_dir(environ: Mapping[str, str] | None = None) -> Path:
    """Return where records are kept until they are in the table: a directory of the user's own state."""
    environ = os.environ if environ is None else environ
    state = environ.get("XDG_STATE_HOME") or os.path.join(
        environ.get("HOME") or os.path.expanduser("~"), ".local/state"
    )
    return Path(state) / "astrocyte-otel-audit" / "spool"


def one_of(*words: str) -> Callable[[object, str], str]:
    """Return a check for one of some words."""

    def accept(value: object, source: str) -> str:
        if not isinstance(value, str) or value not in words:
            raise ConfigurationError(source, f"got {shown(value)}; accepted is {', '.join(words[:-1])} or {words[-1]}")
        return value

    return accept


def positive_int(value: object, source: str) -> int:
    """Return a whole number of at least 1, or raise `ConfigurationError`."""
    if type(value) is not int or value < 1:
        raise ConfigurationError(source, f"got {shown(value)}; accepted is a whole number of at least 1")
    return value


def positive_number(value: object, source: str) -> float:
    """Return a number above 0 that Postgres and a thread can wait for, or raise `ConfigurationError`."""
    if type(value) not in (int, float) or not 0 < value <= _MAX_MILLIS:  # type: ignore[operator]
        raise ConfigurationError(source, f"got {shown(value)}; accepted is a number above 0, at most {_MAX_MILLIS}")
    return float(value)  # type: ignore[arg-type]


def not_negative(value: object, source: str) -> float:
    """Return a number of seconds up to a day, or raise `ConfigurationError`."""
    if type(value) not in (int, float) or not 0 <= value <= 86_400:  # type: ignore[operator]
        raise ConfigurationError(source, f"got {shown(value)}; accepted is a number of seconds from 0 to 86400")
    return float(value)  # type: ignore[arg-type]


def boolean(value: object, source: str) -> bool:
    """Return a boolean, or raise `ConfigurationError`."""
    if type(value) is not bool:
        raise ConfigurationError(source, f"got {shown(value)}; accepted is true or false")
    return value


def _parse_boolean(text: str) -> bool:
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError
    return words[text.lower()]


def shown(value: object) -> str:
    """Return a value as an error may show it: by its type where it is no name or number, short, never a password."""
    if isinstance(value, str) and ("://" in value or "=" in value):
        return "what looks like a connection string"
    if not isinstance(value, (str, int, float)) or (isinstance(value, int) and value.bit_length() > 256):
        return f"a {type(value).__name__}"
    return repr(value)[:80]


def _setting(
    name: str, default: Any, accept: Any, help: str, parse: Callable[[str], Any] = str, *fallback: str
) -> Setting:
    return Setting(name, (PREFIX + name.upper(), *fallback), default, accept, help, parse)


SETTINGS: Final[Mapping[str, Setting]] = {
    setting.name: setting
    for setting in (
        _setting("dsn", None, _dsn, "Where the table is: a connection string of the writer's role."),
        _setting(
            "actions", (), actions, "What is audited: actions or globs; none by default, '*' for all.", _comma_list
        ),
        _setting("mappings", (), _mappings, "Spans of others that are audited too: presets by name.", _comma_list),
        _setting(
            "actor_baggage",
            (),
            _keys,
            "Keys of OpenTelemetry baggage that say who acts, where nothing else does.",
            _comma_list,
        ),
        _setting("schema", DEFAULT_SCHEMA, _schema, "Schema of the table where no tenant's is in scope."),
        _setting("table", DEFAULT_TABLE, _table, "Name of the table, the same in every schema."),
        _setting("migrate", False, boolean, "Create or upgrade missing tables, and tenants' schemas.", _parse_boolean),
        _setting(
            "writer",
            "thread",
            one_of("thread", "external"),
            "Who writes: a thread of this process, or `astrocyte-otel-audit writer` beside it.",
        ),
        _setting(
            "destination",
            None,
            _name,
            "Name of the place where records go, for who shares a spool; made of the DSN by default, or 'default'.",
        ),
        _setting(
            "spool_dir",
            None,
            _spool_dir,
            "Where records are kept until they are in the table; 'off' for in memory only.",
            lambda text: False if text == "off" else text,
        ),
        _setting(
            "spool_max_bytes", 1 << 30, positive_int, "Bytes that this process's part of the spool may have.", int
        ),
        _setting(
            "spool_fsync", "interval", one_of("never", "interval", "always"), "When the spool is synced to its disk."
        ),
        _setting(
            "spool_keep_seconds",
            0.0,
            not_negative,
            "Seconds that a part of the spool stays after it is in the table, to be written again after a failover.",
            float,
        ),
        _setting("on_full", "drop", one_of("drop", "block"), "What a call does where the spool is full."),
        _setting(
            "on_full_timeout_millis",
            1_000.0,
            positive_number,
            "Milliseconds that a call waits for room with on_full='block', before it drops.",
            float,
        ),
        _setting(
            "max_queue_size",
            32_768,
            positive_int,
            "Records that are held in memory; past it, new ones are in the spool only, or refused where there is none.",
            int,
            "OTEL_BSP_MAX_QUEUE_SIZE",
        ),
        _setting(
            "max_export_batch_size",
            2_048,
            positive_int,
            "Records in one transaction, at most.",
            int,
            "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        ),
        _setting(
            "schedule_delay_millis",
            200.0,
            positive_number,
            "Milliseconds that a record waits for company before it is written.",
            float,
            "OTEL_BSP_SCHEDULE_DELAY",
        ),
        _setting(
            "export_timeout_millis",
            30_000.0,
            positive_number,
            "Milliseconds that one statement, and the drain at shutdown, may take.",
            float,
            "OTEL_BSP_EXPORT_TIMEOUT",
        ),
        _setting("retention_days", None, _days, "Days that records are kept, or 'forever'.", _parse_days),
        _setting("retention_actions", {}, _days_by_name, "Days by action: recall=30,forget=forever.", _parse_by_name),
        _setting("retention_banks", {}, _days_by_name, "Days by bank: user-calvin=30.", _parse_by_name),
        _setting("retention_minimum_days", None, _minimum, "A floor: days, or a rule such as hipaa.", _parse_minimum),
        _setting("retention_interval_seconds", 3_600.0, positive_number, "Seconds from one run to the next.", float),
        _setting("retention_jitter_seconds", 300.0, not_negative, "Seconds within which the first run comes.", float),
        _setting("retention_batch_size", 250, positive_int, "Rows that one transaction deletes.", int),
        _setting("retention_budget_seconds", 600.0, positive_number, "Seconds that one run may take.", float),
        _setting("retention_dsn", None, _dsn, "A connection string of the sweeper's role; else the writer's is taken."),
    )
}


def resolve(name: str, argument: Any = None) -> Any:
    """Return the value of one setting; see `Setting.resolve`."""
    return SETTINGS[name].resolve(argument)
