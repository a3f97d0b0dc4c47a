"""Execute every notebook from the start; an error, or a notebook without outputs, fails."""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
notebooks = sorted((ROOT / "notebooks").glob("*.ipynb"))
if not notebooks:
    sys.exit("no notebooks found")
for path in notebooks:
    started = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not any(cell.outputs for cell in code):
        sys.exit(f"{path.name} is committed without outputs")
    NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": path.parent}}).execute()
    print(f"{path.name}: {len(code)} cells, {time.perf_counter() - started:.0f} s", flush=True)
