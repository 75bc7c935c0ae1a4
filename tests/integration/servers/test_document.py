"""docs/servers.md: each cell has a test, and each test a cell."""

import re

import pytest

from tests.integration.servers.conftest import EXAMPLES, ROOT

DOCUMENT = (ROOT / "docs" / "servers.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (?!How |What happens|---)(.*) \|$", DOCUMENT, re.MULTILINE)
TESTS = ROOT / "tests" / "integration" / "servers"


@pytest.mark.parametrize("row", ROWS)
def test_every_line_says_when_rows_come_and_what_proves_it(row):
    _, rows, proof = row.split(" | ")
    assert re.match(r"(at exit|next|lost)\b", rows)
    [(path, name)] = re.findall(r"^`(\w+\.py)::(\w+)`$", proof)
    assert f"def {name}(" in (TESTS / path).read_text(encoding="utf-8")


def test_every_test_proves_a_line():
    names = {
        name for path in TESTS.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    own = {name for name in globals() if name.startswith("test_")}
    assert {name for name in names - own if f"::{name}`" not in DOCUMENT} == set()


@pytest.mark.parametrize("example", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_is_named(example):
    assert f"`{example}`" in DOCUMENT
