"""Who is told how a training goes: a person at a terminal, a log file, TensorBoard."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from imagekiln.engine.run import Run
from imagekiln.errors import UsageError

PLAIN_LINE_SEC = 15.0

Say = Callable[[str], None]
"""Told a sentence now and then during long work."""


class Silent:
    """Tells nobody."""

    def tick(self, row: Mapping[str, Any]) -> None: ...
    def say(self, sentence: str) -> None: ...
    def preview(self, nimg: int, picture: Any) -> None: ...
    def close(self) -> None: ...


class Several:
    """Tells everybody in a list."""

    def __init__(self, listeners: Sequence[Any]) -> None:
        self.listeners = list(listeners)

    def tick(self, row: Mapping[str, Any]) -> None:
        for listener in self.listeners:
            listener.tick(row)

    def say(self, sentence: str) -> None:
        for listener in self.listeners:
            listener.say(sentence)

    def preview(self, nimg: int, picture: Any) -> None:
        for listener in self.listeners:
            listener.preview(nimg, picture)

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()


class Console:
    """A progress bar at a terminal, plain lines elsewhere; everything goes to `stream`, by default stderr."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._bar: Any = None
        self._task: Any = None
        self._last_line_sec = 0.0
        self._validation = ""

    def tick(self, row: Mapping[str, Any]) -> None:
        validation = [value for key, value in row.items() if key.startswith("validation/")]
        if validation:
            self._validation = f"  held-out {validation[0]:.4g}"
            return
        losses = "  ".join(f"{k.removesuffix('/loss')} {v:.4g}" for k, v in row.items() if k.endswith("/loss"))
        rate = row["img_per_sec"]
        left_sec = max(0, row["total_nimg"] - row["nimg"]) / rate if rate else 0.0  # the last step may go beyond
        finish = time.strftime("%H:%M:%S", time.localtime(time.time() + left_sec))
        text = f"{rate:.0f} img/s  {losses}{self._validation}  {row['peak_mem_gb']:.1f} GB"
        if self._is_terminal():
            self._draw(row, f"{text}  ends {finish}")
        elif time.monotonic() - self._last_line_sec >= PLAIN_LINE_SEC:
            self._last_line_sec = time.monotonic()
            share = min(1.0, row["nimg"] / row["total_nimg"])
            self._write(f"{share:4.0%}  {row['nimg']:,} images  {text}  {duration(left_sec)} left, ends {finish}")

    def say(self, sentence: str) -> None:
        self._write(sentence)

    def preview(self, nimg: int, picture: Any) -> None: ...

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _is_terminal(self) -> bool:
        return self.stream.isatty()

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    def _draw(self, row: Mapping[str, Any], text: str) -> None:
        if self._bar is None:
            from rich.console import Console as Terminal
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = [BarColumn(24), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}")]
            self._bar = Progress(*columns, console=Terminal(file=self.stream))
            self._bar.start()
            self._task = self._bar.add_task("", total=row["total_nimg"])
        self._bar.update(self._task, completed=row["nimg"], description=text)


class TensorBoard:
    """Curves and previews as TensorBoard events beside the run's own log."""

    def __init__(self, run: Run) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UsageError(
                "train.tensorboard = true needs the package tensorboard: pip install 'imagekiln[track]'."
            ) from None
        self._writer = SummaryWriter(str(run.events_folder))

    def tick(self, row: Mapping[str, Any]) -> None:
        for key, value in row.items():
            if key not in ("nimg", "total_nimg"):
                self._writer.add_scalar(key, value, global_step=row["nimg"])

    def say(self, sentence: str) -> None:
        self._writer.add_text("events", sentence)

    def preview(self, nimg: int, picture: Any) -> None:
        import numpy as np

        array = np.asarray(picture)
        self._writer.add_image("preview", array, nimg, dataformats="HW" if array.ndim == 2 else "HWC")

    def close(self) -> None:
        self._writer.close()


def duration(sec: float) -> str:
    """A length of time for people.

    >>> duration(75), duration(5)
    ('1 min 15 s', '5 s')
    """
    minutes, rest = divmod(round(sec), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
