"""A server under load, for a few seconds; `make load-test` takes three minutes."""

import pytest

from tests.reliability.load import run


@pytest.mark.slow
def test_a_server_under_load() -> None:
    load = run(6)
    assert len(load.seconds) > 20
    assert load.refused > 0
    assert load.left > 0
    assert not load.wrong()
