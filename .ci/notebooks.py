"""Execute every notebook from the start, two at a time; an error, or one without outputs, fails."""

import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]


def execute(path: Path) -> str:
    """Run a notebook; say how long it took."""
    started = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        raise ValueError(f"{path.name} is committed without outputs")
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": path.parent}}).execute()
    return f"{path.name}: {len(code)} cells, {time.perf_counter() - started:.0f} s"


if __name__ == "__main__":
    notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
    if not notebooks:
        sys.exit("no notebooks found")
    # compilation, most of what they do, keeps one core busy
    with ProcessPoolExecutor(2) as pool:
        for done in as_completed([pool.submit(execute, path) for path in notebooks]):
            print(done.result(), flush=True)
