"""Rules of the package's structure, read from its source: sizes, imports, groups and examples.

CONTRIBUTING.md explains the rules. A failing test lists each place that breaks one.
"""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import pymc_flows as pmf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pymc_flows"

# folders and top modules of the package; each may import those before it and itself
ORDER = (
    "messages",
    "bijections",
    "statistics",
    "families",
    "model",
    "backend",
    "groups",
    "posterior",
    "fit",
    "assess",
    "registration",
    "__init__",
)

# largest number of lines of a module
MOST_MODULE_LINES = 450

# largest number of lines of code in a function, without docstring, comments and blank lines
MOST_FUNCTION_LINES = 60

# classes of groups, which only pymc_flows/groups may test for
GROUP_CLASSES = {"FlowGroup", "MNFGroup", "MeanFieldGroup", "FullRankGroup"}

# modules and folders without test files of their own -> the file that tests them
TESTED_ELSEWHERE = {
    "assess/plots": "assess/test_plots.py",
    "bijections/continuous.py": "bijections/test_base.py",
    "bijections/elementwise.py": "bijections/test_base.py",
    "bijections/factor_base.py": "bijections/test_factors.py",
    "fit/start/settings.py": "fit/start/test_search.py",
}


def sources() -> list[Path]:
    """Modules of the package, without the settings of its doctests."""
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name != "conftest.py")


@cache
def tree(path: Path) -> ast.Module:
    """Syntax tree of a module."""
    return ast.parse(path.read_text(), filename=str(path))


def name_of(path: Path) -> str:
    """Dotted name of a module, as it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(module: str) -> str:
    """Folder or top module below the package that holds a module."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


MODULES = {name_of(path): path for path in sources()}


def place(path: Path, node: ast.AST) -> str:
    """Position of a node as file and line, which an editor can open."""
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def imported(path: Path) -> Iterator[tuple[ast.stmt, str, str | None]]:
    """Imports from the package anywhere in a module: statement, module and imported name.

    Imports inside functions and under ``TYPE_CHECKING`` count. A submodule that is imported by name
    (``from pymc_flows.fit import ladder``) is a module, without a name.
    """
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "pymc_flows":
                    yield node, alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(path, node)}: relative import"
            base = node.module or ""
            if base.partition(".")[0] != "pymc_flows":
                continue
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield node, *((submodule, None) if submodule in MODULES else (base, alias.name))


def no_breach(breaches: list[str]) -> None:
    """Fail with one line for each violation."""
    assert not breaches, "\n" + "\n".join(breaches)


