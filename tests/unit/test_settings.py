"""Every setting: where its value comes from, and what is refused, by which name."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from astrocyte_otel_audit import AuditError, AuditSpanExporter, ConfigurationError
from astrocyte_otel_audit.errors import DatabaseUnavailableError
from astrocyte_otel_audit.settings import PREFIX, SETTINGS, actions, identifier, is_identifier, resolve

PASSWORD = "hunter2-of-the-database"


class Foreign:
    def __repr__(self):
        return f"<connection with {PASSWORD}>"


#: A setting, an argument, the text of a variable, and the values that these two are taken for.
GOOD = [
    ("dsn", "postgresql://a/b", "host=c dbname=d", "postgresql://a/b", "host=c dbname=d"),
    ("actions", ["retain", "re*"], "recall, classify", ("retain", "re*"), ("recall", "classify")),
    ("actions", "*", "*", ("*",), ("*",)),
    ("mappings", ["astrocyte"], "one , two", ("astrocyte",), ("one", "two")),
    ("schema", "tenant_a", "Tenant-B", "tenant_a", "Tenant-B"),
    ("table", "log", "_log$2", "log", "_log$2"),
    ("migrate", True, "Yes", True, True),
    ("migrate", False, "0", False, False),
    ("writer", "external", "thread", "external", "thread"),
    ("writer", "thread", "external", "thread", "external"),
    ("destination", "eu:log/prod-1_a.b", "x" * 64, "eu:log/prod-1_a.b", "x" * 64),
    ("spool_dir", "/a/b", "/c", Path("/a/b"), Path("/c")),
    ("spool_dir", False, "off", False, False),
    ("spool_max_bytes", 1, "5000", 1, 5000),
    ("spool_fsync", "always", "never", "always", "never"),
    ("spool_keep_seconds", 0, "86400", 0.0, 86400.0),
    ("spool_keep_seconds", 2.5, "0", 2.5, 0.0),
    ("on_full", "block", "drop", "block", "drop"),
    ("on_full_timeout_millis", 5, "0.5", 5.0, 0.5),
    ("max_queue_size", 1, "5000", 1, 5000),
    ("max_export_batch_size", 10**9, "1", 10**9, 1),
    ("schedule_delay_millis", 5, "0.5", 5.0, 0.5),
    ("export_timeout_millis", 0.1, "1e3", 0.1, 1000.0),
    ("retention_days", 30, "forever", 30, "forever"),
    ("retention_days", "forever", "2192", "forever", 2192),
    ("retention_actions", {"a": 1, "b": None}, "recall=30, x=forever", {"a": 1, "b": None}, {"recall": 30, "x": None}),
    ("retention_actions", {"a": "forever"}, "a=1", {"a": None}, {"a": 1}),
    ("retention_banks", {"a": 1}, "b=c=2,", {"a": 1}, {"b=c": 2}),
    ("retention_minimum_days", 30, "hipaa", 30, "hipaa"),
    ("retention_minimum_days", "eu-ai-act", "184", "eu-ai-act", 184),
    ("retention_interval_seconds", 60, "0.5", 60.0, 0.5),
    ("retention_jitter_seconds", 0, "300", 0.0, 300.0),
    ("retention_batch_size", 1, "5000", 1, 5000),
    ("retention_budget_seconds", 5, "0.5", 5.0, 0.5),
    ("retention_dsn", "postgresql://a/b", "host=c dbname=d", "postgresql://a/b", "host=c dbname=d"),
]

#: A setting, the standard variable that it falls back to.
STANDARD_VARIABLES = [
    ("max_queue_size", "OTEL_BSP_MAX_QUEUE_SIZE"),
    ("max_export_batch_size", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
    ("schedule_delay_millis", "OTEL_BSP_SCHEDULE_DELAY"),
    ("export_timeout_millis", "OTEL_BSP_EXPORT_TIMEOUT"),
]

BAD_ACTIONS = ["retain", "", "retain,recall", b"*", b"retain", 5, True, Foreign(), [1], ["retain", None], [b"x"], [" "]]
BAD_NAMES = ["", "1st", "a b", 'a"b', "a;b", "a.b", "größe", "a\n", "a\x00", "x" * 64, b"log", 5, True, ["log"],
             "pg_log", "PG_log", "information_schema", "Information_Schema"]  # fmt: skip
BAD_COUNTS = [0, -1, True, False, 1.0, "5", b"5", int, [5], -(10**5000)]
BAD_WORDS = ["", "THREAD", "other", b"thread", 5, True, ["thread"], Foreign()]
BAD_DESTINATIONS = ["", " ", "a b", "größe", "a\n", "a\x00", "x" * 65, "x" * 5000, b"a", 5, True, ["a"], Foreign()]
BAD_SECONDS = [-1, -0.1, 86_400.1, True, False, float("nan"), float("inf"), "5", [5], 10**400, -(10**400), Foreign()]
BAD_NUMBERS = [0, 0.0, -0.1, True, float("nan"), float("inf"), "5", [5], 10**400, 2_147_483_648]

#: A setting and an argument that it refuses.
BAD_ARGUMENTS = [
    *(("dsn", value) for value in ["", "  ", b"host=a", 5, ["host=a"], Foreign()]),
    *(("actions", value) for value in BAD_ACTIONS),
    *(("mappings", value) for value in ["astrocyte", b"astrocyte", {"astrocyte": 1}, 5, Foreign()]),
    *(("schema", value) for value in BAD_NAMES),
    *(("table", value) for value in [*BAD_NAMES, "x" * 45, "x" * 5000, lambda: "log"]),
    *(("migrate", value) for value in [0, 1, "true", [], Foreign()]),
    *((name, value) for name in ("writer", "spool_fsync", "on_full") for value in BAD_WORDS),
    *(("destination", value) for value in BAD_DESTINATIONS),
    *(("spool_dir", value) for value in ["", True, 5, ["a"], Foreign()]),
    *(("spool_max_bytes", value) for value in BAD_COUNTS),
    *(("spool_keep_seconds", value) for value in BAD_SECONDS),
    *(("on_full_timeout_millis", value) for value in BAD_NUMBERS),
    *(("max_queue_size", value) for value in BAD_COUNTS),
    *(("max_export_batch_size", value) for value in BAD_COUNTS),
    *(("schedule_delay_millis", value) for value in BAD_NUMBERS),
    *(("export_timeout_millis", value) for value in BAD_NUMBERS),
    *(("retention_days", value) for value in [*BAD_COUNTS, "never"]),
    *((name, {"a": value}) for name in ("retention_actions", "retention_banks") for value in BAD_COUNTS),
    *(("retention_actions", value) for value in ["", "a=1", [("a", 1)], {"": 1}, {1: 1}, 5, Foreign()]),
    *(("retention_minimum_days", value) for value in [0, -1, True, 1.0, "", "a b", "x" * 65, ["hipaa"], Foreign()]),
    *(("retention_interval_seconds", value) for value in BAD_NUMBERS),
    *(("retention_jitter_seconds", value) for value in BAD_SECONDS),
    *(("retention_batch_size", value) for value in BAD_COUNTS),
    *(("retention_budget_seconds", value) for value in BAD_NUMBERS),
    *(("retention_dsn", value) for value in ["", "  ", b"host=a", 5, ["host=a"], Foreign()]),
]

#: A setting and a variable's text that it refuses.
BAD_TEXTS = [
    *(("schema", text) for text in ["1st", "pg_x", "a b"]),
    *(("table", text) for text in ["1st", "pg_x", "x" * 45]),
    *(("migrate", text) for text in ["maybe", "2", "on"]),
    *(("writer", text) for text in ["both", "Thread", "thread,external"]),
    *(("destination", text) for text in ["a b", "a@b", "x" * 65]),
    *(("spool_max_bytes", text) for text in ["1GiB", "0"]),
    *(("spool_fsync", text) for text in ["sometimes", "True"]),
    *(("spool_keep_seconds", text) for text in ["a while", "-1", "86401", "nan", "inf", "5s"]),
    *(("on_full", text) for text in ["wait"]),
    *(("on_full_timeout_millis", text) for text in ["soon", "0"]),
    *(("max_queue_size", text) for text in ["many", "0", "-5", "1.5", "1e3", "9" * 5000]),
    *(("max_export_batch_size", text) for text in ["many", "0"]),
    *(("schedule_delay_millis", text) for text in ["soon", "0", "-1", "nan", "inf"]),
    *(("export_timeout_millis", text) for text in ["soon", "2147483648", "5s"]),
    *(("retention_days", text) for text in ["soon", "0", "-1", "1.5", "30d", "Forever"]),
    *(("retention_minimum_days", text) for text in ["0", "six years", "x" * 65]),
    *(("retention_interval_seconds", text) for text in ["hourly", "0"]),
    *(("retention_jitter_seconds", text) for text in ["some", "-1"]),
    *(("retention_batch_size", text) for text in ["many", "0"]),
    *(("retention_budget_seconds", text) for text in ["long", "0"]),
]


def shown(value: object) -> str | None:
    return type(value).__name__ if not isinstance(value, (str, float)) else repr(value)[:12]


def variable(name: str) -> str:
    return PREFIX + name.upper()


class TestPrecedence:
    @pytest.mark.parametrize(("name", "argument", "text", "from_argument", "from_text"), GOOD)
    def test_the_argument_beats_the_variable(self, name, argument, text, from_argument, from_text):
        environment = {variable(name): text}
        assert SETTINGS[name].resolve(argument, environment) == from_argument
        assert type(SETTINGS[name].resolve(argument, environment)) is type(from_argument)

    @pytest.mark.parametrize(("name", "argument", "text", "from_argument", "from_text"), GOOD)
    def test_the_variable_beats_the_default(self, name, argument, text, from_argument, from_text):
        assert SETTINGS[name].resolve(None, {variable(name): f" {text}\n"}) == from_text
        assert type(SETTINGS[name].resolve(None, {variable(name): text})) is type(from_text)

    @pytest.mark.parametrize("name", SETTINGS)
    @pytest.mark.parametrize("environment", [{}, "empty", "blank"])
    def test_without_either_it_is_the_default(self, name, environment):
        if isinstance(environment, str):
            environment = dict.fromkeys(SETTINGS[name].variables, "" if environment == "empty" else " \t")
        assert SETTINGS[name].resolve(None, environment) == SETTINGS[name].default

    @pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.default is not None])
    def test_a_default_is_one_that_would_be_accepted(self, name):
        setting = SETTINGS[name]
        assert setting.accept(setting.default, name) == setting.default

    def test_the_process_environment_is_read(self, monkeypatch):
        monkeypatch.setenv("OTEL_ASTROCYTE_AUDIT_MAX_QUEUE_SIZE", "7")
        assert resolve("max_queue_size") == 7
        assert resolve("max_queue_size", 8) == 8

    def test_false_is_an_argument_like_any_other(self):
        assert SETTINGS["migrate"].resolve(False, {variable("migrate"): "true"}) is False

    def test_an_empty_list_is_an_argument_like_any_other(self):
        assert SETTINGS["actions"].resolve([], {variable("actions"): "*"}) == ()

    @pytest.mark.parametrize(("name", "standard"), STANDARD_VARIABLES)
    def test_batching_falls_back_to_the_standard_variables(self, name, standard):
        setting = SETTINGS[name]
        assert setting.resolve(None, {standard: "123"}) == 123
        assert setting.resolve(None, {standard: "123", variable(name): "45"}) == 45
        assert setting.resolve(None, {standard: "123", variable(name): ""}) == 123


class TestRefusal:
    @pytest.mark.parametrize(("name", "argument"), BAD_ARGUMENTS, ids=shown)
    def test_names_the_argument(self, name, argument):
        with pytest.raises(ConfigurationError) as refused:
            SETTINGS[name].resolve(argument, {})
        assert refused.value.source == name
        assert str(refused.value).startswith(f"{name}: ")
        assert "accepted is" in str(refused.value) or "belong to Postgres" in str(refused.value)
        assert len(str(refused.value)) < 320

    @pytest.mark.parametrize(("name", "text"), BAD_TEXTS, ids=shown)
    def test_names_the_variable(self, name, text):
        with pytest.raises(ConfigurationError) as refused:
            SETTINGS[name].resolve(None, {variable(name): text})
        assert refused.value.source == variable(name)
        assert str(refused.value).startswith(f"{variable(name)}: got ")
        assert text[:20] in str(refused.value)

    @pytest.mark.parametrize(("name", "standard"), STANDARD_VARIABLES)
    def test_names_the_standard_variable_that_holds_the_value(self, name, standard):
        with pytest.raises(ConfigurationError, match=f"^{standard}: got 'many'"):
            SETTINGS[name].resolve(None, {standard: "many"})

    def test_of_an_argument_does_not_depend_on_a_good_variable(self):
        with pytest.raises(ConfigurationError, match=r"^max_queue_size: got 0;"):
            SETTINGS["max_queue_size"].resolve(0, {variable("max_queue_size"): "5"})

    @pytest.mark.parametrize(
        ("name", "argument"),
        [
            ("dsn", f"postgresql://me:{PASSWORD}@host:port/db?sslmode=%"),
            ("dsn", f"host=a password='{PASSWORD}"),
            ("dsn", f"postgresql://me:{PASSWORD}%zz@host/db"),
            ("dsn", f"postgresql://me:{PASSWORD}@host/db".encode()),
            ("dsn", Foreign()),
            ("actions", f"postgresql://me:{PASSWORD}@host/db"),
            ("actions", [Foreign()]),
            ("schema", f"postgresql://me:{PASSWORD}@host/db"),
            ("table", f"host=a password={PASSWORD}"),
            ("destination", f"postgresql://me:{PASSWORD}@host/db"),
            ("destination", f"host=a password={PASSWORD}"),
            ("writer", f"postgresql://me:{PASSWORD}@host/db"),
            ("spool_keep_seconds", f"postgresql://me:{PASSWORD}@host/db"),
            ("max_queue_size", f"postgresql://me:{PASSWORD}@host/db"),
        ],
        ids=shown,
    )
    def test_never_shows_a_connection_string_wherever_it_went(self, name, argument, storage):
        is_exporters = name not in ("max_queue_size", "writer", "spool_keep_seconds")
        with pytest.raises(ConfigurationError) as refused:
            if is_exporters:
                AuditSpanExporter(**{name: argument}, **({} if name == "dsn" else {"storage": storage}))
            else:
                resolve(name, argument)
        assert refused.value.source == name
        assert PASSWORD not in "".join(traceback.format_exception_only(refused.value))
        assert refused.value.__suppress_context__ or refused.value.__context__ is None


class TestActions:
    def test_an_allowlist_is_any_iterable_of_strings(self):
        assert actions(iter(["retain", "*"]), "actions") == ("retain", "*")
        assert actions({"retain"}, "actions") == ("retain",)

    def test_a_bare_string_is_not_taken_for_a_list_of_its_letters(self):
        with pytest.raises(ConfigurationError, match=r"got 'retain'; accepted is a list of actions or globs"):
            actions("retain", "actions")

    def test_the_member_at_fault_is_named(self):
        with pytest.raises(ConfigurationError, match="holds a NoneType;"):
            actions(["retain", None], "actions")

    @pytest.mark.parametrize("text", [",", " , ,", ",retain,"])
    def test_empty_places_of_a_comma_list_are_passed_over(self, text):
        assert set(SETTINGS["actions"].resolve(None, {variable("actions"): text})) <= {"retain"}


class TestDaysByName:
    @pytest.mark.parametrize("name", ["retention_actions", "retention_banks"])
    @pytest.mark.parametrize("text", ["*", "recall", "recall=", "recall=soon", "=30", "a=1,a=2", "30"])
    def test_a_text_that_is_none_is_refused_with_an_example(self, name, text):
        with pytest.raises(ConfigurationError) as refused:
            SETTINGS[name].resolve(None, {variable(name): text})
        assert refused.value.source == variable(name)
        assert "accepted is recall=30,forget=forever in a variable" in str(refused.value)

    def test_no_days_are_refused_too(self):
        with pytest.raises(ConfigurationError, match="got 0; accepted is a whole number of at least 1"):
            SETTINGS["retention_banks"].resolve(None, {variable("retention_banks"): "a=0"})


class TestIdentifiers:
    @pytest.mark.parametrize("name", ["public", "Tenant_A", "_x", "tenant-42", "a$b", "x", "x" * 63, "pgx", "mypg_"])
    def test_a_schema_may_be_any_plain_name(self, name):
        assert identifier(name, "schema") == name
        assert is_identifier(name)

    @pytest.mark.parametrize("name", [*BAD_NAMES, None, Foreign()], ids=shown)
    def test_whether_a_name_is_accepted_can_be_asked_without_an_error(self, name):
        assert is_identifier(name) is False

    def test_a_table_has_room_for_the_names_that_are_made_from_its_own(self):
        assert resolve("table", "x" * 44) == "x" * 44
        with pytest.raises(ConfigurationError, match="1 to 44 letters"):
            resolve("table", "x" * 45)

    def test_a_schema_may_be_a_function(self):
        def tenant() -> str:
            return "tenant_a"

        assert resolve("schema", tenant) is tenant


class TestErrors:
    def test_a_configuration_error_is_ours_and_a_value_error(self):
        error = ConfigurationError("table", "too long")
        assert isinstance(error, AuditError)
        assert isinstance(error, ValueError)
        assert (str(error), error.source, error.problem) == ("table: too long", "table", "too long")

    def test_an_unavailable_database_says_its_sqlstate_where_it_has_one(self):
        assert str(DatabaseUnavailableError("the server is shutting down", "57P01")) == (
            "the server is shutting down [SQLSTATE 57P01]"
        )
        assert str(DatabaseUnavailableError("nothing listens there")) == "nothing listens there"

    def test_every_setting_is_explained_and_has_a_variable_of_ours(self):
        for name, setting in SETTINGS.items():
            assert setting.name == name
            assert setting.variables[0] == variable(name)
            assert setting.help.endswith(".")
