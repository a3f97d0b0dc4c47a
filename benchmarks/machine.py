"""One line on the machine and the versions that a table was made with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def processor() -> str:
    """Model name of the processor, where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe(*packages: str) -> str:
    """Processor, cores, Python and the versions of PyMC, PyTensor and the packages named."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("pymc", "pytensor", *packages)
    )
    return (
        f"{processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, {versions}"
    )
