"""Postgres: the only room with SQL. Writes records, reads them, and keeps the table's shape."""

from astrocyte_otel_audit.postgres.connection import Connections, OwnConnection, PooledConnections, dsn_of_pool
from astrocyte_otel_audit.postgres.faults import Fault, FaultClass, classify
from astrocyte_otel_audit.postgres.reader import AuditReader, Cursor, Page, SetAside
from astrocyte_otel_audit.postgres.roles import Roles, RolesError
from astrocyte_otel_audit.postgres.table import Appended, AuditTable

__all__ = [
    "Appended", "AuditReader", "AuditTable", "Connections", "Cursor", "Fault", "FaultClass", "OwnConnection",
    "Page", "PooledConnections", "Roles", "RolesError", "SetAside", "classify", "dsn_of_pool",
]  # fmt: skip
