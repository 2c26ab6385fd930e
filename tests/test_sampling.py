"""Samplers on targets with known moments, and what the released one really accepts."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from jax.extend.core import jaxprs_in_params

from offrl_jax import sampling
from offrl_jax.errors import UsageError

PRECISION = np.array([[2.0, -1.2], [-1.2, 1.5]])
CENTRE = np.array([0.5, -1.0])


def correlated(x):
    away = x - jnp.asarray(CENTRE, jnp.float32)[None]
    return -0.5 * jnp.sum(away * (away @ jnp.asarray(PRECISION, jnp.float32)), axis=-1)


def bimodal(x):
    """Two bells on (-1, 1.5); the right wall cuts one of them."""
    left = -0.5 * jnp.square((x[:, 0] + 0.4) / 0.3)
    right = -0.5 * jnp.square((x[:, 0] - 1.1) / 0.4) + 0.3
    inside = (x[:, 0] > -1.0) & (x[:, 0] < 1.5)
    return jnp.where(inside, jnp.logaddexp(left, right), -jnp.inf)


def run_hmc(key, density, initial, step_size, **counts):
    counts = {"draws": 10, "burn_in": 50, "leapfrogs": 2} | counts

    def run(key, initial, step_size):
        return sampling.hmc(key, density, initial, step_size=step_size, **counts)

    return jax.jit(run)(key, initial, jnp.float32(step_size))


def assert_mean(rows, want, sigmas=4.5):
    """Mean over independent rows `[M, ...]` within its standard error."""
    rows = np.asarray(rows, np.float64)
    error = rows.std(0, ddof=1) / np.sqrt(len(rows))
    assert np.all(np.abs(rows.mean(0) - want) < sigmas * error), (
        rows.mean(0),
        want,
        error,
    )


def test_moments_of_a_correlated_gaussian():
    drawn = run_hmc(jax.random.key(0), correlated, jnp.zeros((4000, 2)), 0.5)
    x = np.asarray(drawn.positions, np.float64)
    assert x.shape == (10, 4000, 2) and drawn.positions.dtype == jnp.float32
    assert_mean(x.mean(0), CENTRE)
    away = x - CENTRE
    products = np.einsum("kmi,kmj->mij", away, away) / len(x)
    assert_mean(products, np.linalg.inv(PRECISION))


def test_moments_of_a_bimodal_truncated_density():
    drawn = run_hmc(jax.random.key(1), bimodal, jnp.zeros((4000, 1)), 0.3)
    x = np.asarray(drawn.positions[..., 0], np.float64)
    assert x.min() > -1.0 and x.max() < 1.5

    def density(v):
        left = np.exp(-0.5 * ((v + 0.4) / 0.3) ** 2)
        return left + np.exp(0.3 - 0.5 * ((v - 1.1) / 0.4) ** 2)

    def expected(f, low=-1.0):
        return scipy.integrate.quad(lambda v: f(v) * density(v), low, 1.5)[0] / total

    total = scipy.integrate.quad(density, -1.0, 1.5)[0]
    assert_mean(x.mean(0), expected(lambda v: v))
    assert_mean((x**2).mean(0), expected(lambda v: v**2))
    assert_mean((x > 0.3).mean(0), expected(lambda v: 1.0, low=0.3))


def trajectory(position, momentum, step_size, leapfrogs):
    value_and_grad = sampling._by_rows(correlated)
    start = sampling._Point(position, *value_and_grad(position))
    end, momentum = sampling._leapfrog(
        value_and_grad, start, momentum, jnp.float32(step_size), leapfrogs
    )
    return start, end, momentum


def random_phase(rows=256):
    keys = jax.random.split(jax.random.key(2))
    return jax.random.normal(keys[0], (rows, 2)), jax.random.normal(keys[1], (rows, 2))


def test_leapfrog_is_reversible():
    position, momentum = random_phase()
    _, end, reached = trajectory(position, momentum, 0.3, 7)
    assert np.min(np.abs(np.asarray(end.position - position)).max(1)) > 0.05
    _, back, reversed_momentum = trajectory(end.position, -reached, 0.3, 7)
    np.testing.assert_allclose(back.position, position, atol=2e-5)
    np.testing.assert_allclose(reversed_momentum, -momentum, atol=2e-5)


def test_energy_error_is_of_second_order():
    position, momentum = random_phase()

    def error(leapfrogs):
        start, end, reached = trajectory(position, momentum, 1.6 / leapfrogs, leapfrogs)
        kinetic = 0.5 * jnp.sum(jnp.square(momentum) - jnp.square(reached), axis=-1)
        gained = kinetic - start.log_density + end.log_density
        return float(jnp.sqrt(jnp.mean(jnp.square(gained))))

    assert 3.7 < error(8) / error(16) < 4.3
    assert 3.7 < error(16) / error(32) < 4.3


@pytest.mark.parametrize("leapfrogs", [1, 2, 5])
def test_largest_step_is_a_quarter_turn(leapfrogs):
    step = sampling.largest_step(leapfrogs)
    turn = np.array([[1.0 - step**2 / 2, step], [-step + step**3 / 4, 1 - step**2 / 2]])
    # Of the first position nothing is left after the trajectory.
    np.testing.assert_allclose(
        np.linalg.matrix_power(turn, leapfrogs)[0, 0], 0.0, atol=1e-12
    )


def count(jaxpr, name):
    """How often a primitive runs: occurrences times the lengths of scans around."""
    total = 0
    for equation in jaxpr.eqns:
        times = equation.params.get("length", 1)
        total += equation.primitive.name == name
        for inner in jaxprs_in_params(equation.params):
            total += times * count(inner, name)
    return total


@pytest.mark.parametrize("released", [False, True])
def test_a_transition_costs_its_leapfrogs_and_no_more(released):
    def density(x):
        return jnp.sum(jnp.sin(x), axis=-1)  # Value: one sin.  Gradient: one cos.

    def run(key, x):
        counts = {"draws": 7, "burn_in": 4, "leapfrogs": 3}
        if released:
            return sampling.hmc_released(key, density, x, **counts)
        return sampling.hmc(key, density, x, step_size=jnp.float32(0.1), **counts)

    jaxpr = jax.make_jaxpr(run)(jax.random.key(0), jnp.zeros((5, 2))).jaxpr
    assert count(jaxpr, "sin") == count(jaxpr, "cos") == 1 + 3 * (7 + 4)


@pytest.mark.parametrize("first", [1e-4, 1.4])
@pytest.mark.parametrize("leapfrogs", [1, 2])
def test_the_step_adapts_from_both_sides(first, leapfrogs):
    mean = jax.random.normal(jax.random.key(3), (64, 3))
    slopes = 6.0 * jax.random.normal(jax.random.key(4), (64, 3))

    def q_of(action):
        return jnp.sum(slopes * action - 4.0 * jnp.square(action), axis=-1)

    target = sampling.whitened(q_of, mean, jnp.zeros((64, 3)))

    def update(log_step, key):
        start_key, key = jax.random.split(key)
        drawn = sampling.hmc(
            key,
            target.log_density,
            jax.random.normal(start_key, (64, 3)),
            step_size=jnp.exp(log_step),
            draws=5,
            burn_in=5,
            leapfrogs=leapfrogs,
        )
        following = sampling.adapt_step(
            log_step, drawn.acceptance, leapfrogs=leapfrogs, rate=0.5
        )
        return following, (drawn.acceptance, drawn.moved, log_step)

    keys = jax.random.split(jax.random.key(5), 250)
    run = jax.jit(lambda x: jax.lax.scan(update, x, keys))
    last, (acceptance, moved, steps) = run(jnp.log(jnp.float32(first)))
    assert last.dtype == jnp.float32
    settled = np.asarray(acceptance)[-50:]
    assert settled.min() > 0.6 and settled.max() < 0.9
    assert abs(settled.mean() - 0.8) < 0.01
    # 50 x 10 x 64 accepted or not: at most half a per cent of noise in their share.
    assert abs(np.mean(moved[-50:]) - settled.mean()) < 4.5 * 0.5 / np.sqrt(32_000)
    # The same step size, wherever it came from.
    assert abs(float(steps[-1]) - np.log(0.4)) < 1.0


def test_adaptation_by_hand_and_its_bounds():
    got = sampling.adapt_step(
        jnp.float32(-1.0), jnp.float32(0.6), leapfrogs=2, target=0.8, rate=0.5
    )
    np.testing.assert_allclose(got, -1.1, rtol=1e-6)
    low = sampling.adapt_step(jnp.float32(-9.2), jnp.float32(0.0), leapfrogs=1)
    np.testing.assert_allclose(jnp.exp(low), 1e-4, rtol=1e-5)
    # A quarter turn in one leapfrog has cos = 1 - step^2 / 2 = 0.
    high = sampling.adapt_step(jnp.float32(0.34), jnp.float32(1.0), leapfrogs=1)
    np.testing.assert_allclose(jnp.exp(high), np.sqrt(2.0), rtol=1e-5)


def test_densities_that_are_not_finite_are_rejected_row_by_row():
    def density(x):
        x = x[:, 0]
        plain = -0.5 * jnp.square(x)
        beyond = [0.0, jnp.nan, jnp.inf, -jnp.inf]
        rows = [
            plain[i] + jnp.where(x[i] > 1.0, value, 0.0)
            for i, value in enumerate(beyond)
        ]
        # One without any density, and one whose gradient does not exist at the start.
        return jnp.stack(
            [*rows, plain[4] + jnp.nan, plain[5] + jnp.sqrt(jnp.abs(x[5]))]
        )

    drawn = run_hmc(
        jax.random.key(6), density, jnp.zeros((6, 1)), 0.7, draws=300, burn_in=0
    )
    x = np.asarray(drawn.positions[..., 0])
    assert np.isfinite(x).all() and np.isfinite(float(drawn.acceptance))
    assert x[:, 0].max() > 1.0
    assert (x[:, 1:4].max(0) <= 1.0).all() and (x[:, 1:4].std(0) > 0.3).all()
    assert (x[:, 4:] == 0.0).all()
    alone = run_hmc(
        jax.random.key(6),
        lambda v: -0.5 * jnp.square(v[:, 0]),
        jnp.zeros((6, 1)),
        0.7,
        draws=300,
        burn_in=0,
    )
    np.testing.assert_allclose(x[:, 0], alone.positions[:, 0, 0], rtol=1e-5)


@pytest.mark.parametrize("released", [False, True])
def test_vmap_over_members_equals_one_by_one(released):
    counts = {"draws": 4, "burn_in": 5, "leapfrogs": 2}
    keys = jax.random.split(jax.random.key(7), 3)
    steps = jnp.array([0.1, 0.4, 0.9])
    means = jax.random.normal(jax.random.key(8), (3, 64, 1))
    slope = jnp.array([0.5, 1.0, 2.0])

    def run(key, step, mean, slope):
        def q_of(action):
            return slope * jnp.sum(jnp.sin(3.0 * action), axis=-1)

        log_std = jnp.zeros_like(mean)
        if released:
            density = sampling.raw(q_of, mean, log_std)
            start = 0.5 * jnp.tanh(mean)
            drawn, step = sampling.hmc_released(key, density, start, **counts)
            return drawn, step
        target = sampling.whitened(q_of, mean, log_std)
        start = jnp.zeros_like(mean)
        drawn = sampling.hmc(key, target.log_density, start, step_size=step, **counts)
        return drawn, step

    together = jax.jit(jax.vmap(run))(keys, steps, means, slope)
    compiled = jax.jit(run)
    alone = [compiled(*one) for one in zip(keys, steps, means, slope, strict=True)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    assert jax.tree.all(jax.tree.map(lambda x: x.dtype == jnp.float32, together))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5),
        together,
        stacked,
    )
    assert float(together[0].moved.min()) > 0.0


def test_draws_and_weights_carry_no_gradient():
    def drawn(slope):
        result = sampling.hmc(
            jax.random.key(0),
            lambda x: jnp.sum(slope * x - jnp.square(x), axis=-1),
            jnp.full((8, 2), slope),
            step_size=0.3 * slope,
            draws=3,
            burn_in=1,
            leapfrogs=2,
        )
        weights = sampling.self_normalised_weights(slope * result.positions[..., 0])
        return sum(jnp.sum(x) for x in (*result, jnp.square(weights)))

    assert float(jax.grad(drawn)(jnp.float32(1.0))) == 0.0


@pytest.mark.parametrize(
    "counts, says",
    [
        ({"draws": 0}, "'draws' is 0; choose 1 or more"),
        ({"burn_in": -1}, "'burn_in' is -1; choose 0 or more"),
        ({"leapfrogs": 0}, "'leapfrogs' is 0; choose 1 or more"),
    ],
)
def test_counts_are_checked(counts, says):
    counts = {"draws": 1, "burn_in": 0, "leapfrogs": 1} | counts
    start, key = jnp.zeros((1, 2)), jax.random.key(0)
    with pytest.raises(UsageError, match=says):
        sampling.hmc(key, correlated, start, step_size=jnp.float32(1.0), **counts)
    with pytest.raises(UsageError, match=says):
        sampling.hmc_released(key, correlated, start, **counts)


@pytest.mark.parametrize(
    "accepting, burn_in, power",
    [(10, 5, 4), (8, 5, 4), (7, 5, -4), (0, 5, -4), (9, 0, 0)],
)
def test_the_released_step_follows_the_mean_acceptance_of_all_chains(
    accepting, burn_in, power
):
    """Flat rows always accept, NaN rows never; the threshold is 0.75."""

    def density(x):
        flat = 0.0 * x[:, 0]
        return jnp.where(jnp.arange(10) < accepting, flat, jnp.nan)

    drawn, step = sampling.hmc_released(
        jax.random.key(0),
        density,
        jnp.zeros((10, 1)),
        draws=6,
        burn_in=burn_in,
        leapfrogs=2,
    )
    np.testing.assert_allclose(step, 1.01**power, rtol=1e-6)
    np.testing.assert_allclose(drawn.acceptance, accepting / 10, rtol=1e-6)


def test_the_released_sampler_moves_as_tfp_does():
    """TFP itself, where the target lets it move at all: a wide policy in 1-D."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorflow_probability.substrates import jax as tfp
    mean = 0.5 * jax.random.normal(jax.random.key(1), (2000, 1))
    noise = jax.random.normal(jax.random.key(2), (2000, 1))
    log_std = jnp.zeros_like(mean)

    def q_of(action):
        return action[:, 0]

    target = sampling.raw(q_of, mean, log_std)
    data = jnp.tanh(mean + noise)
    counts = {"draws": 50, "burn_in": 5, "leapfrogs": 2}
    drawn, step = jax.jit(
        lambda key, data: sampling.hmc_released(key, target, data, **counts)
    )(jax.random.key(3), data)

    @jax.jit
    def theirs(seed, data):
        mcmc = tfp.mcmc
        kernel = mcmc.HamiltonianMonteCarlo(
            target, step_size=sampling.RELEASED_FIRST_STEP, num_leapfrog_steps=2
        )
        kernel = mcmc.SimpleStepSizeAdaptation(kernel, num_adaptation_steps=4)
        return mcmc.sample_chain(
            50,
            data,
            kernel=kernel,
            num_burnin_steps=5,
            trace_fn=lambda _, results: results.new_step_size,
            seed=seed,
        )

    with (
        warnings.catch_warnings(),
        jax.numpy_rank_promotion("allow"),
        jax.numpy_dtype_promotion("standard"),
    ):
        warnings.simplefilter("ignore")
        positions, steps = theirs(jax.random.PRNGKey(4), data)
    np.testing.assert_allclose(step, steps[-1], rtol=1e-5)

    def moves(positions):
        return np.mean(np.diff(np.asarray(positions[..., 0]), axis=0) != 0.0, axis=0)

    ours, reference = moves(drawn.positions), moves(positions)
    assert ours.shape == reference.shape == (2000,)
    assert reference.mean() > 0.05
    error = np.sqrt((ours.var(ddof=1) + reference.var(ddof=1)) / 2000)
    assert abs(ours.mean() - reference.mean()) < 4.5 * error


