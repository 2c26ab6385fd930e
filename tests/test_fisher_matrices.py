"""Scores, Fisher matrices and products: independent routes that must agree."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from offrl_jax import distributions, fisher

N, INPUTS, ACTIONS = 6, 3, 2


def start(outputs: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "first": 0.8 * jax.random.normal(keys[0], (INPUTS, 4)),
        "second": 0.8 * jax.random.normal(keys[1], (4, outputs)),
        "shift": 0.3 * jax.random.normal(keys[2], (outputs,)),
    }


X = jax.random.normal(jax.random.key(9), (N, INPUTS))


def outputs(params, x):
    out = jnp.tanh(x @ params["first"]) @ params["second"]
    return out + jnp.broadcast_to(params["shift"], out.shape)


def gaussian(params, x):
    mean, log_std = jnp.split(outputs(params, x), 2)
    return mean, 0.5 * log_std


def gaussian_log_prob(params, x, a):
    return jnp.sum(distributions.normal_log_prob(*gaussian(params, x), a))


def gaussian_sample(key, params, x):
    mean, log_std = gaussian(params, x)
    return mean + jnp.exp(log_std) * jax.random.normal(key, mean.shape)


def categorical_log_prob(params, x, a):
    return jnp.sum(jax.nn.log_softmax(outputs(params, x)) * a)


def categorical_sample(key, params, x):
    logits = outputs(params, x)
    return jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1])


class Model:
    """A family with everything about it, so that each test is written once."""

    def __init__(self, name: str) -> None:
        self.name = name
        categorical = name == "categorical"
        self.params = start(3 if categorical else 2 * ACTIONS)
        self.log_prob = categorical_log_prob if categorical else gaussian_log_prob
        self.sample = categorical_sample if categorical else gaussian_sample
        self.flat, self.unravel = ravel_pytree(self.params)

    def exact(self, params=None):
        params = self.params if params is None else params
        if self.name == "categorical":
            return fisher.categorical_fisher(outputs, params, X)
        return fisher.gaussian_fisher(gaussian, params, X)

    def divergence(self, params, forward=True):
        """Mean KL from (or to) the model at `self.params`."""
        if self.name == "categorical":
            pair = outputs(self.params, X), outputs(params, X)
            return jnp.mean(fisher.categorical_kl(*(pair if forward else pair[::-1])))
        both = jax.vmap(gaussian, (None, 0))
        pair = both(self.params, X), both(params, X)
        first, second = pair if forward else pair[::-1]
        return jnp.mean(fisher.gaussian_kl(*first, *second))


@pytest.fixture(scope="module", params=["categorical", "gaussian"])
def model(request) -> Model:
    return Model(request.param)


def close(got, want, tolerance=1e-4):
    want = np.asarray(want)
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


# Scores.


def test_scores_are_gradients_of_each_sample(model):
    keys = jax.random.split(jax.random.key(1), N)
    y = jax.vmap(model.sample, (0, None, 0))(keys, model.params, X)
    scores = fisher.per_sample_scores(model.log_prob, model.params, X, y)
    rows = fisher.flatten_scores(scores)
    assert rows.shape == (N, model.flat.size)
    for i in (0, N - 1):
        want = jax.grad(model.log_prob)(model.params, X[i], y[i])
        close(rows[i], ravel_pytree(want)[0], 1e-5)


def test_mean_score_is_zero_and_its_covariance_is_fisher(model):
    """At four standard errors; the trace of F is the mean squared score."""
    count = 20_000
    keys = jax.random.split(jax.random.key(2), count)
    a = jax.vmap(model.sample, (0, None, None))(keys, model.params, X[0])
    x = jnp.broadcast_to(X[0], (count, INPUTS))
    scores = fisher.per_sample_scores(model.log_prob, model.params, x, a)
    rows = np.asarray(fisher.flatten_scores(scores), np.float64)
    error = rows.std(0) / np.sqrt(count)
    assert (np.abs(rows.mean(0)) <= 4 * error + 1e-7).all()
    # An action that is not the model's has no such score.
    wrong = fisher.per_sample_scores(model.log_prob, model.params, x, 0.5 + a)
    wrong = np.asarray(fisher.flatten_scores(wrong), np.float64)
    assert (np.abs(wrong.mean(0)) > 10 * error + 1e-7).any()


def test_pseudo_likelihood_score():
    """Against the gradient of the Gaussian's log density, its sample held fixed."""
    params = start(ACTIONS)
    noise = jnp.float32([0.7, -1.3])
    got = fisher.pseudo_likelihood_score(
        lambda p: outputs(p, X[0]), params, noise, std=0.2
    )
    action = outputs(params, X[0]) + 0.2 * noise
    log_std = jnp.full(ACTIONS, jnp.log(0.2))

    def log_prob(p):
        mean = outputs(p, X[0])
        return jnp.sum(distributions.normal_log_prob(mean, log_std, action))

    close(ravel_pytree(got)[0], ravel_pytree(jax.grad(log_prob)(params))[0], 1e-4)


