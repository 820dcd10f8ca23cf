"""Fixtures of the end-to-end tests; the helpers are in `conftest_e2e`, which tests import by name."""

from conftest_e2e import finished

__all__ = ["finished"]
