"""The order of the house: which module may import which, how long functions are, and how fast a command answers."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import ROOT, run_script

COMMANDS = ("train_custom_diffusion", "infer", "evaluate", "retrieve", "merge", "export")
PACKAGE = "custom_diffusion"
# What may be imported from where, in the order of the house. `front` is the package's own __init__.
GROUND = ("ground",)
BELOW = {
    "ground": GROUND,
    "report": (*GROUND, "report"),
    "models": (*GROUND, "models"),
    "concept": (*GROUND, "models", "concept"),
    "data": (*GROUND, "models", "concept", "data"),
    "training": (*GROUND, "report", "models", "concept", "data", "training"),
    "retrieval": (*GROUND, "data", "retrieval"),
    "evaluation": (*GROUND, "models", "concept", "data", "evaluation"),
    "front": (*GROUND, "concept"),
}
BELOW["commands"] = tuple(BELOW)
BELOW["tools"] = (*BELOW, "tools")
BELOW["benchmarks"] = (*BELOW, "benchmarks")
BELOW["tests"] = (*BELOW, "tests")

# Libraries that take seconds to import; bitsandbytes prints a warning, too.
HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "torchao",
    "datasets",
    "peft",
}
LONGEST_FUNCTION = 60


class Import(NamedTuple):
    """An import of one of our modules or of a library.

    `at_once`: it runs when the importing module is imported, so it stands in no function.
    """

    line: int
    module: str
    name: str | None
    at_once: bool


def name_of(path: Path) -> str:
    """The name by which a file is imported."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module of the project by its name."""
    files = [*ROOT.glob("*.py")]
    for folder in (PACKAGE, "tools", "benchmarks", "tests"):
        files += (ROOT / folder).rglob("*.py")
    return {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(files)}


@functools.cache
def imports(module: str) -> tuple[Import, ...]:
    """What a module imports, in functions and for type checkers too; `from package import module` names the module."""
    tree = modules()[module]
    later = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    inside = {inner for node in later for inner in ast.walk(node)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(node.lineno, alias.name, None, node not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}:{node.lineno}: modules are named in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names = (inner, None) if inner in modules() else (str(node.module), alias.name)
                found.append(Import(node.lineno, *names, node not in inside))
    return tuple(found)


def room(module: str) -> str:
    """The part of the house that a module belongs to."""
    first, *rest = module.split(".")
    if first in COMMANDS:
        return "commands"
    if first != PACKAGE:
        return first
    if not rest:
        return "front"
    return rest[0] if rest[0] in BELOW else "ground"


@functools.cache
def reached(module: str) -> frozenset[str]:
    """The libraries that are imported at once with a module, by the first part of their names."""
    libraries, seen, ahead = set(), set(), [module]
    while ahead:
        here = ahead.pop()
        # A package is imported before its modules.
        parents = here.rpartition(".")[0]
        for name in (*(found.module for found in imports(here) if found.at_once), *([parents] if parents else [])):
            if name not in modules():
                libraries.add(name.split(".")[0])
            elif name not in seen:
                seen.add(name)
                ahead.append(name)
    return frozenset(libraries)


# --- imports -------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", modules())
def test_no_import_runs_upwards(module: str) -> None:
    assert room(module) in BELOW, f"{module} stands outside of the house"
    wrong = [
        f"line {found.line}: {found.module}"
        for found in imports(module)
        if found.module in modules() and room(found.module) not in BELOW[room(module)]
    ]
    assert not wrong, f"{module}, in {room(module)}, imports from above or beside it"


def test_there_are_no_circles() -> None:
    # The package's own __init__ imports for type checkers alone, and by name when it is asked.
    graph = {
        module: {found.module for found in imports(module) if found.module in modules()} - {module}
        for module in modules()
        if module != PACKAGE
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_the_package_itself_imports_nothing_at_once() -> None:
    assert reached(PACKAGE) <= sys.stdlib_module_names


@pytest.mark.parametrize("module", [name for name in modules() if room(name) == "retrieval"])
def test_retrieval_needs_no_heavy_library(module: str) -> None:
    assert not sorted(reached(module) & HEAVY)


# --- files and functions -------------------------------------------------------------------------


def test_the_root_holds_the_six_commands_alone() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*COMMANDS}


def test_no_function_is_long() -> None:
    long = []
    for module, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "pars" not in node.name:
                lines = node.end_lineno - node.lineno + 1
                long += [f"{module}.{node.name}: {lines} lines"] * (lines > LONGEST_FUNCTION)
    assert not long


@pytest.mark.parametrize("module", modules())
def test_private_names_stay_in_their_module(module: str) -> None:
    """Neither `from ours import _name` nor `ours._name`."""
    private = re.compile(r"_(?!_)")
    wrong = [
        f"line {found.line}: {found.name}"
        for found in imports(module)
        if found.module in modules() and private.match(found.name or "")
    ]
    imported = {
        (alias.asname or alias.name).split(".")[-1]
        for node in ast.walk(modules()[module])
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name) in modules()
    }
    for node in ast.walk(modules()[module]):
        if isinstance(node, ast.Attribute) and private.match(node.attr) and ast.unparse(node.value) in imported:
            wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not wrong


# --- how fast a command answers ------------------------------------------------------------------


def answer(command: str, flag: str) -> tuple[int, str, set[str], float]:
    """Exit code, what was printed, the libraries that were imported, and the seconds of CPU time that it took."""
    before = os.times()
    result = run_script("python", "-X", "importtime", ROOT / f"{command}.py", flag)
    after = os.times()
    printed, libraries = [result.stdout], set()
    for line in result.stderr.splitlines(keepends=True):
        if line.startswith("import time:"):
            libraries.add(line.rpartition("|")[2].strip().split(".")[0])
        else:
            printed.append(line)
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return result.returncode, "".join(printed), libraries, seconds


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("flag", "code"), [("--help", 0), ("--no_such_flag", 2)])
def test_a_command_answers_at_once(command: str, flag: str, code: int) -> None:
    returned, printed, libraries, seconds = answer(command, flag)
    assert returned == code, printed[-2000:]
    assert "Traceback" not in printed
    assert printed.count("usage:") == 1
    if code:
        assert re.search(rf"^{command}\.py: error: .+\Z", printed.strip(), re.MULTILINE), "one line says what is wrong"
    assert not sorted(libraries & HEAVY)
    assert seconds < 1
