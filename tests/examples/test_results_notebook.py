"""The notebook runs from its first cell to its last, and shows what its text says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
EXAMPLES = Path(__file__).parents[2] / "examples"
NAME = "results.ipynb"


def read_notebook() -> Any:
    return nbformat.read(EXAMPLES / NAME, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_is_stored_without_outputs() -> None:
    notebook = read_notebook()
    nbformat.validate(notebook)
    for cell in code_cells(notebook):
        assert cell.outputs == []
        assert cell.execution_count is None


def test_every_cell_runs_and_shows_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    for name in (NAME, "results_task.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    notebook = read_notebook()
    client = nbclient.NotebookClient(
        notebook, kernel_name="python3", timeout=200, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()  # raises with the cell's traceback where one fails
    shown = [
        "".join(
            output.data["text/plain"] for output in cell.outputs if output.output_type == "execute_result"
        )
        for cell in code_cells(notebook)
    ]
    assert all(shown)
    first, frame, large, best, by_loss, _, comparison, differing = shown
    assert first.startswith("'spiral_")
    assert frame.count("finished") == 4
    assert large.count("trial_0000") == 2
    assert "val_accuracy_best" in best
    assert "val_loss_best" in by_loss
    assert comparison.count("large") == comparison.count("small") == 2
    assert differing.count("128") == 4
    assert len(list((tmp_path / "runs").iterdir())) == 2
