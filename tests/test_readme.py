"""The README's Python runs, and what it says of the package is true."""

import re
from pathlib import Path

import pytest

from kddm_jax import DISTANCES

ROOT = Path(__file__).parents[1]
README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_snippets():
    assert len(BLOCKS) >= 2


def test_snippets_run_and_print_what_they_say(capsys):
    """One after the other, as somebody types them."""
    names = {"__name__": "readme"}
    for i, block in enumerate(BLOCKS):
        exec(compile(block, f"README block {i}", "exec"), names)
        printed = capsys.readouterr().out.split("\n")
        promised = re.findall(r"print\(.*\)  # (.*)", block)
        assert promised, "a snippet shows at least one printed value"
        for expected in promised:
            assert expected in printed


def test_the_catalogue_is_whole():
    rows = re.findall(r"^\| `(\w+)` \|", README, flags=re.MULTILINE)
    assert rows == list(DISTANCES)


@pytest.mark.parametrize("page", ["README.md", "experiments/README.md"])
def test_tables_are_rendered_from_their_json(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import report

    text = (ROOT / page).read_text()
    assert report.BLOCK.search(text), "a page of results has a table"
    assert report.fill(ROOT / page) == text