def test_squashing_does_not_change_the_score():
    """The slope of tanh does not depend on the parameters, for a fixed action."""
    params, before = start(2 * ACTIONS), jnp.float32([0.7, -1.4])

    def squashed(p):
        return distributions.tanh_normal_log_prob(*gaussian(p, X[0]), before)

    want = jax.grad(gaussian_log_prob)(params, X[0], before)
    close(ravel_pytree(jax.grad(squashed)(params))[0], ravel_pytree(want)[0], 1e-5)


# Matrices.


def test_exact_equals_the_hessian_of_kl(model):
    def kl(vector, forward):
        return model.divergence(model.unravel(vector), forward)

    want = model.exact()
    for forward in (True, False):
        close(jax.hessian(kl)(model.flat, forward), want, 2e-4)


def test_exact_equals_minus_the_expected_hessian():
    model = Model("categorical")
    weight = jax.nn.softmax(outputs(model.params, X))

    def hessian(x, a):
        return jax.hessian(lambda v: model.log_prob(model.unravel(v), x, a))(model.flat)

    each = jax.vmap(jax.vmap(hessian, (None, 0)), (0, None))(X, jnp.eye(3))
    expected = jnp.einsum("na,nacd->cd", weight, each) / N
    close(-expected, model.exact(), 1e-4)


def test_gaussian_equals_minus_the_expected_hessian():
    """By Gauss-Hermite quadrature, exact for the quadratic in the sample."""
    model = Model("gaussian")
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    grid = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, ACTIONS)
    weight = np.outer(weights, weights).ravel() / (2 * np.pi)

    def hessian(x, noise):
        mean, log_std = gaussian(model.params, x)
        a = mean + jnp.exp(log_std) * noise
        return jax.hessian(lambda v: model.log_prob(model.unravel(v), x, a))(model.flat)

    each = jax.vmap(jax.vmap(hessian, (None, 0)), (0, None))(X, jnp.float32(grid))
    expected = jnp.einsum("g,ngcd->cd", jnp.float32(weight), each) / N
    close(-expected, model.exact(), 2e-4)


def test_enumeration_equals_the_output_space():
    model = Model("categorical")
    want = fisher.output_space_fisher(
        outputs, fisher.categorical_output_fisher, model.params, X
    )
    close(model.exact(), want, 1e-5)
    p = np.asarray(jax.nn.softmax(outputs(model.params, X[0])))
    got = fisher.categorical_output_fisher(outputs(model.params, X[0]))
    close(got, np.diag(p) - np.outer(p, p), 1e-5)


def test_gaussian_by_hand():
    """Without a network: F = 1 / sigma^2 for the mean, 2 for the log deviation."""
    params = jnp.float32([0.4, np.log(0.5)])
    got = fisher.gaussian_fisher(lambda p, x: (p[:1], p[1:]), params, jnp.zeros((1, 1)))
    np.testing.assert_allclose(got, np.diag([4.0, 2.0]), rtol=1e-5)


def test_invariants(model):
    exact = np.asarray(model.exact(), np.float64)
    np.testing.assert_allclose(exact, exact.T, atol=1e-6)
    values = fisher.spectrum(exact)
    assert values[0] > 0 and values[-1] > -1e-5 * values[0]
    # At most one direction per output of each sample; softmax has one less.
    width = 2 if model.name == "categorical" else 2 * ACTIONS
    assert (values > 1e-5 * values[0]).sum() <= min(model.flat.size, N * width)
    few = fisher.spectrum(
        fisher.second_moment(jax.random.normal(jax.random.key(0), (3, 9)))
    )
    assert (few > 1e-5 * few[0]).sum() == 3
    energies = [fisher.top_energy(exact, k) for k in range(1, model.flat.size + 1)]
    assert 0 < energies[0] < 1 and np.all(np.diff(energies) >= -1e-6)
    assert energies[-1] == pytest.approx(1.0)
    assert energies[0] == pytest.approx(values[0] / np.trace(exact), rel=1e-5)


def test_monte_carlo_converges_at_the_root(model):
    """Unbiased: 64 times the samples, an eighth of the error; the trace is the mean
    squared score."""
    exact = np.asarray(model.exact(), np.float64)

    @functools.partial(jax.jit, static_argnums=1)
    def error(key, samples):
        got = fisher.monte_carlo_fisher(
            key, model.sample, model.log_prob, model.params, X, samples
        )
        return jnp.linalg.norm(got - jnp.float32(exact)) / np.linalg.norm(exact)

    keys = jax.random.split(jax.random.key(3), 6)
    small, large = (
        np.mean([error(key, samples) for key in keys]) for samples in (20, 1280)
    )
    assert large < 0.05
    assert small / large == pytest.approx(8.0, rel=0.4)


def test_empirical_is_not_the_fisher_matrix():
    """It has the data's actions; here they all are the mean, and it misses a term."""
    model = Model("gaussian")
    mean, _ = jax.vmap(gaussian, (None, 0))(model.params, X)
    got = fisher.empirical_fisher(model.log_prob, model.params, X, mean)

    def by_hand(x, a):
        score = ravel_pytree(jax.grad(model.log_prob)(model.params, x, a))[0]
        return score[:, None] * score[None, :]

    close(got, jnp.mean(jax.vmap(by_hand)(X, mean), axis=0), 1e-5)
    exact = model.exact()
    assert jnp.linalg.norm(got - exact) > 0.3 * jnp.linalg.norm(exact)


