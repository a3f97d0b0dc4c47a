"""Write the golden files: fits that each format's version saved, and draws that it made.

Run once for each format, by the last version that wrote the format::

    git worktree add --detach FOLDER COMMIT
    cd tests/golden
    PYTHONPATH=FOLDER PYTENSOR_FLAGS=cxx= python make.py FORMAT

======  ========  ============================================================
FORMAT  COMMIT    what the version wrote
======  ========  ============================================================
0       818a7e6   format 1 when it was new: no bases, contexts or mnf groups
1       a5ed9ab   format 1 when it was replaced; conditioners may be in single
                  precision already, which is why format 2 followed
2       7dd1b68   format 2
3       4f29e87   format 3: correlated weights of mnf matrices
4       8db2abf   format 4: a multiplier for each weight
======  ========  ============================================================

Files of older formats can't be written again by a newer version: don't overwrite them. To add a
case to ``cases.py``, run the commands above with the case's name as a second argument.

Beside ``CASE.nc``, ``CASE.npz`` holds draws of each variable with their ``log_p`` and ``log_q``,
computed without JAX: the draws in NumPy, ``log_p`` by numba.
"""

import sys
from pathlib import Path

import numpy as np
from cases import CASES, N_DRAWS, SEED

import pymc_flows as pmf


def draws(approx):
    """Draw as these versions do without JAX."""
    approx.backend = "numba"
    idata = approx.sample(N_DRAWS, random_seed=SEED)
    found = {str(name): np.asarray(array[0]) for name, array in idata.posterior.items()}
    return found | {name: np.asarray(idata.sample_stats[name][0]) for name in ("log_p", "log_q")}


def main():
    """Write the files of one format: all, or those of the cases that are named."""
    version, *names = sys.argv[1:]
    folder = Path(__file__).parent / f"format{version}"
    folder.mkdir(exist_ok=True)
    for name, (build_model, build, formats) in CASES.items():
        if int(version) not in formats or (names and name not in names):
            continue
        path = folder / f"{name}.nc"
        pmf.save(build(build_model()), path)
        np.savez_compressed(path.with_suffix(".npz"), **draws(pmf.load(path, build_model())))
        print(
            version, name, path.stat().st_size, path.with_suffix(".npz").stat().st_size, flush=True
        )


if __name__ == "__main__":
    main()
