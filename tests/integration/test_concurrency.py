"""Many at once: threads, tasks, pipelines. Each record is in the table exactly once, with its own attributes."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg_pool import ConnectionPool

from astrocyte_otel_audit import audit_operation, audit_scope, audited

THREADS, EACH, TASKS = 20, 50, 200


@pytest.fixture
def all_rows(database):
    """Every row, read past the library."""

    def read():
        with psycopg.connect(database) as connection:
            return connection.execute(
                "SELECT id::text, bank_id, actor_id, request, response FROM astrocyte_audit_log"
            ).fetchall()

    return read


@pytest.fixture
def recall(provider):
    @audited("recall", tracer_provider=provider)
    def recall(number, bank_id):
        return {"answer": number}

    return recall


@pytest.fixture
def recall_later(provider):
    @audited("recall", tracer_provider=provider)
    async def recall(number, bank_id):
        await asyncio.sleep(0)
        return {"answer": number}

    return recall


def assert_each_once(rows, expected):
    """One row for each number, and every part of a row of the same number."""
    numbers = [int(bank.removeprefix("bank-")) for _, bank, *_ in rows]
    assert sorted(numbers) == sorted(expected)
    assert len({row_id for row_id, *_ in rows}) == len(rows)
    for number, (_, _, actor, request, response) in zip(numbers, rows, strict=True):
        assert (actor, request, response) == (f"user-{number}", {"number": number}, {"answer": number})


def test_twenty_threads_and_two_hundred_tasks_at_once(audit, database, provider, recall, recall_later, all_rows):
    def work(worker):
        barrier.wait()
        for step in range(EACH):
            number = worker * 1000 + step
            with audit_scope(actor_id=f"user-{number}"):
                recall(number, bank_id=f"bank-{number}")

    async def task(number):
        with audit_scope(actor_id=f"user-{number}"):
            await recall_later(number, bank_id=f"bank-{number}")

    async def tasks():
        await asyncio.gather(*(task(100_000 + number) for number in range(TASKS)))

    barrier = threading.Barrier(THREADS + 1)
    processor = audit(dsn=database, max_export_batch_size=64)
    with ThreadPoolExecutor(THREADS) as threads:
        futures = [threads.submit(work, worker) for worker in range(THREADS)]
        barrier.wait()
        asyncio.run(tasks())
        for future in futures:
            future.result()
    assert processor.force_flush()
    expected = [worker * 1000 + step for worker in range(THREADS) for step in range(EACH)]
    assert_each_once(all_rows(), expected + [100_000 + number for number in range(TASKS)])
    stats = processor.stats()
    assert (stats["accepted"], stats["stored"], stats["open"]) == (THREADS * EACH + TASKS,) * 2 + (0,)


def test_tenants_of_many_threads_do_not_mix(audit, empty_database, provider):
    schemas = [f"tenant_{number}" for number in range(5)]

    def work(number):
        with audit_scope(schema=schemas[number % 5]):
            for _ in range(20):
                with audit_operation("recall", bank_id=schemas[number % 5], tracer_provider=provider):
                    pass

    processor = audit(dsn=empty_database, migrate=True)
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(work, range(10)))
    assert processor.force_flush()
    with psycopg.connect(empty_database) as connection:
        for schema in schemas:
            found = connection.execute(f'SELECT bank_id, count(*) FROM "{schema}".astrocyte_audit_log GROUP BY 1')
            assert found.fetchall() == [(schema, 40)]


def test_flushes_and_stats_from_many_threads_at_once(audit, database, recall, all_rows):
    def work(worker):
        for step in range(10):
            number = worker * 1000 + step
            with audit_scope(actor_id=f"user-{number}"):
                recall(number, bank_id=f"bank-{number}")
            assert processor.force_flush()
            assert processor.stats()["stored"] > step

    processor = audit(dsn=database)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert_each_once(all_rows(), [worker * 1000 + step for worker in range(8) for step in range(10)])


def test_two_pipelines_onto_one_table_do_not_double_its_rows(audit, database, provider, recall, all_rows):
    processors = [audit(dsn=database), audit(dsn=database)]
    for number in range(100):
        with audit_scope(actor_id=f"user-{number}"):
            recall(number, bank_id=f"bank-{number}")
    assert provider.force_flush()
    assert [processor.stats()["stored"] for processor in processors] == [100, 100]
    assert_each_once(all_rows(), range(100))


def test_a_pool_that_the_application_lends_is_used_and_left_open(audit, database, provider, recall, all_rows):
    with ConnectionPool(database, min_size=1, max_size=2) as pool:
        processor = audit(pool=pool)
        with audit_scope(actor_id="user-1"):
            recall(1, bank_id="bank-1")
        assert processor.force_flush()
        provider.shutdown()
        with pool.connection() as connection:
            assert connection.execute("SELECT count(*) FROM astrocyte_audit_log").fetchone() == (1,)
    assert_each_once(all_rows(), [1])


def test_the_shutdown_writes_what_many_threads_left(audit, database, provider, recall, all_rows):
    def work(worker):
        for step in range(EACH):
            number = worker * 1000 + step
            with audit_scope(actor_id=f"user-{number}"):
                recall(number, bank_id=f"bank-{number}")

    audit(dsn=database, schedule_delay_millis=3_600_000.0)
    with ThreadPoolExecutor(10) as threads:
        list(threads.map(work, range(10)))
    provider.shutdown()
    assert_each_once(all_rows(), [worker * 1000 + step for worker in range(10) for step in range(EACH)])
