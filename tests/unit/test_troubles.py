"""Troubles: one message when something goes wrong, a reminder while it lasts, one when it is over."""

import logging

import pytest

from astrocyte_otel_audit.pipeline.troubles import Troubles


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def logger():
    logger = logging.getLogger("test.troubles")
    yield logger
    logger.handlers.clear()


@pytest.fixture
def troubles(logger, clock):
    return Troubles(logger, clock)


@pytest.fixture
def said(caplog):
    """What the log says so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.name == "test.troubles"]


def test_a_trouble_is_said_once_as_a_warning(troubles, caplog, said):
    for _ in range(1000):
        troubles.report("database", "it is away")
    assert said() == ["it is away."]
    assert caplog.records[0].levelno == logging.WARNING


def test_a_trouble_that_lasts_is_said_again_after_five_minutes(troubles, clock, said):
    troubles.report("database", "it is away")
    clock.now += 299.0
    troubles.report("database", "it is away")
    assert len(said()) == 1
    clock.now += 1.0
    troubles.report("database", "it is away")
    clock.now += 299.0
    troubles.report("database", "it is away")
    assert said() == ["it is away."] * 2


def test_another_message_of_the_same_topic_is_said_at_once(troubles, said):
    troubles.report("database", "it starts")
    troubles.report("database", "it is away")
    assert said() == ["it starts.", "it is away."]


def test_topics_do_not_silence_each_other(troubles, said):
    troubles.report("tenant_a", "no table")
    troubles.report("tenant_b", "no table")
    assert said() == ["no table."] * 2


def test_the_end_of_a_trouble_is_said_once(troubles, said):
    troubles.report("database", "it is away")
    troubles.clear("database", "it is back")
    troubles.clear("database", "it is back")
    assert said() == ["it is away.", "it is back."]


def test_nothing_is_said_of_the_end_of_a_trouble_that_never_was(troubles, said):
    troubles.report("database", "it is away")
    troubles.clear("tenant_a", "it is back")
    assert said() == ["it is away."]


def test_a_trouble_that_comes_back_is_said_again(troubles, said):
    troubles.report("database", "it is away")
    troubles.clear("database", "it is back")
    troubles.report("database", "it is away")
    assert said() == ["it is away.", "it is back.", "it is away."]


def test_a_handler_that_raises_does_not_reach_the_caller(troubles, logger):
    class Broken(logging.Handler):
        def emit(self, record):
            raise RuntimeError("no disk left")

    logger.addHandler(Broken())
    troubles.report("database", "it is away")
    troubles.clear("database", "it is back")


def test_a_handler_may_report_a_trouble_itself(troubles, logger, said):
    class Chatty(logging.Handler):
        def emit(self, record):
            troubles.report("log", "the log is slow")

    logger.addHandler(Chatty())
    troubles.report("database", "it is away")
    assert sorted(said()) == ["it is away.", "the log is slow."]
