"""Families by name: the name is the file's name, so there is no list to keep.

A family of the package is its module's name; one from outside is a dotted module or the path of a `.py` file.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

from imagekiln import families
from imagekiln.core import Family
from imagekiln.errors import RecipeError, did_you_mean

_folder = Path(families.__file__).parent


def names() -> list[str]:
    """The families of the package."""
    return sorted(path.stem for path in _folder.glob("*.py") if not path.stem.startswith("_"))


def describe(name: str) -> str:
    """First line of the family's docstring, read without importing it."""
    return (ast.get_docstring(ast.parse((_folder / f"{name}.py").read_text(encoding="utf-8"))) or "").split("\n")[0]


def load(name: str) -> type[Family]:
    """The class of a family.

    Raises:
        RecipeError: no such family, or its file cannot be imported or holds no family.

    >>> load("vae").__name__
    'Vae'
    """
    module = _module(name)
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Family)
        and value is not Family
        and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise RecipeError(f"family {name!r}: {module.__file__} must define one subclass of Family, not {len(found)}.")
    return found[0]


def locate(name: str) -> str:
    """The name under which a family is found again from any folder: a path becomes absolute."""
    return str(Path(name).expanduser().resolve()) if name.endswith(".py") else name


def _module(name: str) -> ModuleType:
    if name in names():
        return importlib.import_module(f"imagekiln.families.{name}")
    try:
        if name.endswith(".py"):
            return _from_file(Path(name).expanduser().resolve())
        if "." in name:
            return importlib.import_module(name)
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"family {name!r} cannot be imported: {type(error).__name__}: {error}.") from error
    raise RecipeError(f"There is no family or recipe {name!r}. {did_you_mean(name, names())}")


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise RecipeError(f"The family file {path} does not exist.")
    module_name = f"imagekiln_family_{path.stem}_{abs(hash(str(path))):x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise RecipeError(f"The family file {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
