"""No log record of any logger, at any level, holds a password, a payload or what a user wrote, whatever fails."""

import contextlib
import logging
from collections.abc import Callable

import psycopg
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from psycopg.conninfo import make_conninfo

from astrocyte_otel_audit import (
    AuditSpanExporter,
    AuditSpanProcessor,
    ConfigurationError,
    audit_operation,
    audit_scope,
    audited,
)
from tests.servers import role
from tests.support import MemoryStorage

PASSWORD = "hunter2-planted"
TEXT = "what a user wrote, planted"
#: Short and without a blank, so that it is stored: a payload may be in the table, and still not in the log.
TOKEN = "token-planted"
PLANTED = (PASSWORD, TEXT, TOKEN, "planted")


class Stage:
    """What a scenario plays on. A database is made when one is asked for."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._fixture = request.getfixturevalue
        self.audit: Callable[..., AuditSpanProcessor] = self._fixture("audit")
        self.provider: TracerProvider = self._fixture("provider")

    @property
    def database(self) -> str:
        return self._fixture("database")

    @property
    def empty_database(self) -> str:
        return self._fixture("empty_database")


@pytest.fixture
def stage(request):
    return Stage(request)


class HostileError(Exception):
    """Says more than it should, or nothing at all."""

    def __str__(self):
        raise RuntimeError(TEXT)


def use(stage: Stage) -> None:
    """Operations that succeed and fail, with planted words wherever words can be."""

    @audited("recall", tracer_provider=stage.provider)
    def recall(query: str, *, token: str, bank_id: str, error: Exception | None = None) -> dict[str, object]:
        if error is not None:
            raise error
        return {"answer": TEXT, "id": TOKEN}

    @audited(
        "retain",
        bank_id=lambda arguments: arguments[TEXT],
        request=lambda arguments: arguments[TEXT],
        response=lambda result: result[TEXT],
        tracer_provider=stage.provider,
    )
    def retain(content: str) -> dict[str, object]:
        return {}

    with audit_scope(actor_id=TOKEN, actor_type=TOKEN, transport=TOKEN):
        recall(TEXT, token=PASSWORD, bank_id=TOKEN)
        for error in (ValueError(TEXT), HostileError()):
            with contextlib.suppress(ValueError, HostileError):
                recall(TEXT, token=PASSWORD, bank_id=TOKEN, error=error)
        retain(TEXT)
        with audit_operation("classify", request={"text": TEXT}, tracer_provider=stage.provider) as operation:
            operation.metadata["note"] = TEXT
            operation.outcome = TEXT  # type: ignore[assignment]


def with_password(dsn: str) -> str:
    return make_conninfo(dsn, password=PASSWORD)


def on_a_table(stage: Stage, *statements: str) -> None:
    """Audit into a table that was changed so that it refuses rows."""
    with psycopg.connect(stage.database, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)
    processor = stage.audit(dsn=with_password(stage.database))
    use(stage)
    assert not processor.force_flush()


def nothing_listens(stage: Stage) -> None:
    processor = stage.audit(dsn=f"postgresql://user:{PASSWORD}@127.0.0.1:1/audit", export_timeout_millis=50.0)
    use(stage)
    assert not processor.force_flush(50)


def no_such_host(stage: Stage) -> None:
    processor = stage.audit(dsn=f"postgresql://user:{PASSWORD}@no-such-host.invalid/audit", export_timeout_millis=50.0)
    use(stage)
    assert not processor.force_flush(300)


def no_such_database(stage: Stage) -> None:
    dsn = make_conninfo(stage.database, dbname="planted", password=PASSWORD)
    processor = stage.audit(dsn=dsn, export_timeout_millis=50.0)
    use(stage)
    assert not processor.force_flush(100)


def no_table(stage: Stage) -> None:
    processor = stage.audit(dsn=with_password(stage.empty_database))
    use(stage)
    assert not processor.force_flush()


def no_right(stage: Stage) -> None:
    with role(stage.database) as dsn:
        processor = stage.audit(dsn=dsn)
        use(stage)
        assert not processor.force_flush()
        processor.shutdown()


def a_constraint_refuses(stage: Stage) -> None:
    """The server's DETAIL quotes the whole row."""
    on_a_table(stage, f"ALTER TABLE astrocyte_audit_log ADD CHECK (actor_id <> '{TOKEN}')")


