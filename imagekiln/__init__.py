"""imagekiln: turn a set of pictures into a trained, measured, exportable image generator."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Run", "compare", "evaluate", "export", "generate", "prepare", "train"]


def __getattr__(name: str) -> Any:
    # torch is loaded when something is trained or drawn, not by `import imagekiln` or `imagekiln --help`.
    if name == "Run":
        from imagekiln.engine.run import Run

        return Run
    if name in __all__:
        from imagekiln import api

        return getattr(api, name)
    raise AttributeError(f"module 'imagekiln' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
