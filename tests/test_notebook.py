"""Tests that the notebook is saved as it ran, and that it runs."""

import json
import re
from pathlib import Path

import pytest

import kddm_jax

NOTEBOOK = Path(__file__).resolve().parents[1] / "examples" / "distillation.ipynb"
if not NOTEBOOK.is_file():
    pytest.skip("installed without the examples", allow_module_level=True)


def text_of(notebook):
    """Returns the text that the cells print and show."""
    outputs = [
        output
        for cell in notebook["cells"]
        if cell["cell_type"] == "code"
        for output in cell["outputs"]
    ]
    parts = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    return "\n".join(part if isinstance(part, str) else "".join(part) for part in parts)


def accuracies(text):
    """Returns accuracies on the test digits, by the title of the network."""
    rows = re.findall(r"^(\S.*?)\s{2,}(\d+\.\d)(?: ± \d+\.\d)? %", text, re.M)
    return {title: float(value) for title, value in rows}


def test_it_is_saved_as_it_ran():
    """It is small, has run from top to bottom, and has plots but no local paths."""
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    assert not re.search(r"/(home|root|tmp|Users)/", text)
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    assert "error" not in kinds
    assert not [o for c in cells for o in c["outputs"] if o.get("name") == "stderr"]
    assert text.count('"image/png"') == 3
    found = accuracies(text_of(json.loads(text)))
    assert list(found) == [
        *("teacher", "student alone"),
        *(kddm_jax.DISTANCES[key].title for key in ("w2", "cw2", "kl_gaussian", "l2")),
    ]


@pytest.mark.bench
def test_it_runs(monkeypatch):
    """It gives the saved accuracies, up to a few digits that rounding changes."""
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(Path(kddm_jax.__file__).parents[1]))
    # Optimized as for users, because most of the time is spent in loops.
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    saved = nbformat.read(NOTEBOOK, as_version=4)
    notebook = nbformat.from_dict(saved)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
    found, before = accuracies(text_of(notebook)), accuracies(text_of(saved))
    assert found == pytest.approx(before, abs=2.0)
    assert found["teacher"] > max(found["CW2 (E)"], found["paired L2"])
    assert min(found["CW2 (E)"], found["paired L2"]) > found["student alone"]
