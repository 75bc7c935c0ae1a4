"""Which versions are tried together, and which tests prove each cell."""

from __future__ import annotations

from dataclasses import dataclass

#: What depends on a version of something else: the SDK's spans and entry points, psycopg's adaptation and pipelines,
#: the server's SQL, Python's generators and syntax. What starts a server of its own would not run on the cell's, and
#: what starts many processes proves no version.
TESTS = (
    "tests/unit/test_attributes.py",
    "tests/unit/test_audited.py",
    "tests/unit/test_configure.py",
    "tests/unit/test_connection.py",
    "tests/unit/test_encoding.py",
    "tests/unit/test_exporter.py",
    "tests/unit/test_generators.py",
    "tests/unit/test_logger.py",
    "tests/unit/test_mapping.py",
    "tests/unit/test_metrics.py",
    "tests/unit/test_normalize.py",
    "tests/unit/test_operation.py",
    "tests/unit/test_operations.py",
    "tests/unit/test_processor.py",
    "tests/unit/test_sampler.py",
    "tests/unit/test_scope.py",
    "tests/unit/test_selection.py",
    "tests/unit/test_storable.py",
    "tests/property/test_hostile_payloads.py",
    "tests/integration/table/test_append.py",
    "tests/integration/table/test_conversion.py",
    "tests/integration/table/test_holds.py",
    "tests/integration/table/test_partitions.py",
    "tests/integration/table/test_roles.py",
    "tests/integration/table/test_search.py",
    "tests/integration/table/test_set_aside.py",
    "tests/integration/table/test_storage.py",
    "tests/integration/table/test_sweep.py",
    "tests/integration/test_entry_points.py",
    "tests/integration/test_migrate.py",
    "tests/integration/test_sampling.py",
    "tests/integration/test_span_limits.py",
    "tests/e2e/test_astrocyte.py",
)


@dataclass(frozen=True, slots=True)
class Cell:
    """Versions that are tried together.

    Args:
        name: what `--only` calls it.
        python: the interpreter's minor version, such as ``3.11``.
        sdk: opentelemetry-sdk's, as a requirement's specifier.
        psycopg: psycopg's, likewise.
        postgres: the server's major version.
        why: what the cell is there for.
        others: requirements for whatever else is not to be the newest.
    """

    name: str
    python: str
    sdk: str
    psycopg: str
    postgres: str
    why: str
    others: tuple[str, ...] = ()

    @property
    def requirements(self) -> tuple[str, ...]:
        """What pip is to keep to, beside what the package asks for."""
        return (f"opentelemetry-sdk{self.sdk}", f"psycopg[binary]{self.psycopg}", *self.others)


#: Each value of each axis once, and all four pairs of the ends of the two libraries: a fault that takes three old ones
#: at once is in the first, one of a single old library among new ones in the fourth and the fifth.
CELLS = (
    Cell("oldest", "3.11", "==1.30.0", "==3.2.1", "14", "every lower bound at once", ("orjson==3.10.0",)),
    Cell("newest", "3.13", "==1.45.*", "==3.3.*", "18", "every upper end at once"),
    Cell("middle", "3.12", "==1.45.*", "==3.3.*", "17", "the interpreter and the server in between"),
    Cell("old-sdk", "3.11", "==1.30.0", "==3.3.*", "16", "the oldest SDK with a new driver"),
    Cell("old-psycopg", "3.11", "==1.45.*", "==3.2.1", "15", "the oldest driver with a new SDK"),
)
