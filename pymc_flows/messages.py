"""Messages to users: warnings that point at the user's line, and suggestions for misspelt names."""

import difflib
import warnings
from collections.abc import Iterable
from pathlib import Path

# folder of this package; warnings skip its frames, to point at the user's line
PACKAGE = str(Path(__file__).parent)


def warn_user(message: str) -> None:
    """Issue a ``UserWarning`` at the line of the user's call into the package.

    Python's default filter shows a warning once per line, so a call in a loop warns once.

    Parameters
    ----------
    message : str
        The problem, and a remedy.

    Examples
    --------
    >>> import warnings
    >>> with warnings.catch_warnings(record=True, action="always") as caught:
    ...     warn_user("k-hat is 0.9; increase n_layers")
    >>> str(caught[0].message)
    'k-hat is 0.9; increase n_layers'
    """
    warnings.warn(message, UserWarning, skip_file_prefixes=(PACKAGE,))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the known name nearest to a misspelt one, as the end of an error message.

    Parameters
    ----------
    name : str
        Name that is not known.
    known : iterable of str
        Names that are valid.

    Returns
    -------
    str
        ``"; did you mean <nearest>?"``, or an empty string if no name is near.

    Examples
    --------
    >>> did_you_mean("plannar", ["planar", "radial"])
    '; did you mean planar?'
    >>> did_you_mean("x", ["planar", "radial"])
    ''
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""
