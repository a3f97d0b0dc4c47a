"""Run the Python code of the README, block after block, in one namespace. Warnings are errors."""

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
warnings.simplefilter("error")
# these two warnings concern the processes of nutpie and the plots' backend, not this package
warnings.filterwarnings("ignore", message="os.fork")
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
# a fit of 200 steps rightly warns
warnings.filterwarnings("ignore", message="the fit's importance weights are uneven")

readme = (Path(__file__).parents[1] / "README.md").read_text()
blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
if not blocks:
    sys.exit("README.md has no Python code")
os.chdir(tempfile.mkdtemp())  # the README saves a fit
namespace: dict = {"__name__": "__main__"}
for number, block in enumerate(blocks, start=1):
    print(f"README.md, block {number} of {len(blocks)}", flush=True)
    exec(compile(block, f"README.md block {number}", "exec"), namespace)
