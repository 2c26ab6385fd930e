"""Which estimator of MISA's policy gradient is cheapest at equal error.

Example:
  python benchmarks/misa/gradient_error.py --out results/misa_gradient_error

Writes `gradient_error.csv` and `gradient_error.md`.  Estimated is the term

    g = E_{a ~ p*} grad_theta log pi(a|s),   p*(a|s) ~ pi(a|s) exp Q(s, a)

for tanh-Gaussian policies, theta = (mean / std, log std), on random smooth Q (sums of
cosines in the action) whose standard deviation over phases is the `sharpness`.  The
truth is quadrature in float64.  Nothing is trained, no network is needed.

Errors are relative to the norm of g: `rmse` of the estimate in one state, and the
`bias` in it that no batch averages away.  Without any estimate (`dropped`, the biased
variant of the paper) both are 1.  A price is what one state costs per update:
evaluations of Q alone, evaluations of Q with its gradient in the action, and their sum
in forward passes, where a gradient costs one more pass.  Evaluations of Q alone at the
policy's draws cost nothing in an update whose critic loss makes them anyway.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from offrl_jax import sampling
from offrl_jax.errors import OffrlError, UsageError

FEATURES = 8
FREQUENCY = 3.0
"""Standard deviation of the cosines' angular frequencies, per unit of action."""
MEAN_STD = 0.5
SMALLEST_STD, LARGEST_STD = 0.1, 1.0
"""Range of the policies' standard deviation before tanh (log-uniform)."""

# Trapezoids over the policy's noise: exponentially exact for a smooth integrand.
REACH, POINTS = 10.0, 401

ADAPTED = ("hmc", "resampled")
FIRST_STEP, RATE = 0.5, 0.3

