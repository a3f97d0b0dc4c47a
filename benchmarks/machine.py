"""One line that names the machine and the versions behind a table."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path


def processor() -> str:
    """Model name of the processor, or its architecture where the name is unknown."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe(*packages: str) -> str:
    """Processor, cores, Python, and the versions of PyMC, PyTensor and some packages."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("pymc", "pytensor", *packages)
    )
    return (
        f"{processor()}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, {versions}"
    )
