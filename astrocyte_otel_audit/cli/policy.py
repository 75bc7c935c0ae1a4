"""The retention policy that a person has asked for."""

from __future__ import annotations

from collections.abc import Sequence

from astrocyte_otel_audit.retention import RetentionPolicy, policy_saying, said_by_environment
from astrocyte_otel_audit.settings import SETTINGS


def policy_of(
    days: str | None = None, actions: Sequence[str] = (), banks: Sequence[str] = (), minimum_days: str | None = None
) -> RetentionPolicy:
    """Return the policy of the environment, with what options say in its place; of actions and banks, by name."""
    said = said_by_environment()
    for name, option, given in (("days", "--days", days), ("minimum_days", "--minimum-days", minimum_days)):
        if given is not None:
            said[name] = SETTINGS[f"retention_{name}"].read(given, option)
    for name, option, overrides in (("actions", "--action", actions), ("banks", "--bank", banks)):
        for override in overrides:
            said[name] = {**said[name], **SETTINGS[f"retention_{name}"].read(override, option)}
    return policy_saying(said)