# The time goes into compiling two dozen small programs, not into running them.
COMPILER = {"xla_backend_optimization_level": 0}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Measures every estimator on the same random problems."""

    out: Path
    """Folder for gradient_error.csv and gradient_error.md; it is made."""
    problems: int = 64
    """Random pairs of a policy and a Q, per dimension."""
    rounds: int = 32
    """Estimates per problem, after the step size has been adapted."""
    adapting: int = 24
    """Rounds before these, in which the step size settles."""
    sharpness: tuple[float, ...] = (0.3, 1.0, 4.0, 16.0)
    """Standard deviations of Q, in nats."""
    seed: int = 0
    """Of problems and estimates."""


class Problems(NamedTuple):
    """P policies with their Q, of sharpness 1, over D action dimensions.

    Attributes:
      mean: `[P, D]`, before tanh.
      log_std: `[P, D]`.
      frequency: `[P, F, D]`.
      phase: `[P, F]`.
      weight: `[P, F]`.
    """

    mean: jax.Array
    log_std: jax.Array
    frequency: jax.Array
    phase: jax.Array
    weight: jax.Array


class Estimator(NamedTuple):
    """One way to estimate g, and what one state costs per update.

    Attributes:
      kind: `dropped`; `importance` weights, or `centred` ones, less the score's sample
        mean; chains of `hmc`, from draws of the policy or `resampled` ones; `released`.
      pool: draws of the policy at which Q alone is evaluated.
      chains, draws, burn_in, leapfrogs: of the chains, if any.
    """

    kind: str
    pool: int = 0
    chains: int = 0
    draws: int = 0
    burn_in: int = 0
    leapfrogs: int = 0

    @property
    def gradients(self) -> int:
        """Evaluations of Q with its gradient in the action."""
        transitions = self.burn_in + self.draws
        return self.chains * (1 + self.leapfrogs * transitions)

    @property
    def label(self) -> str:
        """For the table."""
        if not self.chains:
            return f"{self.kind} weights, K = {self.pool}" if self.pool else self.kind
        start = f" of {self.pool}" if self.pool else ""
        return (
            f"{self.kind}{start}, {self.chains} x {self.draws}, "
            f"burn-in {self.burn_in}, L = {self.leapfrogs}"
        )


HMC_SHAPES = ((1, 50, 5), (5, 10, 5), (10, 5, 5), (10, 5, 2), (50, 1, 1))
"""Chains, draws of each, burn-in."""

ESTIMATORS = (
    Estimator("dropped"),
    *(Estimator("importance", pool) for pool in (1, 10, 50, 200)),
    *(Estimator("centred", pool) for pool in (10, 50, 200)),
    *(Estimator("hmc", 0, *shape, n) for shape in HMC_SHAPES for n in (1, 2)),
    Estimator("resampled", 50, 10, 1, 1, 2),
    Estimator("resampled", 50, 10, 5, 0, 2),
    Estimator("released", 0, 1, 50, 5, 2),
)


class Row(NamedTuple):
    """One line of the CSV; `sharpness` in nats, `acceptance` NaN without a chain."""

    kind: str
    pool: int
    chains: int
    draws: int
    burn_in: int
    leapfrogs: int
    dimensions: int
    sharpness: float
    rmse: float
    bias: float
    acceptance: float
    step_size: float
    gradients: int
    passes: int


def make_problems(key: jax.Array, problems: int, dimensions: int) -> Problems:
    """Random problems."""
    keys = jax.random.split(key, 5)
    shape = (problems, dimensions)
    low, high = np.log(SMALLEST_STD), np.log(LARGEST_STD)
    frequency = jax.random.normal(keys[2], (problems, FEATURES, dimensions))
    return Problems(
        mean=MEAN_STD * jax.random.normal(keys[0], shape),
        log_std=jax.random.uniform(keys[1], shape, minval=low, maxval=high),
        frequency=FREQUENCY * frequency,
        phase=jax.random.uniform(keys[3], (problems, FEATURES), maxval=2.0 * np.pi),
        # A cosine of random phase has variance 1/2.
        weight=np.sqrt(2.0 / FEATURES)
        * jax.random.normal(keys[4], (problems, FEATURES)),
    )


def q_values(problems: Problems, action: jax.Array) -> jax.Array:
    """Q of actions `[C, P, D]` -> `[C, P]`."""
    angle = jnp.einsum("cpd,pfd->cpf", action, problems.frequency)
    return jnp.einsum(
        "cpf,pf->cp", jnp.cos(angle + problems.phase[None]), problems.weight
    )


def scores(zeta: jax.Array) -> jax.Array:
    """`grad_theta log pi` at the noise `[..., D]`: `[..., 2 D]`, exactly."""
    return jnp.concatenate([zeta, jnp.square(zeta) - 1.0], axis=-1)


def expected_scores(problems: Problems, sharpness: tuple[float, ...]) -> np.ndarray:
    """The truth, `[len(sharpness), P, 2 D]`, by quadrature in float64."""
    mean, log_std, frequency, phase, weight = (
        np.asarray(leaf, np.float64) for leaf in problems
    )
    count, dimensions = mean.shape
    axis = np.linspace(-REACH, REACH, POINTS)
    grid = np.meshgrid(*[axis] * dimensions, indexing="ij")
    zeta = np.stack([x.ravel() for x in grid], axis=-1)
    score = np.concatenate([zeta, zeta**2 - 1.0], axis=-1)
    log_normal = -0.5 * (zeta**2).sum(-1)
    letters = "ijk"[:dimensions]
    sums = "f," + ",".join(f"{x}f" for x in letters) + "->" + letters
    truth = np.empty((len(sharpness), count, 2 * dimensions))
    for p in range(count):
        action = np.tanh(mean[p] + np.exp(log_std[p]) * axis[:, None])
        # cos(w . a + b) is the real part of a product over dimensions.
        per_axis = zip(action.T, frequency[p].T, strict=True)
        waves = [np.exp(1j * np.outer(a, w)) for a, w in per_axis]
        q = np.einsum(sums, weight[p] * np.exp(1j * phase[p]), *waves, optimize=True)
        for s, scale in enumerate(sharpness):
            log_density = log_normal + scale * q.real.ravel()
            density = np.exp(log_density - log_density.max())
            truth[s, p] = density @ score / density.sum()
    return truth


def one_round(
    estimator: Estimator,
    problems: Problems,
    sharpness: jax.Array,
    key: jax.Array,
    log_step: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One estimate per problem `[P, 2 D]`, the acceptance, the log step used."""
    count, dimensions = problems.mean.shape
    pool_key, chain_key, choice_key = jax.random.split(key, 3)

    def target(rows: int) -> tuple[sampling.Whitened, sampling.LogDensity]:
        """`rows` chains or draws of every problem, whitened and raw."""

        def q_of(action: jax.Array) -> jax.Array:
            q = q_values(problems, action.reshape(rows, count, dimensions))
            return sharpness * q.reshape(-1)

        mean = jnp.tile(problems.mean, (rows, 1))
        log_std = jnp.tile(problems.log_std, (rows, 1))
        whitened = sampling.whitened(q_of, mean, log_std)
        return whitened, sampling.raw(q_of, mean, log_std)

    def policy_draws(rows: int) -> jax.Array:
        return jax.random.normal(pool_key, (rows, count, dimensions))

    no_chain = jnp.full((), jnp.nan)
    if not estimator.chains and not estimator.pool:
        return jnp.zeros((count, 2 * dimensions)), no_chain, no_chain
    if estimator.pool:
        draws = policy_draws(estimator.pool)
        std = jnp.exp(problems.log_std)
        q = sharpness * q_values(
            problems, jnp.tanh(problems.mean[None] + std[None] * draws)
        )
    if not estimator.chains:
        weights = sampling.self_normalised_weights(q)
        if estimator.kind == "centred":
            # The score's mean under the policy is 0: subtract its sample mean.
            weights = weights - 1.0 / estimator.pool
        estimate = jnp.sum(weights[..., None] * scores(draws), axis=0)
        return estimate, no_chain, no_chain
    chains = estimator.chains
    if estimator.pool:
        start = sampling.resampled(choice_key, q, draws, chains)
    else:
        start = policy_draws(chains)
    start = start.reshape(-1, dimensions)
    whitened, raw = target(chains)
    counts = {
        "draws": estimator.draws,
        "burn_in": estimator.burn_in,
        "leapfrogs": estimator.leapfrogs,
    }
    if estimator.kind == "released":
        # Data of a behaviour that equals the policy, clipped as theirs are.
        actions = jnp.clip(whitened.action(start), -0.999, 0.999)
        drawn, step = sampling.hmc_released(chain_key, raw, actions, **counts)
        zeta = whitened.noise(drawn.positions)
        log_step = jnp.log(step)
    else:
        drawn = sampling.hmc(
            chain_key,
            whitened.log_density,
            start,
            step_size=jnp.exp(log_step),
            **counts,
        )
        zeta = drawn.positions
    every = scores(zeta).reshape(-1, count, 2 * dimensions)
    return jnp.mean(every, axis=0), drawn.acceptance, log_step


