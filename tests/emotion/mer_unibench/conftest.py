"""One synthetic root a session; tests that change files make their own."""

from pathlib import Path

import pytest

from tests.emotion.mer_unibench.synthetic import Made, make_root


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_root(tmp_path_factory.mktemp("mer_unibench"))


@pytest.fixture
def own(tmp_path: Path) -> Made:
    return make_root(tmp_path, faces=False)
