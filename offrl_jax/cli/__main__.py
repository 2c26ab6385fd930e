"""`python -m offrl_jax.cli` is `offrl`."""

from offrl_jax.cli import main

main()
