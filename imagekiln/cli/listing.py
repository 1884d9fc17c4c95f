"""`imagekiln list`: what exists."""

from __future__ import annotations

from imagekiln.cli.output import DebugOption, JsonOption, answer


def list_(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the families and recipes that exist."""
    from imagekiln.engine import recipe as recipes
    from imagekiln.engine import registry

    families = {name: registry.describe(name) for name in registry.names()}
    described = {name: recipes.header(name).split("\n")[0] for name in recipes.names()}
    width = max(map(len, [*families, *described]))
    lines = ["Families", *(f"  {name:<{width}}  {text}" for name, text in families.items())]
    lines += ["Recipes", *(f"  {name:<{width}}  {text}" for name, text in described.items())]
    answer("\n".join(lines), {"families": families, "recipes": described}, as_json)
