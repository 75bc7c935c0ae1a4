"""What is remembered of names that come from data."""

import pytest

from astrocyte_otel_audit.memo import Memo


@pytest.fixture
def asked():
    return []


@pytest.fixture
def memo(asked):
    def answer(question):
        asked.append(question)
        return f"answer {len(asked)}"

    return Memo(answer)


@pytest.mark.parametrize("question", ["", "recall", "x" * 256, ("recall", None), ("x" * 200, 7, "y" * 56), 7])
def test_a_question_is_answered_once(memo, asked, question):
    assert [memo[question], memo[question]] == ["answer 1", "answer 1"]
    assert asked == [question]


@pytest.mark.parametrize("question", ["x" * 257, ("x" * 257, None), ("x" * 200, None, "y" * 57)])
def test_a_name_of_more_than_256_characters_is_answered_anew_and_not_kept(memo, asked, question):
    assert [memo[question], memo[question]] == ["answer 1", "answer 2"]
    assert len(memo) == 0


def test_it_begins_anew_when_it_is_full(memo, asked):
    for number in range(10_000):
        memo[f"name {number}"]
        assert len(memo) <= 4096
    assert memo["name 9999"] == "answer 10000"
    assert len(asked) == 10_000


def test_a_question_that_raises_is_not_remembered():
    memo = Memo(lambda question: 1 // question)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            memo[0]
    assert len(memo) == 0
