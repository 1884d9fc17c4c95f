"""Every family keeps the contract: the families and the checks are both found, not listed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from imagekiln import testing
from imagekiln.engine import registry


@pytest.mark.parametrize("check", testing.checks(), ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("name", registry.names())
def test_family(name: str, check: Callable[[str], None]) -> None:
    check(name)
