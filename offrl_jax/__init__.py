"""offrl_jax: offline reinforcement learning in JAX, honestly compared.

The public face is `make_agent`, `load_task`, `train`, `evaluate`, `run_benchmark` and
`read_leaderboard` (see `offrl_jax.api`), imported when first used.
"""

from __future__ import annotations

from typing import Any

from offrl_jax.version import __version__ as __version__

__all__ = (
    "evaluate",
    "load_task",
    "make_agent",
    "read_leaderboard",
    "run_benchmark",
    "train",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        from offrl_jax import api

        return getattr(api, name)
    raise AttributeError(f"module 'offrl_jax' has no attribute '{name}'")
