"""Run the Python blocks of the README in order, in one namespace. Warnings are errors."""

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
warnings.simplefilter("error")
# these two warnings come from nutpie's processes and from matplotlib's backend
warnings.filterwarnings("ignore", message="os.fork")
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive")
# the README's fits of 200 steps are too short, so this warning is expected
warnings.filterwarnings("ignore", message="the fit's importance weights are uneven")

readme = (Path(__file__).parents[1] / "README.md").read_text()
blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
if not blocks:
    sys.exit("README.md must have a block of Python code, got none")
os.chdir(tempfile.mkdtemp())  # the README saves a file
namespace: dict = {"__name__": "__main__"}
for number, block in enumerate(blocks, start=1):
    print(f"README.md, block {number} of {len(blocks)}", flush=True)
    exec(compile(block, f"README.md block {number}", "exec"), namespace)
