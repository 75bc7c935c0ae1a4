"""The retention policy that a person has asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.retention import RetentionPolicy


def policy_of(
    days: str | None = None, actions: Sequence[str] = (), banks: Sequence[str] = (), minimum_days: str | None = None
) -> RetentionPolicy:
    """Return the policy of the environment, with what options say in its place; of actions and banks, by name."""
    said = {name: settings.resolve(f"retention_{name}") for name in RetentionPolicy.__dataclass_fields__}
    if days is not None:
        said["days"] = _parsed("days", days, "--days")
    if minimum_days is not None:
        said["minimum_days"] = _parsed("minimum_days", minimum_days, "--minimum-days")
    for name, option, overrides in (("actions", "--action", actions), ("banks", "--bank", banks)):
        for override in overrides:
            said[name] = {**said[name], **_parsed(name, override, option)}
    if said["days"] == settings.FOREVER:
        said["days"] = None
    return RetentionPolicy(**said)


def _parsed(name: str, text: str, option: str) -> Any:
    setting = settings.SETTINGS[f"retention_{name}"]
    try:
        return setting.accept(setting.parse(text), option)
    except ConfigurationError:
        raise
    except ValueError:
        return setting.accept(text, option)  # refuses it, with what is accepted