def lines_of_code(path: Path, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function that hold code: no docstrings, comments, blank lines or decorators."""
    source = path.read_text()
    aside = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in aside:
            lines.update(range(token.start[0], token.end[0] + 1))
    of_function = lines & set(range(function.lineno, (function.end_lineno or 0) + 1))
    for node in ast.walk(function):
        documented = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        if documented and ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            of_function -= set(range(docstring.lineno, (docstring.end_lineno or 0) + 1))
    return len(of_function)


def test_every_folder_has_its_place_in_the_order():
    """A new folder is added to ORDER, so that its imports are checked."""
    assert {folder_of(module) for module in MODULES} <= set(ORDER)


def test_modules_are_short():
    """A module has at most 450 lines."""
    lines = {path: len(path.read_text().splitlines()) for path in MODULES.values()}
    no_breach(
        [
            f"{path.relative_to(ROOT)}: {count} lines, at most {MOST_MODULE_LINES}"
            for path, count in lines.items()
            if count > MOST_MODULE_LINES
        ]
    )


def test_functions_are_short():
    """A function has at most 60 lines of code."""
    breaches = []
    for path in MODULES.values():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if (node.end_lineno or 0) - node.lineno < MOST_FUNCTION_LINES:
                continue
            count = lines_of_code(path, node)
            if count > MOST_FUNCTION_LINES:
                breaches.append(
                    f"{place(path, node)}: {node.name} has {count} lines, "
                    f"at most {MOST_FUNCTION_LINES}"
                )
    no_breach(breaches)


def test_imports_go_down_the_order_of_folders():
    """A folder imports only folders before it in ORDER; the package itself is imported by none."""
    breaches = []
    for module, path in MODULES.items():
        for node, target, _ in imported(path):
            here, there = folder_of(module), folder_of(target)
            if ORDER.index(there) > ORDER.index(here) or (here != there == "__init__"):
                breaches.append(f"{place(path, node)}: {here} imports {target}")
    no_breach(breaches)


def test_imports_form_no_cycle():
    """No chain of imports between modules leads back to its first module.

    ``from package import name`` counts as an import of the package's ``__init__``, which it runs.
    """
    graph = {
        module: {target for _, target, _ in imported(path) if target in MODULES} - {module}
        for module, path in MODULES.items()
    }
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> list[str]:
        if module in trail:
            return [" -> ".join((*trail[trail.index(module) :], module))]
        if module in done:
            return []
        cycles = [
            line for target in sorted(graph[module]) for line in walk(target, (*trail, module))
        ]
        done.add(module)
        return cycles

    no_breach([line for module in graph for line in walk(module, ())])


def test_private_names_stay_in_their_folder():
    """No ``from x import _y`` and no ``x._y`` on an imported module, from one folder to another."""
    breaches = []
    for module, path in MODULES.items():
        here = folder_of(module)
        modules: dict[str, str] = {}  # local name -> module, of other folders
        for node, target, name in imported(path):
            if folder_of(target) == here:
                continue
            private = [part for part in target.split(".") if is_private(part)]
            if private or (name is not None and is_private(name)):
                breaches.append(f"{place(path, node)}: imports {target}.{name or ''}")
            if name is None:
                modules.update(local_names(node, target))
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                owner = ast.unparse(node.value)
                if owner in modules:
                    breaches.append(f"{place(path, node)}: uses {owner}.{node.attr}")
    no_breach(breaches)


def is_private(name: str) -> bool:
    """Whether a name begins with one underscore, or with two and does not end with them."""
    return name.startswith("_") and not name.endswith("__")


def local_names(statement: ast.stmt, target: str) -> dict[str, str]:
    """Names by which a module is known after its import."""
    assert isinstance(statement, ast.Import | ast.ImportFrom)
    names = {}
    for alias in statement.names:
        full = alias.name
        if isinstance(statement, ast.ImportFrom):
            full = f"{statement.module}.{alias.name}"
        if full == target:
            whole = alias.name if isinstance(statement, ast.ImportFrom) else target
            names[alias.asname or whole] = target
    return names


def test_bijections_need_no_pymc():
    """Nothing in ``bijections`` imports PyMC, so it could be a library of its own."""
    breaches = []
    for module, path in MODULES.items():
        if folder_of(module) != "bijections":
            continue
        breaches += [
            f"{place(path, node)}: imports {name}"
            for node in ast.walk(tree(path))
            for name in modules_of(node)
            if name.partition(".")[0] == "pymc"
        ]
    no_breach(breaches)


def modules_of(node: ast.AST) -> list[str]:
    """Modules that a node imports, or imports from."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_only_groups_test_for_kinds_of_groups():
    """Other folders ask a group through its protocol, never for its class.

    ``isinstance``, ``issubclass``, ``type(group) is ...`` and ``case FlowGroup():`` test for a
    class.
    """
    breaches = []
    for module, path in MODULES.items():
        if folder_of(module) == "groups":
            continue
        breaches += [
            f"{place(path, node)}: {', '.join(sorted(found))}"
            for node in ast.walk(tree(path))
            if asks_for_class(node) and (found := GROUP_CLASSES & names_in(node))
        ]
    no_breach(breaches)


def asks_for_class(node: ast.AST) -> bool:
    """Whether a node compares the class of an object with another class."""

    def calls(part: ast.AST, names: tuple[str, ...]) -> bool:
        is_call = isinstance(part, ast.Call) and isinstance(part.func, ast.Name)
        return is_call and part.func.id in names

    if isinstance(node, ast.Compare):
        return any(calls(part, ("type",)) for part in (node.left, *node.comparators))
    return isinstance(node, ast.MatchClass) or calls(node, ("isinstance", "issubclass"))


def names_in(node: ast.AST) -> set[str]:
    """Last parts of all names in an expression."""
    inside = list(ast.walk(node))
    names = {part.id for part in inside if isinstance(part, ast.Name)}
    return names | {part.attr for part in inside if isinstance(part, ast.Attribute)}


def test_objects_are_made_by_their_constructors():
    """No ``__dict__.update`` and no ``X.__new__(...)``: classes make their own objects."""
    breaches = []
    for path in MODULES.values():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                of_dict = isinstance(node.func.value, ast.Attribute) and (
                    node.func.value.attr == "__dict__"
                )
                if node.func.attr == "__new__" or (of_dict and node.func.attr == "update"):
                    breaches.append(f"{place(path, node)}: {ast.unparse(node.func)}")
    no_breach(breaches)


@pytest.mark.parametrize("name", pmf.__all__)
def test_public_names_have_an_example(name):
    """Each public function and class has a docstring with an example, which CI runs."""
    value = getattr(pmf, name)
    if inspect.ismodule(value):
        return
    assert inspect.isfunction(value) or inspect.isclass(value), f"{name} is a {type(value)}"
    assert ">>>" in (value.__doc__ or ""), f"pymc_flows.{name} has no example"


def test_tests_mirror_the_package():
    """``pymc_flows/<folder>/<module>.py`` is tested by ``tests/<folder>/test_<module>.py``."""
    breaches = []
    for module, path in MODULES.items():
        if path.name == "__init__.py":
            continue
        inside = path.relative_to(PACKAGE)
        expected = inside.with_name(f"test_{inside.name}").as_posix()
        for exception in (inside, inside.parent):
            expected = TESTED_ELSEWHERE.get(exception.as_posix(), expected)
        if not (ROOT / "tests" / expected).is_file():
            breaches.append(f"{module}: no tests/{expected}")
    no_breach(breaches)


def test_exceptions_from_the_mirror_are_needed():
    """Each exception names a module or folder that exists and has no tests of its own."""
    for module, elsewhere in TESTED_ELSEWHERE.items():
        inside = Path(module)
        assert (PACKAGE / inside).exists(), f"{module} does not exist"
        own = inside.with_name(f"test_{inside.name}") if inside.suffix else inside
        assert not (ROOT / "tests" / own).exists(), f"tests/{own} exists beside tests/{elsewhere}"
