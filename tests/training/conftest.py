"""Shards and a feature extractor, made once."""

from __future__ import annotations

import pytest
from training_toys import save_classifier, write_digit_like


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory) -> str:
    return write_digit_like(tmp_path_factory.mktemp("training") / "shards")


@pytest.fixture(scope="session")
def toy_classifier(tmp_path_factory) -> str:
    return save_classifier(tmp_path_factory.mktemp("training") / "classifier")
