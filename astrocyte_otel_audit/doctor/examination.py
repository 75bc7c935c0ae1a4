"""An examination: what was asked for, and what the checks have found so far that later ones need."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from astrocyte_otel_audit import settings
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.postgres.inspection import AuditInspector, Relation


@dataclass(slots=True)
class Examination:
    """What `doctor` examines. Arguments are as on its command line; what is None comes from the environment.

    Raises:
        ConfigurationError: an argument that can't be used. A variable that can't be is a finding.
    """

    dsn: str | None = None
    schema: str | None = None
    table: str | None = None
    spool_dir: str | Path | None = None
    actions: str | None = None
    #: Whether a row may be written to see whether it can be.
    canary: bool = True
    #: How long to wait for each answer.
    timeout_seconds: float = 10.0
    #: Settings that were accepted, by name, and those that were not.
    accepted: dict[str, Any] = field(init=False, default_factory=dict)
    refused: dict[str, ConfigurationError] = field(init=False, default_factory=dict)
    #: Set by the check of the DSN.
    inspector: AuditInspector | None = field(init=False, default=None)
    #: Set by the check of the table.
    log: Relation | None = field(init=False, default=None)
    side: Relation | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        given = {"dsn": self.dsn, "schema": self.schema, "table": self.table, "spool_dir": self.spool_dir}
        arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        if self.actions is not None:
            arguments["actions"] = settings.SETTINGS["actions"].parse(self.actions)
        if self.spool_dir is not None:
            arguments["spool_dir"] = settings.SETTINGS["spool_dir"].parse(str(self.spool_dir))
        for name, setting in settings.SETTINGS.items():
            if name in arguments:
                self.accepted[name] = setting.accept(arguments[name], f"--{name.replace('_', '-')}")
                continue
            try:
                self.accepted[name] = setting.resolve()
            except ConfigurationError as error:
                self.refused[name] = error

    def value(self, name: str) -> Any:
        """Return a setting's value; its default where what was set can't be used."""
        return self.accepted.get(name, settings.SETTINGS[name].default)

    def close(self) -> None:
        """Close the connection, if one was made."""
        if self.inspector is not None:
            self.inspector.close()

    @property
    def is_external(self) -> bool:
        """Whether the application leaves writing to another process."""
        return bool(self.value("writer") == "external")

    @property
    def spool(self) -> Path | None:
        """The spool's directory; None where there shall be none."""
        directory = self.value("spool_dir")
        return None if directory is False else directory or settings.default_spool_dir()