def estimates(
    estimator: Estimator,
    problems: Problems,
    sharpness: tuple[float, ...],
    key: jax.Array,
    adapting: int,
    rounds: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Estimates `[X, rounds, P, 2 D]`, acceptance and step `[X, rounds]` per sharpness.

    One step size per sharpness, adapted over all problems as an agent's is over its
    batches; it is carried from round to round.
    """

    def run(problems: Problems, sharpness: jax.Array, key: jax.Array) -> tuple:
        def step(log_step: jax.Array, key: jax.Array) -> tuple:
            estimate, acceptance, used = one_round(
                estimator, problems, sharpness, key, log_step
            )
            if estimator.kind in ADAPTED:
                log_step = sampling.adapt_step(
                    log_step, acceptance, leapfrogs=estimator.leapfrogs, rate=RATE
                )
            return log_step, (estimate, acceptance, jnp.exp(used))

        keys = jax.random.split(key, adapting + rounds)
        _, history = jax.lax.scan(step, jnp.log(jnp.full((), FIRST_STEP)), keys)
        return jax.tree.map(lambda x: x[adapting:], history)

    keys = jax.random.split(key, len(sharpness))
    values = jnp.asarray(sharpness, jnp.float32)
    compiled = jax.jit(jax.vmap(run, (None, 0, 0)), compiler_options=COMPILER)
    got = compiled(problems, values, keys)
    estimate, acceptance, step_size = (np.asarray(x, np.float64) for x in got)
    return estimate, acceptance, step_size


def relative_errors(estimate: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """RMSE and bias of estimates `[rounds, P, 2 D]`, relative to the norm of `truth`.

    The square of the mean error over rounds holds a share 1 / rounds of the variance,
    which is taken off again.
    """
    norm = np.mean(np.sum(truth**2, axis=-1))
    error = estimate - truth[None]
    mean_square = np.mean(np.sum(error**2, axis=-1))
    rounds = len(estimate)
    bias = np.mean(np.sum(error.mean(0) ** 2, axis=-1))
    variance = (mean_square - bias) * rounds / (rounds - 1)
    bias = max(bias - variance / rounds, 0.0)
    return float(np.sqrt(mean_square / norm)), float(np.sqrt(bias / norm))


def measure(settings: Settings) -> Iterator[Row]:
    """All rows, by dimension, sharpness and estimator."""
    for dimensions in (1, 2):
        key = jax.random.fold_in(jax.random.key(settings.seed), dimensions)
        problem_key, key = jax.random.split(key)
        problems = make_problems(problem_key, settings.problems, dimensions)
        truth = expected_scores(problems, settings.sharpness)
        runs = [
            estimates(
                estimator,
                problems,
                settings.sharpness,
                jax.random.fold_in(key, i),
                settings.adapting if estimator.kind in ADAPTED else 0,
                settings.rounds,
            )
            for i, estimator in enumerate(ESTIMATORS)
        ]
        for s, sharpness in enumerate(settings.sharpness):
            for estimator, run in zip(ESTIMATORS, runs, strict=True):
                estimate, acceptance, step_size = (x[s] for x in run)
                rmse, bias = relative_errors(estimate, truth[s])
                yield Row(
                    *estimator,
                    dimensions,
                    sharpness,
                    rmse,
                    bias,
                    float(acceptance.mean()),
                    float(step_size.mean()),
                    estimator.gradients,
                    estimator.pool + 2 * estimator.gradients,
                )


def table(rows: list[Row]) -> str:
    """Markdown, one line per estimator: `rmse (bias)` in each kind of problem."""
    cells = sorted({(row.dimensions, row.sharpness) for row in rows})
    head = ["estimator", "passes", *(f"{d}-D, {s:g}" for d, s in cells)]
    lines = [
        "Relative error of the policy gradient in one state, `rmse (bias)`, by "
        "dimension and sharpness of Q in nats; the price in forward passes per state.",
        "",
        "| " + " | ".join([*head, "acceptance"]) + " |",
        "|---|" + "---:|" * len(head),
    ]
    for estimator in ESTIMATORS:
        same = {(r.dimensions, r.sharpness): r for r in rows if r[:6] == estimator}
        accepted = [same[cell].acceptance for cell in cells]
        span = f"{min(accepted):.3f} to {max(accepted):.3f}" if estimator.chains else ""
        errors = [f"{same[c].rmse:.2f} ({same[c].bias:.2f})" for c in cells]
        passes = str(same[cells[0]].passes)
        lines.append("| " + " | ".join([estimator.label, passes, *errors, span]) + " |")
    return "\n".join(lines) + "\n"


def checked(settings: Settings) -> Settings:
    """The settings, or a `UsageError` that says which one cannot be."""
    least = {"problems": 1, "rounds": 2, "adapting": 0}
    for name, low in least.items():
        value = getattr(settings, name)
        if value < low:
            raise UsageError(f"--{name} is {value}: give {low} or more")
    if not settings.sharpness or not all(0.0 < s < np.inf for s in settings.sharpness):
        raise UsageError(
            f"--sharpness is {settings.sharpness}: give one or more numbers above 0"
        )
    return settings


def main(settings: Settings) -> None:
    """Writes the CSV and the table, and prints the table."""
    rows = list(measure(checked(settings)))
    settings.out.mkdir(parents=True, exist_ok=True)
    with (settings.out / "gradient_error.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row)
    text = table(rows)
    (settings.out / "gradient_error.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except OffrlError as error:
        raise SystemExit(f"gradient_error: {error}") from None