# Products.


def test_products_are_those_of_the_matrix(model):
    vector = jax.random.normal(jax.random.key(4), model.flat.shape)
    want = model.exact() @ vector
    got = fisher.fisher_vector_product(
        model.divergence, model.params, model.unravel(vector)
    )
    close(ravel_pytree(got)[0], want, 3e-4)
    if model.name == "categorical":
        batch = lambda p: outputs(p, X)  # noqa: E731
        product = fisher.categorical_output_product
    else:
        batch = lambda p: jax.vmap(gaussian, (None, 0))(p, X)  # noqa: E731
        product = fisher.gaussian_output_product
    got = fisher.gauss_newton_product(
        batch, product, model.params, model.unravel(vector)
    )
    close(ravel_pytree(got)[0], want, 1e-4)


def test_conjugate_gradient_on_products_is_the_damped_solve(model):
    g = jax.grad(lambda p: jnp.mean(jnp.square(outputs(p, X))))(model.params)
    damping = 0.1

    def product(v):
        return fisher.fisher_vector_product(model.divergence, model.params, v)

    got, _ = jax.jit(
        lambda g: fisher.conjugate_gradient(product, g, model.flat.size, damping)
    )(g)
    want = fisher.dense_direction(model.exact(), g, damping)
    close(ravel_pytree(got)[0], ravel_pytree(want)[0], 2e-3)


# The natural gradient itself.


def test_reparameterisation():
    """theta = A phi: undamped natural steps describe the same model, Euclidean ones do
    not, damped ones nearly."""
    key = jax.random.key(5)
    theta = jnp.float32([0.3, -0.2, 0.5])
    change = jnp.eye(3) + 0.5 * jax.random.normal(key, (3, 3))
    x = jax.random.normal(jax.random.key(6), (40, 3))

    def logits(t, row):
        return jnp.stack([jnp.dot(row, t), jnp.zeros(())])

    def changed(phi, row):
        return logits(change @ phi, row)

    def loss(t):
        return jnp.mean(jnp.square(jax.nn.sigmoid(x @ t) - 0.9))

    phi = jnp.linalg.solve(change, theta)
    fisher_theta = fisher.categorical_fisher(logits, theta, x)
    fisher_phi = fisher.categorical_fisher(changed, phi, x)
    close(fisher_phi, change.T @ fisher_theta @ change, 1e-4)
    g_theta = jax.grad(loss)(theta)
    g_phi = jax.grad(lambda p: loss(change @ p))(phi)
    steps = {}
    for damping in (0.0, 1e-3):
        natural = fisher.dense_direction(fisher_theta, g_theta, damping)
        mapped = change @ fisher.dense_direction(fisher_phi, g_phi, damping)
        steps[damping] = float(
            jnp.linalg.norm(mapped - natural) / jnp.linalg.norm(natural)
        )
    assert steps[0.0] < 1e-3
    assert steps[0.0] < steps[1e-3] < 0.1
    euclidean = jnp.linalg.norm(change @ g_phi - g_theta) / jnp.linalg.norm(g_theta)
    assert euclidean > 0.3


def test_predicted_kl_is_measured_for_small_steps(model):
    g = jax.grad(lambda p: jnp.mean(jnp.square(outputs(p, X))))(model.params)
    d = fisher.dense_direction(model.exact(), g, 0.1)
    form = ravel_pytree(d)[0] @ model.exact() @ ravel_pytree(d)[0]
    errors = []
    for kl in (2e-4, 0.3):
        rate = fisher.trust_region_rate(kl, 1e9, form)
        predicted, measured = fisher.kl_of_step(model.divergence, model.params, d, rate)
        assert float(predicted) == pytest.approx(kl, rel=2e-3)
        errors.append(abs(float(measured) / kl - 1))
    assert errors[0] < 0.1
    assert errors[1] > errors[0]


def test_cosines(model):
    g = jax.grad(lambda p: jnp.mean(jnp.square(outputs(p, X))))(model.params)
    assert float(fisher.cosine(g, g)) == pytest.approx(1.0, abs=1e-5)
    minus = jax.tree.map(lambda x: -3.0 * x, g)
    assert float(fisher.cosine(g, minus)) == pytest.approx(-1.0, abs=1e-5)
    assert float(fisher.cosine(g, jax.tree.map(jnp.zeros_like, g))) == 0.0
    natural = fisher.dense_direction(model.exact(), g, 0.1)
    exact = model.exact()
    got = fisher.cosine_to_natural(natural, exact, g, 0.1)
    assert got == pytest.approx(1.0, abs=1e-4)
    plain = fisher.cosine_to_natural(g, exact, g, 0.1)
    assert plain == pytest.approx(float(fisher.cosine(g, natural)), abs=1e-3)
    assert plain < 0.99
