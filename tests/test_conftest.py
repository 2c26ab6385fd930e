"""How tests are compiled: as users compile, unless they ask for less."""

from __future__ import annotations

import jax
import pytest

NAME = "jax_disable_most_optimizations"


def test_as_users_compile():
    assert jax.config.read(NAME) is False


@pytest.mark.parametrize("long", [False, True])
def test_less_where_it_is_asked_for_but_in_test_long(request, monkeypatch, long):
    if long:
        monkeypatch.setenv("OFFRL_OPTIMISE", "1")
    else:
        monkeypatch.delenv("OFFRL_OPTIMISE", raising=False)
    request.getfixturevalue("little_optimised")
    assert jax.config.read(NAME) is not long
