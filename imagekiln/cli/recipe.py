"""`imagekiln recipe`: look at recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from imagekiln.cli.output import DebugOption, JsonOption, answer

app = typer.Typer(help="Look at recipes and their settings.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Recipe, family, or path of a .toml or .py file.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="A setting, such as train.batch=32.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Print a recipe with every default written out: the start of your own."""
    from imagekiln.config import write_toml
    from imagekiln.engine import recipe as recipes

    name = recipes.meant(name)
    resolved = recipes.resolve(name, assignments=settings or [])
    comment = "".join(f"# {line}\n" for line in recipes.header(name).splitlines()) if name in recipes.names() else ""
    answer(comment + write_toml(resolved), resolved.model_dump(mode="json"), as_json)


@app.command()
def schema(
    name: Annotated[str, typer.Argument(help="Recipe, family, or path of a .toml or .py file.")] = "diffusion",
    debug: DebugOption = False,
) -> None:
    """Print the JSON Schema of a recipe, for editors and forms."""
    from imagekiln.engine import recipe as recipes

    answer("", recipes.json_schema(name), as_json=True)
