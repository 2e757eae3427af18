"""No figure in the README is typed by hand: its tables are what the stored results say."""

import json
import re

import pytest

from benchmarks import report, results


def test_readme_tables_are_the_stored_results():
    text = report.README.read_text()
    assert report.filled(text) == text, "run `make report` after a benchmark"


def test_stored_results_say_where_they_come_from():
    files = sorted(results.FOLDER.glob("*.json"))
    assert files
    for path in files:
        run = json.loads(path.read_text())
        assert run.keys() == {"command", "commit", "date", "device", "versions", "rows"} and run["rows"], path
        assert run["commit"] not in ("", "unknown") and not run["commit"].endswith("-dirty"), path
        assert all({"bench", "shape", "impl", "ms", "rate", "unit"} <= row.keys() for row in run["rows"]), (
            path
        )


def test_a_missing_mark_is_named():
    with pytest.raises(ValueError, match="<!-- speed -->"):
        report.fill("no mark here", "speed", "")


def test_the_chinese_readme_gives_the_same_commands():
    """In the same order, and none that the English one has not."""
    blocks = [
        re.findall(r"```\w+\n.*?```", (report.ROOT / name).read_text(), re.DOTALL)
        for name in ("README.md", "README.zh.md")
    ]
    assert [block for block in blocks[0] if block in blocks[1]] == blocks[1] != []
