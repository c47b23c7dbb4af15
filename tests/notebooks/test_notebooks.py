"""The notebooks run from the first cell to the last, one after the other, as a person would run them."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
SMALLER = {  # of the cell tagged "parameters", so that all of it takes two minutes
    "1_relufication": "DOCUMENTS, STEPS = 60, 30",
    "2_sparse_decoding": "TOKENS, RANK = 8_000, 32",
    "3_planning": "from configs.falcon_7b import CONFIG as RUN\nDEVICES, MESHES = 8, [(1, 8, 1)]",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where they run: the second goes on with what the first leaves."""
    return tmp_path_factory.mktemp("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, folder):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), (
        "outputs are not committed: nbstripout takes them out"
    )
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = SMALLER[path.stem]
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": folder}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "data" in output]
    assert sum("image/png" in output.data for output in shown) >= 1
    nbformat.write(notebook, folder / path.name)  # for a look at the plots
