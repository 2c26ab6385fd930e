"""offrl_jax: offline reinforcement learning in JAX, honestly compared."""

__version__ = "0.1.0"