@pytest.mark.parametrize("dimensions", [3, 6])
def test_what_the_released_sampler_really_accepts(dimensions):
    """Below 0.3 % on linear Q; where the same chains, whitened, accept four in five.

    55 transitions of two leapfrogs, from actions of the policy itself, the kindest of
    data.  The draws are those actions, repeated.
    """
    rows = 1024
    keys = jax.random.split(jax.random.key(9), 4)
    mean = 0.5 * jax.random.normal(keys[0], (rows, dimensions))
    direction = jax.random.normal(keys[1], (rows, dimensions))
    direction /= jnp.linalg.norm(direction, axis=1, keepdims=True)
    noise = jax.random.normal(keys[2], (rows, dimensions))

    @jax.jit
    def run(std, slope):
        def q_of(action):
            return slope * jnp.sum(direction * action, axis=-1)

        log_std = jnp.broadcast_to(jnp.log(std), mean.shape)
        target = sampling.whitened(q_of, mean, log_std)
        data = jnp.clip(target.action(noise), -0.999, 0.999)
        drawn, _ = sampling.hmc_released(
            keys[3],
            sampling.raw(q_of, mean, log_std),
            data,
            draws=50,
            burn_in=5,
            leapfrogs=2,
        )
        stayed = jnp.all(drawn.positions == data[None], axis=(0, 2))
        return drawn.acceptance, jnp.mean(stayed)

    for std in (0.1, 0.3, 1.0):
        for slope in (1.0, 5.0, 20.0):
            acceptance, stayed = run(jnp.float32(std), jnp.float32(slope))
            assert acceptance < 0.003
            assert stayed > 0.85
            if std < 1.0:
                assert acceptance < 1e-4 and stayed > 0.99


def test_weights_are_the_softmax_of_each_state():
    q = np.array([[1.0, 900.0], [2.0, 901.0], [-3.0, 0.0]])
    want = np.exp(q - q.max(0)) / np.exp(q - q.max(0)).sum(0)
    got = sampling.self_normalised_weights(jnp.asarray(q, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_resampling_chooses_in_proportion_to_the_weights():
    q = np.array([[0.0, 2.0], [1.0, -1.0], [2.0, 0.0]])
    positions = jnp.arange(12.0).reshape(3, 2, 2)
    got = sampling.resampled(
        jax.random.key(0), jnp.asarray(q, jnp.float32), positions, 20_000
    )
    assert got.shape == (20_000, 2, 2)
    shares = np.exp(q) / np.exp(q).sum(0)
    for state in range(2):
        for k in range(3):
            hits = np.all(
                np.asarray(got[:, state]) == np.asarray(positions[k, state]), axis=1
            )
            assert_mean(hits, shares[k, state])
