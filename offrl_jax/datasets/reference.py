"""Reference returns of the `classic` environments, and the command that measures them.

  python -m offrl_jax.datasets.reference

prints the table below.  `minimum` is the mean return of the uniform random policy,
`maximum` that of the expert controller without noise, both over `EPISODES` episodes.
The published references of NeoRL-2 for the environment behind `dmsd` are 30.60 and
849.51: an independent check of both numbers.
"""

from __future__ import annotations

from offrl_jax.datasets import classic

EPISODES = 10_000
SEED = 0
SOURCE = (
    f"offrl_jax, mean of {EPISODES} episodes: random policy and noise-free expert "
    "controller (python -m offrl_jax.datasets.reference)"
)
CLASSIC: dict[str, tuple[float, float]] = {
    "pendulum": (-1228.128, -150.348),
    "point_maze": (0.0, 1.0),
    "gates": (0.053, 10.010),
    "dmsd": (34.117, 845.782),
}
"""`(minimum, maximum)` of each environment; standard errors 2.9 and 0.9 (pendulum),
0 and 0 (point_maze), 0.002 and 0.023 (gates), 0.7 and 0.3 (dmsd)."""


def main() -> None:
    """Measures and prints all references with their standard errors."""
    for environment in classic.ENVIRONMENTS:
        for which in ("minimum", "maximum"):
            found = classic.measure_reference(environment, which, EPISODES, SEED)
            print(
                f"{environment} {which} {found.mean:.3f} "
                f"(standard error {found.standard_error:.3f})"
            )


if __name__ == "__main__":
    main()
