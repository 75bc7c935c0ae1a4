"""Checks of a process's surroundings: settings, allowlist, SDK and versions."""

from __future__ import annotations

import difflib
import os
import platform
import re
from collections.abc import Iterator
from importlib import metadata

from opentelemetry.sdk.trace import SpanLimits, TracerProvider

from astrocyte_otel_audit import settings
from astrocyte_otel_audit._version import __version__
from astrocyte_otel_audit.configure import _MIN_ATTRIBUTE_LENGTH, _MIN_ATTRIBUTES
from astrocyte_otel_audit.doctor.examination import Examination
from astrocyte_otel_audit.doctor.finding import Finding, failed, in_two, ok, warning
from astrocyte_otel_audit.errors import ConfigurationError
from astrocyte_otel_audit.pipeline.presets import resolve_mappings
from astrocyte_otel_audit.postgres.inspection import driver

_DISTRIBUTION = "astrocyte-otel-audit"


def check_settings(examination: Examination) -> Iterator[Finding]:
    """Every variable is one of ours, and holds what is accepted."""
    known = [variable for setting in settings.SETTINGS.values() for variable in setting.variables]
    present = [name for name in sorted(os.environ) if name.upper().startswith(settings.PREFIX)]
    wrong = False
    for name in present:
        if name not in known:
            wrong = True
            yield warning("settings", f"{name} is not a setting, and nobody reads it", _meant(name, known))
    refused = list(examination.refused.values())
    try:
        resolve_mappings()
    except ConfigurationError as error:
        refused.append(error)
    for refusal in refused:
        yield failed("settings", *in_two(str(refusal)))
    if not wrong and not refused:
        names = [name.removeprefix(settings.PREFIX) for name in present if os.environ[name].strip()]
        yield ok("settings", f"accepted: {settings.PREFIX}{', _'.join(names)}" if names else "no variable is set")


def _meant(name: str, known: list[str]) -> str:
    own = [variable.removeprefix(settings.PREFIX) for variable in known if variable.startswith(settings.PREFIX)]
    nearest = difflib.get_close_matches(name.upper().removeprefix(settings.PREFIX), own, n=1)
    return f"did you mean {settings.PREFIX}{nearest[0]}?" if nearest else "unset it; the README lists the settings"


def check_allowlist(examination: Examination) -> Iterator[Finding]:
    """Something is audited."""
    actions = examination.value("actions")
    if not actions:
        yield failed(
            "allowlist",
            "nothing is audited: no action is allowed",
            f"set {settings.PREFIX}ACTIONS=retain,recall, or '*' for all; or give --actions what your code names",
        )
        return
    mappings = examination.value("mappings")
    also = f"; of spans of others too: {', '.join(map(str, mappings))}" if mappings else ""
    yield ok("allowlist", ("all actions" if "*" in actions else ", ".join(actions)) + also)


def check_sdk(_: Examination) -> Iterator[Finding]:
    """The OpenTelemetry SDK makes spans."""
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        yield failed(
            "sdk",
            "nothing is audited: OTEL_SDK_DISABLED=true keeps the SDK from making spans",
            "unset it; to export no traces set OTEL_TRACES_SAMPLER=always_off, which the audit doesn't mind",
        )
    else:
        yield ok("sdk", "the SDK makes spans")


def check_limits(_: Examination) -> Iterator[Finding]:
    """A span has room for what a record needs."""
    try:
        limits = SpanLimits()
    except ValueError:
        yield failed(
            "limits",
            "a limit of spans is no number, so no tracer provider can be made",
            "correct or unset the OTEL_…_LIMIT variables",
        )
        return
    count, length = limits.max_span_attributes, limits.max_span_attribute_length
    cut = False
    for limit, least, what, variable in (
        (count, _MIN_ATTRIBUTES, "a span may have {} attributes", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT"),
        (length, _MIN_ATTRIBUTE_LENGTH, "values are cut at {} characters", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"),
    ):
        if limit is not None and limit < least:
            cut = True
            yield warning(
                "limits", what.format(limit) + ", so records are cut", f"set {variable} to {least} or more, or unset it"
            )
    if not cut:
        yield ok("limits", f"{count or 'any number of'} attributes a span, values of {length or 'any'} length")


def check_sampler(_: Examination) -> Iterator[Finding]:
    """The sampler can be made. Which one it is doesn't matter."""
    name, argument = (os.environ.get(f"OTEL_TRACES_SAMPLER{part}", "").strip() for part in ("", "_ARG"))
    chosen = f"{name} {argument}".strip() if name else "the SDK's default"
    try:
        TracerProvider(shutdown_on_exit=False).shutdown()
    except ValueError:  # of a ratio; a newer SDK takes another one, and says so in the log
        yield failed(
            "sampler", f"{chosen} can't be made", "correct OTEL_TRACES_SAMPLER_ARG: a ratio is a number from 0 to 1"
        )
    else:
        yield ok("sampler", f"{chosen}; audited operations become rows whatever it says")


def check_versions(_: Examination) -> Iterator[Finding]:
    """What this library needs is installed in versions that it supports."""
    try:
        required = [line for line in metadata.requires(_DISTRIBUTION) or () if ";" not in line]
    except metadata.PackageNotFoundError:
        required = []
    found: list[str] = []
    wrong = False
    for requirement in required:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        installed = metadata.version(name)
        found.append(f"{name} {installed}")
        bounds = re.findall(r"(>=|<)\s*([\d.]+)", requirement)
        if not all((_numbers(installed) >= _numbers(to)) is (relation == ">=") for relation, to in bounds):
            wrong = True
            accepted = ", ".join(relation + to for relation, to in sorted(bounds, reverse=True))
            yield warning(
                "versions",
                f"{name} {installed} is installed; supported is {accepted}",
                f"pip install '{name}{accepted.replace(' ', '')}'",
            )
    if not wrong:
        python = f"Python {platform.python_version()}"
        yield ok("versions", f"{_DISTRIBUTION} {__version__}, {python}, {', '.join(found)} ({driver()})")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0])[:3])
