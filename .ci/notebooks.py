"""Execute all notebooks from the first cell, two at a time.

The run fails if a notebook raises an error or is committed without outputs.
"""

import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def execute(path: Path) -> str:
    """Execute a notebook; return its name, its number of code cells and its time."""
    started = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        raise ValueError(f"{path.name} must be committed with its outputs, got none")
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": path.parent}}).execute()
    return f"{path.name}: {len(code)} cells, {time.perf_counter() - started:.0f} s"


if __name__ == "__main__":
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not notebooks:
        sys.exit("notebooks/ must have a notebook, got none")
    # a kernel that crashes prints its traceback
    os.environ["PYTHONFAULTHANDLER"] = "1"
    failed = []
    # compilation takes most of the time and keeps one core busy
    with ProcessPoolExecutor(2) as pool:
        running = {pool.submit(execute, path): path.name for path in notebooks}
        for done in as_completed(running):
            if error := done.exception():
                failed.append(running[done])
                print(f"{running[done]}: {type(error).__name__}: {error}", flush=True)
            else:
                print(done.result(), flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")
