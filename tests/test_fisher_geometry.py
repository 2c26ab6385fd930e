"""FiDec's geometry against closed forms, quadrature and dense matrices."""

from __future__ import annotations

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scripts

from offrl_jax import decorator, flows
from offrl_jax.errors import UsageError

geometry = scripts.load("fidec/geometry")

MEAN = np.array([0.2, -0.1])
COVARIANCE = np.array([[0.09, 0.03], [0.03, 0.02]])
FISHER = np.linalg.inv(COVARIANCE)
GRADIENT = np.array([0.4, 1.0])


def some(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def dense(scores: np.ndarray, delta: np.ndarray, damping: float, trace: str) -> float:
    """With A x A matrices, normalised before they are used."""
    width = delta.shape[1]
    fisher = np.einsum("bmi,bmj->bij", scores, scores) / scores.shape[1]
    fisher = fisher + damping * np.eye(width)
    if trace == "none":
        return 0.5 * np.einsum("bi,bij,bj->b", delta, fisher, delta).mean()
    size = np.trace(fisher, axis1=1, axis2=2) / width
    if trace == "batch":
        size = np.full_like(size, size.mean())
    normalised = fisher / size[:, None, None]
    return np.einsum("bi,bij,bj->b", delta, normalised, delta).mean() / width


@pytest.mark.parametrize("trace", decorator.TRACES)
@pytest.mark.parametrize("shape", [(5, 1, 3), (4, 8, 2), (3, 2, 6)])
def test_matrix_free_equals_dense(shape, trace):
    scores, delta = 3.0 * some(*shape), some(shape[0], shape[2], seed=1)
    got = decorator.fisher_quadratic(
        jnp.float32(scores), jnp.float32(delta), 0.07, trace
    )
    assert float(got) == pytest.approx(dense(scores, delta, 0.07, trace), rel=1e-5)


@pytest.mark.parametrize("trace", ["state", "batch"])
def test_isotropic_fisher_is_deflow(trace):
    """Scores along an orthogonal basis, of one length per state (per batch)."""
    basis = np.linalg.qr(some(3, 3))[0]
    length = np.array([0.5, 4.0, 9.0] if trace == "state" else [2.0, 2.0, 2.0])
    scores = length[:, None, None] * basis[None]
    delta = some(3, 3, seed=2)
    got = decorator.fisher_quadratic(
        jnp.float32(scores), jnp.float32(delta), 0.3, trace
    )
    want = decorator.isotropic_quadratic(jnp.float32(delta))
    assert float(want) == pytest.approx((delta**2).mean(), rel=1e-6)
    assert float(got) == pytest.approx(float(want), rel=1e-5)


def test_one_dimension_is_deflow():
    scores, delta = 5.0 * some(6, 4, 1), some(6, 1, seed=3)
    got = decorator.fisher_quadratic(jnp.float32(scores), jnp.float32(delta), 1e-3)
    assert float(got) == pytest.approx((delta**2).mean(), rel=1e-5)


def test_directions_outside_of_few_scores_are_nearly_free():
    """M = 2 scores in 5 dimensions: what is orthogonal to both costs only damping."""
    scores = some(1, 2, 5)
    delta = np.linalg.svd(scores[0])[2][-1][None]
    size = (scores**2).sum(-1).mean() + 5 * 1e-3
    got = decorator.fisher_quadratic(jnp.float32(scores), jnp.float32(delta), 1e-3)
    assert float(got) == pytest.approx(1e-3 / size, rel=1e-2)


def test_unknown_trace_is_refused():
    with pytest.raises(ValueError, match="trace is 'stat'"):
        decorator.fisher_quadratic(jnp.ones((1, 1, 1)), jnp.ones((1, 1)), 0.1, "stat")


# The learned residual.


def exact_scores(points: np.ndarray) -> np.ndarray:
    """Scores of N(MEAN, COVARIANCE) at `[M, 2]`, through the flow's own formula: the
    limit t -> 1 of `flows.score`, by the closed-form velocity just before it."""
    t = 0.999
    blurred = (1 - t) ** 2 * np.eye(2) + t**2 * COVARIANCE
    gain = (t * COVARIANCE - (1 - t) * np.eye(2)) @ np.linalg.inv(blurred)
    velocity = MEAN + (points - t * MEAN) @ gain.T
    at = jnp.full(len(points), t)
    with jax.enable_x64(True):
        args = jnp.asarray(velocity), jnp.asarray(points), at.astype(jnp.float64)
        return np.asarray(flows.score(*args))


def sigma_points() -> np.ndarray:
    """Four points with the mean and covariance of the Gaussian, `[4, 2]`."""
    offsets = np.sqrt(2.0) * np.linalg.cholesky(COVARIANCE).T
    return MEAN + np.concatenate([offsets, -offsets])


def learned(penalty, multiplier: float, rate: float, calls: int = 800) -> np.ndarray:
    """Gradient descent on `multiplier * penalty(delta) - GRADIENT . delta`."""
    slope = jnp.float32(GRADIENT)

    def loss(delta):
        return multiplier * penalty(delta) - jnp.sum(slope * delta)

    @jax.jit
    def descend(delta):
        return jax.lax.fori_loop(
            0, calls, lambda _, d: d - rate * jax.grad(loss)(d), delta
        )

    return np.asarray(descend(jnp.zeros(2)))


def test_learned_residual_is_the_closed_form():
    """delta = I^-1 grad Q / lambda in nats, and (tr I / 2 lambda) I^-1 grad Q with the
    trace; the isotropic one is parallel to the gradient instead."""
    scores = jnp.float32(exact_scores(sigma_points()))[None]
    in_nats = learned(
        lambda d: decorator.fisher_quadratic(scores, d[None], 1e-6, "none"),
        multiplier=3.0,
        rate=1.0 / (3.0 * np.linalg.eigvalsh(FISHER)[1]),
    )
    np.testing.assert_allclose(in_nats, COVARIANCE @ GRADIENT / 3.0, rtol=0.01)
    with_trace = learned(
        lambda d: decorator.fisher_quadratic(scores, d[None], 1e-6),
        multiplier=3.0,
        rate=1.0 / 6.0,
    )
    closed_form = np.trace(FISHER) / 6.0 * COVARIANCE @ GRADIENT
    np.testing.assert_allclose(with_trace, closed_form, rtol=0.01)
    isotropic = learned(
        lambda d: decorator.isotropic_quadratic(d[None]), multiplier=3.0, rate=0.1
    )
    # lambda |delta|^2 / 2 - w . delta
    np.testing.assert_allclose(isotropic, GRADIENT / 3.0, rtol=1e-3)
    cosine = isotropic @ closed_form
    cosine /= np.linalg.norm(isotropic) * np.linalg.norm(closed_form)
    assert cosine < 0.8, "the example must tell the two apart"


def test_one_score_per_state():
    """M = 1, as at the base action.  Normalised over the batch it is the Fisher form;
    by its own trace, E g g^T / |g|^2, in two dimensions the root of it: eigenvalues in
    the ratio of the standard deviations and not of the variances."""
    angle = 2 * np.pi * (np.arange(1000) + 0.5) / 1000
    root = np.linalg.cholesky(COVARIANCE)
    u = np.sqrt(2.0) * np.stack([np.cos(angle), np.sin(angle)])
    scores = jnp.float32(exact_scores(MEAN + (root @ u).T))[:, None]

    def penalty(trace):
        def of(delta):
            every = jnp.broadcast_to(delta[None], (1000, 2))
            return decorator.fisher_quadratic(scores, every, 1e-6, trace)

        return of

    whole = learned(penalty("batch"), multiplier=3.0, rate=1.0 / 6.0)
    closed_form = np.trace(FISHER) / 6.0 * COVARIANCE @ GRADIENT
    np.testing.assert_allclose(whole, closed_form, rtol=0.01)
    own = learned(penalty("state"), multiplier=3.0, rate=1.0 / 6.0)
    values, vectors = np.linalg.eigh(COVARIANCE)
    root = vectors * np.sqrt(values) @ vectors.T
    want = np.trace(np.linalg.inv(root)) / 6.0 * root @ GRADIENT
    np.testing.assert_allclose(own, want, rtol=0.01)


# Second-order KL.


def quadrature(points: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights of N(MEAN, COVARIANCE), `[N, 2]` and `[N]`."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    u = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), -1).reshape(-1, 2)
    weight = np.outer(weights, weights).ravel() / (2 * np.pi)
    return MEAN + u @ np.linalg.cholesky(COVARIANCE).T, weight


def log_density(a: np.ndarray) -> np.ndarray:
    return -0.5 * ((a - MEAN) @ FISHER * (a - MEAN)).sum(-1)


def bent(a):
    """A displacement with divergence, shear and curvature."""
    x, y = a[..., :1], a[..., 1:]
    lib = np if isinstance(a, np.ndarray) else jnp
    return lib.concatenate([0.2 * x + 0.1 * y, 0.05 + 0.1 * lib.sin(3 * y)], -1)


def true_kl(size: float) -> float:
    """E [log p(a) - log det T' - log p(T a)], T' by central differences."""
    a, weight = quadrature()
    h = 1e-5
    columns = [
        (bent(a + h * e[None]) - bent(a - h * e[None])) / (2 * h) for e in np.eye(2)
    ]
    volume = np.linalg.det(np.eye(2) + size * np.stack(columns, -1))
    assert volume.min() > 0
    change = log_density(a) - np.log(volume) - log_density(a + size * bent(a))
    return float(weight @ change)


def second_order(size: float) -> tuple[float, float]:
    a, weight = quadrature()
    inverse = jnp.float32(FISHER)

    def score(a):
        return -(a - jnp.float32(MEAN)[None]) @ inverse

    both = decorator.second_order_kl(score, lambda a: size * bent(a), jnp.float32(a))
    return tuple(float(weight @ np.asarray(x, np.float64)) for x in both)


def test_second_order_kl_of_a_varying_displacement():
    """The error is of third order: halving the size halves the relative error.  FiDec's
    form, without the divergence, stays wrong by a factor."""
    sizes = np.array([0.1, 0.2, 0.4])
    true = np.array([true_kl(size) for size in sizes])
    exact, lacking = np.array([second_order(size) for size in sizes]).T
    error = np.abs(exact / true - 1)
    assert error[0] < 0.05
    slopes = np.diff(np.log(error)) / np.log(2)
    np.testing.assert_allclose(slopes, 1.0, atol=0.3)
    assert (lacking / true > 1.2).all() or (lacking / true < 0.8).all()


@pytest.mark.parametrize("dims", [1, 2, 5])
def test_scaling_costs_less_than_fidec_says(dims):
    """delta = c (a - mean) on a standard normal: KL = A c^2 to second order; without
    divergence A (A + 2) c^2 / 2, which is 1 + A / 2 times as much."""
    size = 0.01
    a = jax.random.normal(jax.random.key(0), (200_000, dims))
    full, lacking = decorator.second_order_kl(lambda a: -a, lambda a: size * a, a)
    true = dims * (0.5 * ((1 + size) ** 2 - 1) - np.log1p(size))
    assert float(jnp.mean(full)) == pytest.approx(dims * size**2, rel=0.03)
    assert float(jnp.mean(full)) == pytest.approx(true, rel=0.04)
    ratio = float(jnp.mean(lacking)) / float(jnp.mean(full))
    assert ratio == pytest.approx(1 + dims / 2, rel=0.03)


def test_constant_displacement_of_two_modes():
    """The divergence is 0, so both forms agree and are right to second order; the
    Fisher form exceeds the true KL where the displacement is as wide as a mode."""
    grid = np.linspace(-4, 4, 16_001)
    step = grid[1] - grid[0]
    std = 0.2

    def density(a):
        return (
            np.exp(-0.5 * ((a + 0.6) / std) ** 2)
            + np.exp(-0.5 * ((a - 0.6) / std) ** 2)
        ) / (2 * std * np.sqrt(2 * np.pi))

    def score(a):
        near = jax.nn.sigmoid(2 * 0.6 * a / std**2)
        return (0.6 * (2 * near - 1) - a) / std**2

    p = density(grid)
    points = jnp.float32(grid[:, None])
    ratios = []
    for size in (0.005, 0.02, 0.4):
        q = density(grid - size)
        inside = q > 1e-290
        true = (q[inside] * np.log(q[inside] / density(grid[inside]))).sum() * step
        full, lacking = decorator.second_order_kl(
            score, lambda a, size=size: jnp.full_like(a, size), points
        )
        np.testing.assert_array_equal(full, lacking)
        ratios.append((p * np.asarray(full, np.float64)).sum() * step / true)
    assert ratios[0] == pytest.approx(1.0, abs=0.01)
    assert ratios[1] == pytest.approx(1.0, abs=0.01)
    assert abs(ratios[2] - 1) > 0.02


# The multiplier, the clip and the search at test time.


def test_multiplier_rises_above_the_budget_and_moves_nothing_else():
    log, penalty = jnp.asarray(0.3), jnp.asarray(0.5)
    for budget, want in ((0.2, -0.3), (0.9, 0.4)):
        by_log, by_penalty = jax.grad(decorator.multiplier_loss, (0, 1))(
            log, penalty, budget
        )
        assert float(by_log) == pytest.approx(want, rel=1e-6)
        assert float(by_penalty) == 0.0


def test_clip_together():
    grads = {"a": jnp.float32([3.0, 0.0]), "b": (jnp.float32(-4.0),)}
    clipped, norm = decorator.clip_together(grads, 1.0)
    assert float(norm) == 5.0
    np.testing.assert_allclose(clipped["a"], [0.6, 0.0], rtol=1e-5)
    np.testing.assert_allclose(clipped["b"][0], -0.8, rtol=1e-5)
    for limit in (6.0, jnp.inf):
        kept, _ = decorator.clip_together(grads, limit)
        np.testing.assert_array_equal(kept["a"], grads["a"])


def test_displaced_and_refined():
    """Steps of 0.3 from -0.9, and values that prefer 0.05: -0.6 -0.3 0 0.3; a second
    row at the bound stays there."""
    start = jnp.float32([[-0.9], [0.95]])

    def up(a):
        return jnp.full_like(a, 0.3)

    def value(a):
        return -jnp.abs(a[:, 0] - 0.05)

    np.testing.assert_allclose(decorator.displaced(up, start), [[-0.6], [1.0]])
    for count, want in ((1, -0.6), (2, -0.3), (3, 0.0), (4, 0.0)):
        got = decorator.refined(up, value, start, count)
        np.testing.assert_allclose(got, [[want], [1.0]], atol=1e-6)


# The figure's numbers.


def test_figure_and_tables(tmp_path):
    settings = geometry.Settings(out=tmp_path / "deep" / "down", dpi=40)
    geometry.main(settings)
    assert (settings.out / "geometry.png").stat().st_size > 10_000
    with (settings.out / "estimators.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["name"] for row in rows} >= {"true Fisher", "isotropic (deflow)"}
    assert all(0 < float(row["efficiency"]) <= 1 + 1e-9 for row in rows)
    with (settings.out / "kl.csv").open(newline="") as stream:
        kl = list(csv.DictReader(stream))
    assert len(kl) == 3 * len(settings.sizes)
    for row in kl:
        if row["displacement"] == "constant":
            assert float(row["true"]) == pytest.approx(0.5 * float(row["size"]) ** 2)


def test_matrices_of_the_figure_by_sampling():
    """Scores and velocities drawn, through the library's formulas."""
    rng, rows, t = np.random.default_rng(1), 200_000, 0.8
    action = rng.multivariate_normal(geometry.MEAN, geometry.COVARIANCE, size=rows)
    x = t * action + (1 - t) * rng.normal(size=(rows, 2))
    blurred = (1 - t) ** 2 * np.eye(2) + t**2 * geometry.COVARIANCE
    gain = (t * geometry.COVARIANCE - (1 - t) * np.eye(2)) @ np.linalg.inv(blurred)

    def velocity(points):
        return jnp.float32(geometry.MEAN + (points - t * geometry.MEAN) @ gain.T)

    def second_moment(g):
        g = np.asarray(g, np.float64)
        return g.T @ g / rows

    at = jnp.full(rows, t)
    there = flows.score(velocity(action), jnp.float32(action), at)
    directions = there / jnp.linalg.norm(there, axis=1, keepdims=True)
    renoised = flows.score(velocity(x), jnp.float32(x), at)
    for got, want in (
        (renoised, geometry.exact_at_renoised(t)),
        (there, geometry.exact_at_base(t)),
        (directions, geometry.directions_at_base(t)),
        (flows.scaled_velocity(velocity(x), at), geometry.velocity_at_renoised(t)),
    ):
        scale = np.abs(want).max()
        np.testing.assert_allclose(second_moment(got), want, atol=0.02 * scale)


@pytest.mark.parametrize("name", ["scaling", "sliding"])
def test_kl_of_the_figure_by_another_route(name):
    """Jacobians by differences; scaling in closed form, 2 (c + c^2 / 2 - ln(1 + c))."""
    u, size = some(50, 2, seed=5), 0.3
    move = geometry.displacements(size)[name]
    delta, jacobian = move(u)
    h = 1e-6
    for j, e in enumerate(np.eye(2)):
        difference = (move(u + h * e[None])[0] - move(u - h * e[None])[0]) / (2 * h)
        np.testing.assert_allclose(jacobian[:, :, j], difference, atol=1e-6)
    if name == "scaling":
        want = 2 * (size + size**2 / 2 - np.log1p(size))
        assert geometry.divergences(name, size).true == pytest.approx(want, rel=1e-6)
    else:
        np.testing.assert_allclose(
            np.linalg.norm(u + delta, axis=1), np.linalg.norm(u, axis=1), rtol=1e-9
        )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"budget": 0.0}, "--budget is 0.0: give a number above 0"),
        ({"sizes": (0.1, -1.0)}, r"--sizes has \[-1.0\]"),
        ({"sizes": ()}, "give one or more numbers"),
        ({"sizes": (9.0,)}, "folds the plane"),
    ],
)
def test_bad_settings(tmp_path, changes, message):
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=message):
        geometry.main(geometry.Settings(out=out, **changes))
    assert not out.exists()
