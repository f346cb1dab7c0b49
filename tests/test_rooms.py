"""Who may import whom, read from the sources: entry points -> utils, baselines -> model, and no cycle within."""
import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

ENTRY_POINTS = ("train", "test", "reconstruct", "compare", "app")
SOURCES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
           for folder in ("model", "utils", "baselines") for path in (ROOT / folder).rglob("*.py")}
SOURCES |= {name: ROOT / f"{name}.py" for name in ENTRY_POINTS}
MOST_PARAMETERS = 6
# What a room of utils may import beside itself, the model and what all of them share.
BELOW = {"utils.data": set(), "utils.download": {"utils.data"}, "utils.evaluation": {"utils.data"},
         "utils.training": {"utils.data", "utils.evaluation"}, "utils.comparison": {"utils.data", "utils.evaluation"},
         "utils": {"utils.data"}}


def statements(body: list[ast.stmt], everywhere: bool) -> Iterator[ast.stmt]:
    """The statements of a module that run, those within functions only where `everywhere`."""
    for node in body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not everywhere:
            continue
        yield node
        for name in ("body", "orelse", "finalbody"):
            yield from statements(getattr(node, name, []), everywhere)
        for handler in getattr(node, "handlers", []):
            yield from statements(handler.body, everywhere)


def imported(name: str, everywhere: bool) -> set[str]:
    """Modules of ours that a module imports."""
    path, found = SOURCES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body, everywhere):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[:len(package.split(".")) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            found |= {each if (each := f"{base}.{alias.name}") in SOURCES else base for alias in node.names}
    return {each for each in found if each in SOURCES} - {name}


def room(name: str) -> str:
    """model, baselines, an entry point; of utils the room within it, or "utils" for what all rooms share."""
    parts = name.split(".")
    return ".".join(parts[:2]) if (ROOT / Path(*parts[:2])).is_dir() and parts[0] == "utils" else parts[0]


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_rooms_import_one_way(name: str):
    own = room(name)
    for other in imported(name, everywhere=True):
        to = room(other)
        if own == "model":
            assert to == "model", f"{name} imports {other}"
        elif own.startswith("utils"):
            assert to in {own, "model", "utils", *BELOW[own]}, f"{name} imports {other}"
        elif own == "baselines":
            assert to not in ENTRY_POINTS, f"{name} imports {other}"
        else:
            assert to not in ENTRY_POINTS or to == own, f"{name} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    """At import; what a function imports when it is called waits until all are there."""
    graph = {name: imported(name, everywhere=False) for name in SOURCES}
    # A package's names are imported from it, where it has imported its modules: those do not need it.
    graph = {name: {other for other in others if not name.startswith(f"{other}.")} for name, others in graph.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_function_outside_the_model_has_more_than_six_parameters():
    found = []
    for name, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and not name.startswith("model"):
                parameters = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([each for each in parameters if each not in ("self", "cls")]) > MOST_PARAMETERS:
                    found.append(f"{name}.{node.name}")
    assert found == []