def a_trigger_refuses(stage: Stage) -> None:
    """The server's message is the trigger's own, and quotes the payload."""
    on_a_table(
        stage,
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "RAISE EXCEPTION 'refused: %', row_to_json(NEW); END $$",
        "CREATE TRIGGER refuse BEFORE INSERT ON astrocyte_audit_log FOR EACH ROW EXECUTE FUNCTION refuse()",
    )


def nothing_to_set_aside_into(stage: Stage) -> None:
    on_a_table(
        stage,
        f"ALTER TABLE astrocyte_audit_log ADD CHECK (actor_id <> '{TOKEN}')",
        "DROP TABLE astrocyte_audit_log_set_aside",
    )


def a_storage_that_fails(stage: Stage) -> None:
    def fail(records):
        if not failed:
            failed.append(True)
            raise ValueError(TEXT, records)

    failed: list[bool] = []
    storage = MemoryStorage()
    storage.before_append = fail
    processor = stage.audit(storage=storage)
    use(stage)
    assert processor.force_flush()


def a_schema_function_that_fails(stage: Stage) -> None:
    def tenant() -> str:
        raise LookupError(TEXT)

    processor = stage.audit(storage=MemoryStorage(), schema=tenant)
    use(stage)
    assert processor.force_flush()


def a_schema_that_is_no_name(stage: Stage) -> None:
    processor = stage.audit(dsn=with_password(stage.database), schema=lambda: f'planted"; DROP SCHEMA public; {TEXT}')
    use(stage)
    assert not processor.force_flush()


def a_full_queue(stage: Stage) -> None:
    stage.audit(dsn=f"postgresql://user:{PASSWORD}@127.0.0.1:1/audit", max_queue_size=1, export_timeout_millis=50.0)
    use(stage)


def a_stock_processor(stage: Stage) -> None:
    for stock in (SimpleSpanProcessor, BatchSpanProcessor):
        for dsn in (f"postgresql://user:{PASSWORD}@127.0.0.1:1/audit", with_password(stage.empty_database)):
            stage.provider.add_span_processor(stock(AuditSpanExporter(dsn=dsn, actions="*")))
    use(stage)
    stage.provider.force_flush()


SCENARIOS = [
    nothing_listens, no_such_host, no_such_database, no_table, no_right, a_constraint_refuses, a_trigger_refuses,
    nothing_to_set_aside_into, a_storage_that_fails, a_schema_function_that_fails, a_schema_that_is_no_name,
    a_full_queue, a_stock_processor,
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_nothing_planted_is_in_the_log(scenario, stage, caplog):
    caplog.set_level(logging.DEBUG)
    scenario(stage)
    stage.provider.shutdown()
    ours = [record for record in caplog.records if record.name.startswith("astrocyte_otel_audit")]
    assert [record for record in ours if record.levelno >= logging.WARNING], "it did not even fail"
    for record in caplog.records:
        # With its traceback, if somebody logs one.
        text = logging.Formatter("%(name)s %(message)s").format(record)
        assert not [word for word in PLANTED if word in text], text


@pytest.mark.parametrize(
    "dsn",
    [
        f"postgresql://user:{PASSWORD}%zz@host/audit",
        f"postgresql://user:{PASSWORD}@host/audit?planted=1",
        f"host=h password='{PASSWORD}",
        f"user:{PASSWORD}@host",
    ],
)
def test_a_dsn_that_cannot_be_parsed_is_neither_logged_nor_quoted(audit, caplog, dsn):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigurationError) as refused:
        audit(dsn=dsn)
    assert "planted" not in caplog.text
    assert "planted" not in str(refused.value) + repr(refused.value)


def test_the_planted_token_is_in_the_table_and_the_planted_words_are_not(stage):
    processor = stage.audit(dsn=stage.database)
    use(stage)
    assert processor.force_flush()
    with psycopg.connect(stage.database) as connection:
        rows = [row for (row,) in connection.execute("SELECT to_jsonb(l)::text FROM astrocyte_audit_log l")]
    stage.provider.shutdown()
    assert any(TOKEN in row for row in rows)
    assert not any(word in row for word in (TEXT, PASSWORD) for row in rows)
