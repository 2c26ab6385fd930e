"""Strict settings for every test, and where the shared development data lies."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
# Two virtual devices, so that every sharded path runs wherever the tests do.
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

ROOT = Path(__file__).resolve().parent.parent
# The same small programs are compiled by many tests.
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".pytest_cache" / "xla"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

SHARED = Path(os.environ.get("OFFRL_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="module", autouse=True)
def _programs_are_dropped():
    """Forgets what a file compiled, once its tests are through.

    A compiled program on CPU holds dozens of memory mappings, of which Linux allows a
    process 65,530; beyond that the compiler ends with a segmentation fault.
    """
    yield
    jax.clear_caches()


@contextlib.contextmanager
def _few_optimisations() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    # `make test-long` compiles everything as users do.
    jax.config.update(
        "jax_disable_most_optimizations", "OFFRL_OPTIMISE" not in os.environ
    )
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def little_optimised():
    """For tests that compile much, run little and ask for no equal bits."""
    with _few_optimisations():
        yield


@pytest.fixture(scope="module", autouse=True)
def _files_marked_so_are_little_optimised(request: pytest.FixtureRequest):
    """The same for whole files, their fixtures included."""
    marked = request.node.get_closest_marker("little_optimised") is not None
    with _few_optimisations() if marked else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def _caches_of_the_user_are_left_alone(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (`OFFRL_SHARED`); tests that need it skip without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}: set OFFRL_SHARED to the folder above")
    return folder
