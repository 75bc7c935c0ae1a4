"""`RetentionPolicy`: how long records are kept, and how much of the server one run of the sweep may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, TypeAlias

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError

#: Floors by the name of their rule, in days, each the longest that so many months or years can be.
#:
#: ``eu-ai-act``: six months, which Regulation (EU) 2024/1689 asks of the logs of high-risk systems (articles 19(1) and
#: 26(6): "at least six months"). ``hipaa``: six years, which 45 CFR 164.316(b)(2)(i) asks of documentation.
RULES: Final[Mapping[str, int]] = {"eu-ai-act": 184, "hipaa": 2_192}

#: Action of the row that every run of the sweep leaves.
ACTION: Final = "audit.retention"
_MAX_DAYS: Final = 36_525


class Cutoffs(NamedTuple):
    """A policy at one instant: what began before its cutoff is expired. None is kept for ever."""

    now: datetime
    default: datetime | None
    #: In place of the default, for records of an action or of a bank. Where both apply, the older cutoff holds.
    actions: Mapping[str, datetime | None]
    banks: Mapping[str, datetime | None]

    @property
    def newest(self) -> datetime | None:
        """The newest of them: nothing that began since is expired. None where nothing expires."""
        given = (self.default, *self.actions.values(), *self.banks.values())
        return max((cutoff for cutoff in given if cutoff is not None), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """How long records are kept, by their start.

    Args:
        days: days that records are kept; None, the default, for ever.
        actions: days by action, in place of `days`; None for ever. Where a record's action and its bank are both
            named, the longer time holds.
        banks: days by bank, in place of `days`.
        minimum_days: a floor under all of them: days, or the name of a rule of `RULES`, such as ``"hipaa"``.
        interval_seconds: from one run to the next, of all processes together (3,600).
        jitter_seconds: the first run comes within this time, at random, so that processes that were started
            together don't ask all at once (300).
        batch_size: rows of one transaction (250): larger ones are quicker, and others wait longer for them.
        budget_seconds: time that a run may take; what is left is the next one's (600).

    Raises:
        ConfigurationError: a number that can't be used, or one under the floor.
    """

    days: int | None = None
    actions: Mapping[str, int | None] = field(default_factory=dict)
    banks: Mapping[str, int | None] = field(default_factory=dict)
    minimum_days: int | str | None = None
    interval_seconds: float = 3_600.0
    jitter_seconds: float = 300.0
    batch_size: int = 250
    budget_seconds: float = 600.0

    def __post_init__(self) -> None:
        floor = _floor(self.minimum_days)
        _check_days(self.days, "days", floor)
        for name in ("actions", "banks"):
            overrides = getattr(self, name)
            if not isinstance(overrides, Mapping) or not all(isinstance(key, str) and key for key in overrides):
                raise ConfigurationError(name, "accepted is a mapping from names to days, such as {'recall': 30}")
            for key, days in overrides.items():
                _check_days(days, f"{name}[{key!r}]", floor)
            object.__setattr__(self, name, dict(overrides))
        for name in ("interval_seconds", "budget_seconds"):
            settings.positive_number(getattr(self, name), name)
        settings.not_negative(self.jitter_seconds, "jitter_seconds")
        settings.positive_int(self.batch_size, "batch_size")

    @property
    def expires(self) -> bool:
        """Whether any record is ever deleted by it."""
        return any(days is not None for days in (self.days, *self.actions.values(), *self.banks.values()))

    def cutoffs(self, now: datetime) -> Cutoffs:
        """Return the policy as it is at an instant."""

        def before(days: int | None) -> datetime | None:
            return None if days is None else now - timedelta(days=days)

        return Cutoffs(
            now,
            before(self.days),
            {action: before(days) for action, days in self.actions.items()},
            {bank: before(days) for bank, days in self.banks.items()},
        )

    def described(self) -> dict[str, Any]:
        """Return what it says, as an audit record's metadata."""
        said: dict[str, Any] = {"days": self.days, "actions": self.actions, "banks": self.banks}
        return {name: value for name, value in said.items() if value not in ({}, None)}


#: A policy, or the days of one; False is none; None, what the environment says.
Retention: TypeAlias = RetentionPolicy | int | Literal[False] | None


def resolve_retention(given: Retention = None) -> RetentionPolicy | None:
    """Return a policy as it is given; where it isn't, that of the environment's ``OTEL_ASTROCYTE_AUDIT_RETENTION_…``.

    Args:
        given: a number of days goes before ``…_DAYS`` only, so that a floor of the environment's holds.

    Returns:
        None where nothing says how long records are kept: nothing is deleted, and nothing runs.

    Raises:
        ConfigurationError: a policy that can't be used; it names the argument or the variable.
    """
    if given is False:
        return None
    if isinstance(given, RetentionPolicy):
        return given
    if given is not None and type(given) is not int:
        raise ConfigurationError(
            "retention", f"got {settings.shown(given)}; accepted is a RetentionPolicy, a number of days, or False"
        )
    said = said_by_environment()
    if given is not None:
        said["days"] = given
    if said["days"] is None and not said["actions"] and not said["banks"]:
        return None
    try:
        return policy_saying(said)
    except ConfigurationError as error:
        name, bracket, key = error.source.partition("[")
        source = f"{settings.PREFIX}RETENTION_{name.upper()}" if given is None or name != "days" else "retention"
        raise ConfigurationError(source, (f"of {key.rstrip(']')}: " if bracket else "") + error.problem) from None


def said_by_environment() -> dict[str, Any]:
    """Return what the environment says of each of a policy's arguments, days as ``forever`` too."""
    return {name: settings.resolve(f"retention_{name}") for name in RetentionPolicy.__dataclass_fields__}


def policy_saying(said: Mapping[str, Any]) -> RetentionPolicy:
    """Return the policy of such arguments; raises ConfigurationError as it does."""
    return RetentionPolicy(**{**said, "days": None if said["days"] == settings.FOREVER else said["days"]})


def _floor(minimum: int | str | None) -> int:
    if minimum is None:
        return 1
    if isinstance(minimum, str) and minimum in RULES:
        return RULES[minimum]
    if type(minimum) is int and 1 <= minimum <= _MAX_DAYS:
        return minimum
    raise ConfigurationError(
        "minimum_days", f"got {settings.shown(minimum)}; accepted is a number of days or one of {', '.join(RULES)}"
    )


def _check_days(days: object, source: str, floor: int) -> None:
    if days is None:
        return
    if type(days) is not int or not 1 <= days <= _MAX_DAYS:
        raise ConfigurationError(
            source, f"got {settings.shown(days)}; accepted is a whole number of days from 1 to {_MAX_DAYS}, or None"
        )
    if days < floor:
        raise ConfigurationError(source, f"got {days}; accepted is {floor} days or more, which minimum_days asks for")
