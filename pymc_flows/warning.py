"""Warnings that point at the user's line, however deep in the package they arise."""

import warnings
from pathlib import Path

HERE = str(Path(__file__).parent)


def warn_user(message: str) -> None:
    """Warn where the user called, so that Python shows what is said again on the same line only once."""
    warnings.warn(message, UserWarning, skip_file_prefixes=(HERE,))
