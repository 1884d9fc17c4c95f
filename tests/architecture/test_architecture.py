"""The house rules that a reader relies on, held by reading the source: layers, names, budgets."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import imagekiln

PACKAGE = Path(imagekiln.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
FAMILIES = sorted(p.stem for p in (PACKAGE / "families").glob("*.py") if not p.stem.startswith("_"))

LAYERS = [
    {"core", "config", "errors", "native", "signals"},
    {"nets", "diffusion", "optim", "data", "metrics"},
    {"families"},
    {"engine", "exporters"},
    {"api", "recipes", "report", "testing"},
    {"cli", "studio", "__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
SIBLINGS_APART = LAYERS[1]

ALLOWED_EDGES = {
    ("engine", "families"): "the registry asks the package where its folder is; it names no family",
    ("families", "optim"): None,
    ("families", "data"): None,
    ("families", "metrics"): None,
}
FORBIDDEN = {edge for edge, reason in ALLOWED_EDGES.items() if reason is None}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def dotted(path: Path) -> str:
    parts = ("imagekiln", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Modules of the package that a file imports, and whether it does so inside a function."""
    inside = {id(n) for f in ast.walk(tree(path)) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in whole]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "imagekiln":
                yield name, id(node) in inside


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def calls(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def strings(path: Path) -> Iterator[tuple[str, int]]:
    """String constants that are not docstrings."""
    documentation = {
        id(node.body[0].value)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            yield node.value, node.lineno


# -- layers -----------------------------------------------------------------------------------------------------------


def test_every_room_has_a_layer() -> None:
    rooms = {room(module) for module in MODULES} - {""}
    assert not rooms - set(LEVEL), "give the new room a layer, here and in docs/design.md"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    here = room(dotted(path))
    if not here:
        return  # imagekiln/__init__.py gives out what the api exports
    for name, _ in imports(path):
        there = room(name)
        if there in ("", here):
            continue
        if (here, there) in FORBIDDEN:
            pytest.fail(f"{path.name} imports {name}: families know nets and diffusion only")
        assert LEVEL[there] <= LEVEL[here], f"{path.name} imports {name}, which lies above it"
        assert not (here in SIBLINGS_APART and there in SIBLINGS_APART), f"{path.name} imports its sibling {name}"
        if there == "families":
            assert ALLOWED_EDGES.get((here, there)) and path.stem == "registry", f"{path.name} imports {name}"


def test_no_family_imports_another() -> None:
    for name in FAMILIES:
        for imported, _ in imports(PACKAGE / "families" / f"{name}.py"):
            assert room(imported) != "families", f"{name} imports {imported}"


def test_no_cycles_not_even_inside_functions() -> None:
    graph = {module: {name for name, _ in imports(path) if name in MODULES} for module, path in MODULES.items()}
    graph["imagekiln"] = set()  # lazy by design: its __getattr__ is how a user reaches the api
    finished: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, f"a cycle: {' -> '.join([*above, module])}"
        if module not in finished:
            for below in sorted(graph[module]):
                visit(below, (*above, module))
            finished.add(module)

    for module in sorted(graph):
        visit(module, ())


# -- names ------------------------------------------------------------------------------------------------------------

MAY_NAME_A_FAMILY = {
    "cli/train.py": {"diffusion": "the recipe that is trained when none is named"},
    "cli/prepare.py": {"diffusion": "the recipe whose first batch is shown"},
    "cli/recipe.py": {"diffusion": "the recipe whose schema is printed when none is named"},
    "engine/bench.py": {"classifier": "a kind of features"},
    "config.py": {"classifier": "a kind of features"},
    "metrics/features.py": {"classifier": "a kind of features"},
}


def test_nothing_outside_families_names_one() -> None:
    """A string equal to a family's name, or an import of its module. English words in sentences do not count."""
    used = {file: set[str]() for file in MAY_NAME_A_FAMILY}
    for path in FILES:
        file = path.relative_to(PACKAGE).as_posix()
        if file.startswith(("families/", "recipes/")):
            continue
        allowed = MAY_NAME_A_FAMILY.get(file, {})
        for value, line in strings(path):
            if value in FAMILIES:
                assert value in allowed, f"{file}:{line} names the family {value!r}"
                used[file].add(value)
        for name, _ in imports(path):
            assert not name.startswith("imagekiln.families."), f"{file} imports {name}"


RUN_FILES = {
    "recipe.toml",
    "meta.json",
    "status.json",
    "stats.jsonl",
    "metrics.jsonl",
    "doctor.jsonl",
    "monitor.jsonl",
    "release.safetensors",
    "log.txt",
    ".lock",
}


def test_only_the_run_knows_its_files() -> None:
    named = {}
    for path in FILES:
        if path != PACKAGE / "engine" / "run.py":
            named |= {f"{path.name}:{line}": value for value, line in strings(path) if value in RUN_FILES}
    assert not named
    known = {value for value, _ in strings(PACKAGE / "engine" / "run.py")}
    assert known >= RUN_FILES, "a file of the run changed its name: change it here too"


def test_names_say_something() -> None:
    for path in FILES:
        assert not re.search(r"utils|helpers|misc|common", path.stem), path
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                assert not re.search(r"Manager|Handler|^Base[A-Z]", node.name), f"{path.name}: {node.name}"


# -- what may be called where -----------------------------------------------------------------------------------------


def test_print_only_where_a_person_reads() -> None:
    for path in FILES:
        if path.parent.name != "cli" and path != PACKAGE / "engine" / "tracker.py":
            assert "print" not in {name for name, _ in calls(path)}, path


def test_no_assert_statements() -> None:
    """They vanish under `python -O`, and say nothing a user understands."""
    for path in FILES:
        assert not [n.lineno for n in ast.walk(tree(path)) if isinstance(n, ast.Assert)], path


OPENS_PICTURES = {
    "data/decode.py": "the guarded way in, for all pictures from outside",
    "report/pictures.py": "shrinks PNG files of the run itself, from bytes already read and with the format fixed",
}


def test_pictures_are_opened_in_one_place() -> None:
    for path in FILES:
        opened = {name for name, _ in calls(path)} & {"Image.open", "PIL.Image.open"}
        assert not opened or path.relative_to(PACKAGE).as_posix() in OPENS_PICTURES, path


def test_nothing_that_is_read_is_executed() -> None:
    forbidden = {"torch.save", "pickle.load", "pickle.loads", "eval", "exec", "os.system", "yaml.load"}
    for path in FILES:
        for name, line in calls(path):
            assert name not in forbidden, f"{path.name}:{line} calls {name}"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
        for node in ast.walk(tree(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not {n.split(".")[0] for n in names} & {"pickle", "dill", "joblib", "torchvision", "shelve"}, path
        text = path.read_text(encoding="utf-8")
        assert "allow_pickle=True" not in text and "trust_remote_code=True" not in text and "shell=True" not in text


# -- budgets ----------------------------------------------------------------------------------------------------------

LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}
LONGEST = 120


def test_files_are_short() -> None:
    for path in FILES:
        file, lines = path.relative_to(PACKAGE).as_posix(), len(path.read_text(encoding="utf-8").splitlines())
        limit = 700 if file.startswith("nets/") else 500
        assert lines <= limit or file in LONG_FILES, f"{file} has {lines} lines"


def test_functions_are_short() -> None:
    for path in FILES:
        for function in functions(path):
            name, lines = f"{path.stem}.{function.name}", (function.end_lineno or 0) - function.lineno + 1
            assert lines <= (LONGEST if name in LONG_FUNCTIONS else 60), f"{name} has {lines} lines"


def test_constructors_take_few_parameters() -> None:
    for path in FILES:
        for function in functions(path):
            if function.name == "__init__":
                arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
                counted = [a.arg for a in arguments if a.arg not in ("self", "config", "recipe")]
                assert len(counted) <= 8, f"{path.name}:{function.lineno} takes {counted}"


# -- documentation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path: Path) -> None:
    first = (ast.get_docstring(tree(path)) or "").split("\n")[0]
    assert (len(first) > 15 and first[-1] in ".:,?;") or len(first) > 60, f"first line of the docstring: {first!r}"


OBVIOUS = {"tick", "say", "preview", "close", "read"}
"""Methods whose meaning is given once, in the protocol they fulfil."""


@pytest.mark.parametrize("where", ["core.py", "config.py", "errors.py", "signals.py", "api.py", "testing.py", "engine"])
def test_public_things_are_documented(where: str) -> None:
    paths = [PACKAGE / where] if where.endswith(".py") else sorted((PACKAGE / where).glob("*.py"))
    for path in paths:
        for holder in [tree(path), *(n for n in tree(path).body if isinstance(n, ast.ClassDef))]:
            for node in holder.body:
                named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                if named and node.name not in OBVIOUS:
                    assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"
