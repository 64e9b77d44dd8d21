"""Where the checkout of the published code is."""

from __future__ import annotations

from typing import Any

import pytest

from published_checkout import load_checkout


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--published", metavar="FOLDER", help="checkout of the published code to compare with")
    parser.addoption("--record", action="store_true", help="write what it gives to tests/data/published/recorded.json")


@pytest.fixture(scope="session")
def utils(pytestconfig: pytest.Config) -> Any:
    """The module `utils` of the checkout."""
    folder = pytestconfig.getoption("--published", default=None)
    if not folder:
        pytest.skip("needs a checkout of the published code: make test-published PUBLISHED=FOLDER")
    return load_checkout(folder)
