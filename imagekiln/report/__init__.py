"""The report: one self-contained HTML file that says what a run learned, to open by double click and pass on.

Page and style are templates beside this file; a page needs no network and no script. That of a run needs no torch;
that of a prepared set (`report.prepared`) is imported by whoever has a set open.
"""

from imagekiln.report.page import write

__all__ = ["write"]
