"""The attacked run, once a session; the helpers are in `attack`."""

from __future__ import annotations

import pytest
from attack import byte_model


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory):
    """A Hugging Face folder with a random model over bytes."""
    return byte_model(tmp_path_factory.mktemp("bytes") / "model")
