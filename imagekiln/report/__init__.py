"""The report: one self-contained HTML file that says what a run learned, to open by double click and pass on.

Page and style are templates beside this file. Nothing here imports torch; the page needs no network and no script.
"""

from imagekiln.report.page import write

__all__ = ["write"]
