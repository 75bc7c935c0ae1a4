"""`RetentionPolicy`: what is expired at an instant, what it refuses, and what the environment makes of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from astrocyte_otel_audit import ConfigurationError, RetentionPolicy
from astrocyte_otel_audit.retention import RULES, resolve_retention
from astrocyte_otel_audit.settings import PREFIX

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
PASSWORD = "hunter2-of-the-database"


@pytest.fixture
def setting(monkeypatch):
    """Sets a retention variable by the end of its name."""

    def set_variables(**values):
        for name, value in values.items():
            monkeypatch.setenv(f"{PREFIX}RETENTION_{name.upper()}", value)

    return set_variables


class TestCutoffs:
    def test_a_policy_keeps_everything_until_it_is_told_otherwise(self):
        cutoffs = RetentionPolicy().cutoffs(NOW)
        assert (cutoffs.default, cutoffs.newest) == (None, None)
        assert not RetentionPolicy().expires

    def test_a_cutoff_is_so_many_days_before_now(self):
        assert RetentionPolicy(days=30).cutoffs(NOW).default == NOW - timedelta(days=30)

    def test_overrides_have_cutoffs_of_their_own(self):
        policy = RetentionPolicy(days=30, actions={"recall": 7, "forget": None}, banks={"user-calvin": 365})
        cutoffs = policy.cutoffs(NOW)
        assert cutoffs.actions == {"recall": NOW - timedelta(days=7), "forget": None}
        assert cutoffs.banks == {"user-calvin": NOW - timedelta(days=365)}
        assert cutoffs.newest == NOW - timedelta(days=7)

    @pytest.mark.parametrize(
        ("now", "days", "cutoff"),
        [
            (datetime(2028, 2, 29, tzinfo=UTC), 366, datetime(2027, 2, 28, tzinfo=UTC)),
            (datetime(2028, 3, 1, tzinfo=UTC), 1, datetime(2028, 2, 29, tzinfo=UTC)),
            (datetime(2100, 3, 1, tzinfo=UTC), 1, datetime(2100, 2, 28, tzinfo=UTC)),
            (datetime(2032, 1, 1, tzinfo=UTC), 2_192, datetime(2025, 12, 31, tzinfo=UTC)),
        ],
        ids=["a leap day", "after a leap day", "no leap year", "six years"],
    )
    def test_a_day_is_a_day_in_leap_years_too(self, now, days, cutoff):
        assert RetentionPolicy(days=days).cutoffs(now).default == cutoff

    @pytest.mark.parametrize("first", range(1999, 2105))
    def test_six_years_are_never_longer_than_the_floor_of_hipaa(self, first):
        longest = datetime(first + 6, 3, 1, tzinfo=UTC) - datetime(first, 3, 1, tzinfo=UTC)
        assert longest.days <= RULES["hipaa"]

    @pytest.mark.parametrize("month", range(1, 13))
    def test_six_months_are_never_longer_than_the_floor_of_the_ai_act(self, month):
        later = datetime(2027 + month // 7, (month + 5) % 12 + 1, 1, tzinfo=UTC)
        assert (later - datetime(2027, month, 1, tzinfo=UTC)).days <= RULES["eu-ai-act"]

    def test_time_passes_and_the_cutoff_with_it(self):
        policy = RetentionPolicy(days=1)
        assert [policy.cutoffs(NOW + timedelta(days=n)).default for n in range(3)] == [
            NOW + timedelta(days=n - 1) for n in range(3)
        ]

    def test_only_an_action_may_expire(self):
        policy = RetentionPolicy(actions={"recall": 7, "forget": None})
        assert policy.expires
        assert policy.cutoffs(NOW).default is None

    def test_overrides_that_are_all_for_ever_expire_nothing(self):
        assert not RetentionPolicy(actions={"forget": None}, banks={"a": None}).expires

    def test_what_it_says_leaves_out_what_it_does_not_say(self):
        assert RetentionPolicy().described() == {}
        assert RetentionPolicy(days=3, banks={"a": None}).described() == {"days": 3, "banks": {"a": None}}


class TestRefusal:
    @pytest.mark.parametrize("days", [0, -1, 36_526, True, 1.0, "30", PASSWORD])
    def test_of_days_that_are_none(self, days):
        with pytest.raises(ConfigurationError, match=r"^days: got .*; accepted is a whole number of days from 1 to"):
            RetentionPolicy(days=days)

    @pytest.mark.parametrize(
        "arguments",
        [{"days": 29}, {"actions": {"recall": 29}}, {"banks": {"a": 1}}, {"days": 30, "actions": {"recall": 7}}],
        ids=str,
    )
    def test_of_what_is_under_the_floor(self, arguments):
        with pytest.raises(ConfigurationError, match="accepted is 30 days or more, which minimum_days asks for"):
            RetentionPolicy(minimum_days=30, **arguments)

    @pytest.mark.parametrize(("rule", "days"), RULES.items())
    def test_of_a_day_less_than_a_rule_asks_for(self, rule, days):
        assert RetentionPolicy(days=days, minimum_days=rule).days == days
        with pytest.raises(ConfigurationError, match=f"accepted is {days} days or more"):
            RetentionPolicy(days=days - 1, minimum_days=rule)

    def test_of_a_rule_that_is_not_known(self):
        with pytest.raises(
            ConfigurationError, match=r"^minimum_days: got 'hippa'; accepted is a number of days or one"
        ):
            RetentionPolicy(minimum_days="hippa")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("actions", ["recall"]),
            ("banks", {"": 3}),
            ("interval_seconds", 0),
            ("jitter_seconds", -1),
            ("batch_size", 0),
            ("budget_seconds", float("nan")),
        ],
    )
    def test_names_what_can_not_be_used(self, name, value):
        with pytest.raises(ConfigurationError) as refused:
            RetentionPolicy(**{name: value})
        assert refused.value.source == name

    def test_what_is_kept_for_ever_is_under_no_floor(self):
        assert RetentionPolicy(actions={"forget": None}, minimum_days="hipaa").actions == {"forget": None}

    def test_a_mapping_that_changes_later_changes_nothing(self):
        actions = {"recall": 30}
        policy = RetentionPolicy(actions=actions)
        actions["recall"] = 1
        assert policy.actions == {"recall": 30}


class TestTheEnvironment:
    def test_says_nothing_by_default(self):
        assert resolve_retention() is None

    def test_alone_a_floor_or_a_size_makes_no_policy(self, setting):
        setting(minimum_days="hipaa", batch_size="10", dsn="host=a")
        assert resolve_retention() is None

    def test_says_all_that_a_policy_says(self, setting):
        setting(
            days="400", actions=" recall=200, x = forever", banks="a=b=300", minimum_days="eu-ai-act",
            interval_seconds="60", jitter_seconds="0", batch_size="7", budget_seconds="1.5",
        )  # fmt: skip
        assert resolve_retention() == RetentionPolicy(
            days=400, actions={"recall": 200, "x": None}, banks={"a=b": 300}, minimum_days="eu-ai-act",
            interval_seconds=60, jitter_seconds=0, batch_size=7, budget_seconds=1.5,
        )  # fmt: skip

    @pytest.mark.parametrize("variable", [{"days": "30"}, {"actions": "recall=30"}, {"banks": "a=30"}], ids=str)
    def test_of_days_actions_and_banks_one_is_enough(self, setting, variable):
        setting(**variable)
        assert resolve_retention().expires

    def test_for_ever_is_a_policy_too_which_keeps_partitions_made(self, setting):
        setting(days="forever")
        assert resolve_retention() == RetentionPolicy()

    def test_false_is_none_whatever_it_says(self, setting):
        setting(days="30")
        assert resolve_retention(False) is None

    def test_a_policy_that_is_given_is_taken_as_it_is(self, setting):
        setting(days="30", minimum_days="20")
        policy = RetentionPolicy(days=7)
        assert resolve_retention(policy) is policy

    def test_days_that_are_given_go_before_its_days_only(self, setting):
        setting(days="30", actions="recall=14", minimum_days="10")
        assert resolve_retention(20) == RetentionPolicy(days=20, actions={"recall": 14}, minimum_days=10)

    def test_its_floor_holds_for_days_that_are_given(self, setting):
        setting(minimum_days="hipaa")
        with pytest.raises(ConfigurationError, match=r"^retention: got 30; accepted is 2192 days or more"):
            resolve_retention(30)

    @pytest.mark.parametrize("given", [True, "30", 3.0, [30], {"days": 30}], ids=repr)
    def test_what_is_no_policy_is_refused(self, given):
        with pytest.raises(ConfigurationError, match=r"^retention: got .*; accepted is a RetentionPolicy, a number of"):
            resolve_retention(given)

    @pytest.mark.parametrize("given", [0, -1])
    def test_no_days_are_refused_where_they_are_given(self, given):
        with pytest.raises(ConfigurationError, match=r"^retention: got .*; accepted is a whole number of days"):
            resolve_retention(given)

    @pytest.mark.parametrize(
        ("variables", "variable", "problem"),
        [
            ({"days": "soon"}, "DAYS", "got 'soon'; accepted is a whole number of days, or 'forever'"),
            ({"days": "99999"}, "DAYS", "got 99999; accepted is a whole number of days from 1"),
            ({"days": "30", "minimum_days": "40"}, "DAYS", "got 30; accepted is 40 days or more"),
            ({"actions": "recall"}, "ACTIONS", "not days by name; accepted is recall=30,forget=forever"),
            ({"actions": "recall=3,recall=4"}, "ACTIONS", "not days by name"),
            ({"banks": "=30"}, "BANKS", "not days by name"),
            ({"banks": "a=0"}, "BANKS", "got 0; accepted is a whole number of at least 1"),
            ({"actions": "recall=30", "minimum_days": "40"}, "ACTIONS", "of 'recall': got 30; accepted is 40 days"),
            ({"days": "5", "minimum_days": "hippa"}, "MINIMUM_DAYS", "got 'hippa'; accepted is a number of days or"),
            ({"days": "5", "batch_size": "0"}, "BATCH_SIZE", "got 0;"),
            ({"days": "5", "jitter_seconds": "long"}, "JITTER_SECONDS", "got 'long';"),
        ],
        ids=str,
    )
    def test_a_refusal_names_the_variable(self, setting, variables, variable, problem):
        setting(**variables)
        with pytest.raises(ConfigurationError) as refused:
            resolve_retention()
        assert refused.value.source == f"{PREFIX}RETENTION_{variable}"
        assert str(refused.value).startswith(f"{PREFIX}RETENTION_{variable}: {problem}")

    @pytest.mark.parametrize("name", ["days", "actions", "banks", "minimum_days"])
    def test_a_refusal_shows_no_password(self, setting, name):
        setting(**{"days": "5", name: f"postgresql://me:{PASSWORD}@host/db?sslmode=require"})
        with pytest.raises(ConfigurationError) as refused:
            resolve_retention()
        assert PASSWORD not in str(refused.value)
