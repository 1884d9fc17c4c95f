"""A page as a browser sees it, and a text that must never become one."""

from __future__ import annotations

from html.parser import HTMLParser

ATTACK = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


class Page(HTMLParser):
    """A page as a browser sees it: tags with attributes, section ids, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.sections = [found["id"] for tag, found in self.tags if tag == "section"]
        self.images = [found for tag, found in self.tags if tag == "img"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data
