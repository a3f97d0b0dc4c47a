"""What users read: warnings that point at their line, and hints in error messages."""

import difflib
import warnings
from collections.abc import Iterable
from pathlib import Path

PACKAGE = str(Path(__file__).parent)


def warn_user(message: str) -> None:
    """Warn at the line of the user's call, however deep in the package the warning arises.

    Python then shows a warning that repeats on the same line only once.
    """
    warnings.warn(message, UserWarning, skip_file_prefixes=(PACKAGE,))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name nearest to a misspelt one, as the end of an error message.

    >>> did_you_mean("plannar", ["planar", "radial"])
    '; did you mean planar?'
    >>> did_you_mean("x", ["planar", "radial"])
    ''
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
