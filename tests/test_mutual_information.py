"""Bounds of mutual information on correlated Gaussians, by quadrature.

S is standard normal and A = rho S + sqrt(1 - rho^2) noise in every dimension, so that
I(S; A) = -1/2 sum log(1 - rho^2).  Expectations over s and a are Gauss-Hermite sums;
their weights enter the library's means as logarithms beside T, with a normaliser of 1:
what is evaluated is the library's code, without any sampling error.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats

from offrl_jax import mutual_information as mi
from offrl_jax.errors import UsageError

LOG_2PI = np.log(2 * np.pi)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def _hermite(nodes):
    """Nodes and log weights of a standard normal's expectation."""
    x, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return x, np.log(weights) - 0.5 * LOG_2PI


class Gaussians:
    """The data's and a policy's Gaussian action per state, on product grids.

    The policy is Normal(slope * s, std^2) in each dimension, unlike the data's.
    """

    def __init__(self, rhos, slope=None, std=None, nodes=None):
        self.rho = np.array(rhos)
        self.true_std = np.sqrt(1 - self.rho**2)
        self.slope = self.rho if slope is None else np.array(slope)
        self.std = self.true_std if std is None else np.array(std)
        self.dim = len(rhos)
        # Squares of a Gaussian ratio converge geometrically in the number of nodes.
        x, log_w = _hermite(nodes or {1: 90, 2: 18}[self.dim])
        points = np.array(list(itertools.product(x, repeat=self.dim)))
        self.log_w = np.array(list(itertools.product(log_w, repeat=self.dim))).sum(1)
        self.s = points  # [n, dim]
        shape = (len(points), len(points), self.dim)
        self.s_grid = np.broadcast_to(points[:, None], shape)
        self.a_data = self.rho * self.s_grid + self.true_std * points[None]
        self.a_policy = self.slope * self.s_grid + self.std * points[None]
        self.mutual_information = -0.5 * np.log(1 - self.rho**2).sum()
        self.action_entropy = 0.5 * self.dim * (LOG_2PI + 1)

    def log_policy(self, s, a):
        return scipy.stats.norm.logpdf(a, self.slope * s, self.std).sum(-1)

    def log_data(self, s, a):
        return scipy.stats.norm.logpdf(a, self.rho * s, self.true_std).sum(-1)

    def optimal(self, s, a):
        return 1 + self.log_data(s, a) - self.log_policy(s, a)

    def mean(self, values):
        """`E_D` of `[n, n]` values at `s_grid`, `a_data`."""
        w = np.exp(self.log_w)
        return w @ values @ w

    def bounds(self, critic):
        """`mi.Bounds` at population level, through the library's functions."""
        log_policy = self.mean(self.log_policy(self.s_grid, self.a_data))
        ba = float(mi.ba_bound(jnp.array([log_policy]), self.action_entropy))
        t_data = critic(self.s_grid, self.a_data)
        t_policy = critic(self.s_grid, self.a_policy)
        mean_t = jnp.array([self.mean(t_data)])
        log_w = self.log_w[:, None] + self.log_w[None, :]
        flat = jnp.array((t_policy + log_w).reshape(-1, 1))
        # The mean over samples in f divides by their number.
        f = mi.nwj_gain(mean_t, flat + jnp.log(flat.size * 1.0), largest=500.0)
        dv = mi.donsker_varadhan_gain(mean_t, flat, normaliser=1.0)
        # MISA is a mean over states: one call per state, weighted outside.
        w = np.exp(self.log_w)
        per_state = jax.vmap(
            lambda t, samples: mi.misa_gain(t[None], samples[:, None], 1.0)
        )(jnp.array(t_data @ w), jnp.array(t_policy + self.log_w[None, :]))
        misa = w @ np.asarray(per_state)
        gains = (0.0, float(f), float(dv), misa)
        return mi.Bounds(*(jnp.asarray(ba + gain) for gain in gains))


def _problems():
    """Imperfect policies, wide enough for the moments of p / pi that are needed."""
    for rho in (0.0, 0.3, 0.7, 0.95):
        true_std = np.sqrt(1 - rho**2)
        yield Gaussians([rho], [0.8 * rho], [1.2 * true_std])
    yield Gaussians([0.6, -0.4], [0.5, -0.2], [0.9, 1.0])


def _critics(problem):
    """Critics by name: around the optimum, off it, and random smooth ones."""
    best = problem.optimal
    rng = np.random.default_rng(3)
    critics = {
        "optimal": best,
        "half": lambda s, a: 0.5 * best(s, a),
        "scaled": lambda s, a: 1.2 * best(s, a),
        "shifted up": lambda s, a: best(s, a) + 3.0,
        "shifted down": lambda s, a: best(s, a) - 3.0,
        "state's own": lambda s, a: best(s, a) + np.sin(2 * s).sum(-1),
        "zero": lambda s, a: np.zeros(s.shape[:-1]),
    }
    for number in range(3):
        u, v = rng.normal(size=(2, 5, problem.dim))
        height, phase = rng.normal(size=5), rng.uniform(0, 6, size=5)
        critics[f"random {number}"] = lambda s, a, u=u, v=v, h=height, p=phase: (
            np.sin(s @ u.T + a @ v.T + p) @ h
        )
    return critics


PROBLEMS = list(_problems())
IDS = [",".join(f"{r:g}" for r in p.rho) for p in PROBLEMS]


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
def test_order_of_the_bounds(float64, problem):
    for name, critic in _critics(problem).items():
        got = problem.bounds(critic)
        assert got.f <= got.dv + 1e-9, name
        assert got.dv <= got.misa + 1e-9, name
        assert got.misa <= problem.mutual_information + 1e-7, name
        if name == "optimal":
            # 2-D: 18 nodes per axis resolve the ratio to about 1e-6.
            np.testing.assert_allclose(
                got[1:], problem.mutual_information, atol=1e-5, err_msg=name
            )
            kl = problem.mutual_information - got.ba
            assert kl > (1e-3 if problem.rho.any() else 1e-2)
        if name == "zero":
            np.testing.assert_allclose(
                np.array(got) - got.ba, [0, -np.exp(-1), 0, 0], atol=1e-10
            )
        if name == "shifted up":  # f <= BA away from the optimum: T matters.
            assert got.f < got.ba < got.dv
        if name == "state's own":
            assert got.dv < got.misa - 0.01


def test_ba_is_the_true_information_of_a_perfect_policy(float64):
    for rhos in ([0.0], [0.5], [0.99], [0.3, 0.8]):
        problem = Gaussians(rhos)
        got = problem.bounds(problem.optimal)
        np.testing.assert_allclose(got, problem.mutual_information, atol=1e-9)


def test_ba_by_its_closed_form(float64):
    problem = PROBLEMS[2]
    rho, slope, std = problem.rho[0], problem.slope[0], problem.std[0]
    # E (a - slope s)^2 = 1 - 2 slope rho + slope^2.
    square = 1 - 2 * slope * rho + slope**2
    log_policy = -0.5 * LOG_2PI - np.log(std) - 0.5 * square / std**2
    got = problem.bounds(problem.optimal).ba
    np.testing.assert_allclose(got, log_policy + 0.5 * (LOG_2PI + 1), atol=1e-10)


def test_population_values_against_scipy(float64):
    """The same expectations by adaptive quadrature, with no common code."""
    problem = PROBLEMS[1]

    def critic(s, a):
        return 0.4 * a * s - 0.2 * a**2 + 0.3 * np.sin(s) + 0.4

    rho, std = problem.rho[0], problem.true_std[0]
    slope, wide = problem.slope[0], problem.std[0]
    pdf = scipy.stats.norm.pdf

    def over_actions(s, function, mean, scale):
        low, high = mean - 9 * scale, mean + 9 * scale
        return scipy.integrate.quad(
            lambda a: pdf(a, mean, scale) * function(critic(s, a)), low, high
        )[0]

    def over_states(function):
        return scipy.integrate.quad(lambda s: pdf(s) * function(s), -8, 8)[0]

    mean_t = over_states(lambda s: over_actions(s, lambda t: t, rho * s, std))
    exp_t = over_states(lambda s: over_actions(s, np.exp, slope * s, wide))
    log_t = over_states(lambda s: np.log(over_actions(s, np.exp, slope * s, wide)))
    want = np.array([0, mean_t - exp_t / np.e, mean_t - np.log(exp_t), mean_t - log_t])
    got = np.array(problem.bounds(lambda s, a: critic(s[..., 0], a[..., 0])))
    np.testing.assert_allclose(got - got[0], want, atol=1e-7)


@pytest.mark.parametrize("problem", PROBLEMS[2:], ids=IDS[2:])
def test_invariances(float64, problem):
    critic = _critics(problem)["random 0"]
    plain = problem.bounds(critic)
    constant = problem.bounds(lambda s, a: critic(s, a) + 2.0)
    by_state = problem.bounds(lambda s, a: critic(s, a) + np.cos(3 * s).sum(-1))
    np.testing.assert_allclose(constant.dv, plain.dv, atol=1e-10)
    np.testing.assert_allclose(constant.misa, plain.misa, atol=1e-10)
    np.testing.assert_allclose(by_state.misa, plain.misa, atol=1e-10)
    assert abs(by_state.dv - plain.dv) > 1e-3
    assert abs(constant.f - plain.f) > 1e-2 and abs(by_state.f - plain.f) > 1e-3


def _expected_misa(problem, critic, samples, positive):
    """`E` of the library's MISA bound from `samples` (1 or 2) draws, by quadrature."""
    w = np.exp(problem.log_w)
    t_data = critic(problem.s_grid, problem.a_data)
    t_policy = critic(problem.s_grid, problem.a_policy)
    n = len(w)
    # Axes: state, data action, then one per sample.
    shape = (n, n) + (n,) * samples
    data = np.broadcast_to(t_data.reshape((n, n) + (1,) * samples), shape)
    drawn = [
        np.broadcast_to(
            t_policy.reshape((n, 1, *(n if k == i else 1 for i in range(samples)))),
            shape,
        )
        for k in range(samples)
    ]
    t_d = jnp.array(data.reshape(-1))
    t_p = jnp.array(np.stack([d.reshape(-1) for d in drawn]))
    if positive:
        t_p = mi.with_positive(t_d, t_p)
    values = np.asarray(t_d - mi.log_mean_exp(t_p)).reshape(shape)
    for _ in range(samples + 2):
        values = values @ w
    return problem.bounds(critic).ba + float(values)


def test_few_samples_bias_the_bound_upwards(float64):
    problem = Gaussians([0.9], [0.7], [0.6], nodes=40)
    critic, true = problem.optimal, problem.mutual_information
    exact = problem.bounds(critic).misa
    np.testing.assert_allclose(exact, true, atol=1e-6)
    one = _expected_misa(problem, critic, 1, positive=False)
    two = _expected_misa(problem, critic, 2, positive=False)
    assert one > two > true + 0.02  # No lower bound any more.
    # K = 1 has no logarithm: the gain is KL(p || pi) + KL(pi || p) in closed form.
    p, q = problem.true_std[0], problem.std[0]
    moved = (problem.rho[0] - problem.slope[0]) ** 2  # E_s of the squared shift
    both = 0.5 * ((p**2 + moved) / q**2 + (q**2 + moved) / p**2 - 2)
    ba = problem.bounds(critic).ba
    np.testing.assert_allclose(one - ba, both, atol=1e-8)
    # With the data's action among the samples it is a lower bound for every K.
    with_one = _expected_misa(problem, critic, 1, positive=True)
    with_two = _expected_misa(problem, critic, 2, positive=True)
    assert with_one < with_two < true
    for number in range(3):
        other = _critics(problem)[f"random {number}"]
        assert _expected_misa(problem, other, 1, True) < true
    # More samples, by Monte Carlo: the bias is about Var exp(T) / 2K.
    found = {}
    for count in (10, 50):
        rng = np.random.default_rng(0)
        states, rounds = 4_000, 5
        estimates = {False: [], True: []}
        for _ in range(rounds):
            s = rng.normal(size=(states, 1))
            a = problem.rho * s + problem.true_std * rng.normal(size=s.shape)
            many = rng.normal(size=(count, states, 1))
            t_d = critic(s, a)
            t_p = critic(s[None], problem.slope * s[None] + problem.std * many)
            for positive in (False, True):
                terms = jnp.array(t_p)
                if positive:
                    terms = mi.with_positive(jnp.array(t_d), terms)
                estimates[positive].extend(
                    np.asarray(jnp.array(t_d) - mi.log_mean_exp(terms))
                )
        for positive, values in estimates.items():
            error = np.std(values) / np.sqrt(len(values))
            found[count, positive] = (ba + np.mean(values), error)
    (ten, e_ten), (fifty, e_fifty) = found[10, False], found[50, False]
    assert two > ten + 4 * e_ten
    assert ten > true + 4 * e_ten
    assert ten > fifty + 2 * (e_ten + e_fifty)
    for count in (10, 50):
        value, error = found[count, True]
        assert with_two < value < true + 2 * error
        assert value < found[count, False][0]


@pytest.mark.parametrize("samples", [1, 10, 50])
def test_with_the_positive_no_gain_exceeds_log_of_k_plus_1(float64, samples):
    limit = np.log(samples + 1)
    rng = np.random.default_rng(1)
    t_data = jnp.array(rng.normal(size=64))
    for scale in (1.0, 30.0, 1e4):
        low = jnp.array(rng.normal(size=(samples, 64))) - scale
        terms = mi.with_positive(t_data, low)
        assert terms.shape == (samples + 1, 64)
        gains = [
            mi.misa_gain(t_data, terms),
            mi.donsker_varadhan_gain(t_data, terms),
            mi.nwj_gain(t_data, terms),
        ]
        assert all(gain <= limit + 1e-12 for gain in gains)
        # Without it nothing holds the gain.
        if scale > 1.0:
            assert mi.misa_gain(t_data, low) > limit
    # Reached, when the data's action takes all: MISA by any T, the others by their own.
    np.testing.assert_allclose(gains[0], limit, atol=1e-9)
    level = jnp.full(64, 1.0 + limit)
    best = mi.with_positive(level, jnp.full((samples, 64), -1e4))
    for gain in (mi.misa_gain, mi.donsker_varadhan_gain, mi.nwj_gain):
        np.testing.assert_allclose(gain(level, best), limit, atol=1e-9)


def test_values_by_hand(float64):
    t_data = np.array([0.5, -1.0])
    t_policy = np.array([[0.1, 0.4], [-0.3, 2.0], [1.2, -0.7]])
    e = np.exp(t_policy)
    gains = [
        t_data.mean() - np.exp(t_policy - 1).sum() / 6,
        t_data.mean() - np.log(e.sum() / 6),
        t_data.mean() - 0.5 * (np.log(e[:, 0].sum() / 3) + np.log(e[:, 1].sum() / 3)),
    ]
    log_policy = np.array([-1.5, -0.7])
    got = mi.bounds(jnp.array(log_policy), 1.9, jnp.array(t_data), jnp.array(t_policy))
    np.testing.assert_allclose(got, np.array([0, *gains]) + 1.9 - 1.1, rtol=1e-12)


def test_a_normaliser_is_a_constant(float64):
    """The authors' code divides 50 samples by its batch size."""
    rng = np.random.default_rng(2)
    t_data, t_policy = (
        jnp.array(rng.normal(size=8)),
        jnp.array(rng.normal(size=(50, 8))),
    )
    for gain in (mi.misa_gain, mi.donsker_varadhan_gain):
        own, theirs = gain(t_data, t_policy), gain(t_data, t_policy, 256.0)
        np.testing.assert_allclose(theirs - own, np.log(256 / 50), rtol=1e-12)
        np.testing.assert_allclose(gain(t_data, t_policy, 50), own, rtol=1e-12)
        grads = [
            jax.grad(lambda t, n=n, gain=gain: gain(t_data, t, n))(t_policy)
            for n in (None, 256.0)
        ]
        np.testing.assert_array_equal(*grads)


def _loss(gain, positive):
    def loss(t_data, t_policy):
        if positive:
            t_policy = mi.with_positive(t_data, t_policy)
        return gain(t_data, t_policy)

    return loss


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(
    "gain",
    [mi.nwj_gain, mi.donsker_varadhan_gain, mi.misa_gain],
    ids=["f", "dv", "misa"],
)
def test_gradients_against_finite_differences(float64, gain, positive):
    rng = np.random.default_rng(4)
    t_data, t_policy = rng.normal(size=3), rng.normal(size=(4, 3))
    t_policy[0, 0] = 3.0
    if gain is mi.nwj_gain:
        gain = partial(gain, largest=2.0)  # The 3 lies on the tangent.
    loss = jax.jit(_loss(gain, positive))
    found = jax.grad(loss, argnums=(0, 1))(jnp.array(t_data), jnp.array(t_policy))
    step = 1e-5
    for number, values in enumerate((t_data, t_policy)):
        for index in np.ndindex(values.shape):
            ends = []
            for sign in (1, -1):
                moved = [t_data.copy(), t_policy.copy()]
                moved[number][index] += sign * step
                ends.append(float(loss(jnp.array(moved[0]), jnp.array(moved[1]))))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(
                found[number][index], slope, rtol=1e-6, atol=1e-9
            )


def test_the_tangent_of_f(float64):
    """Exact below, a line above, and the gain too large by what is stated."""
    t_data = jnp.zeros(2)
    below = jnp.array([[19.0, 20.0]])
    exact = -np.exp(np.array([18.0, 19.0])).mean()
    np.testing.assert_allclose(mi.nwj_gain(t_data, below), exact, rtol=1e-12)
    above = jnp.array([[3.0, 22.0]])
    tangent = np.exp(19.0) * (1 + 22 - 20)
    got = mi.nwj_gain(t_data, above)
    np.testing.assert_allclose(got, -(np.exp(2.0) + tangent) / 2, rtol=1e-12)
    true = -np.exp(np.array([2.0, 21.0])).mean()
    np.testing.assert_allclose(got - true, (np.exp(21.0) - tangent) / 2, rtol=1e-12)
    wider = mi.nwj_gain(t_data, above, largest=30.0)
    np.testing.assert_allclose(wider, true, rtol=1e-12)


@pytest.mark.parametrize("bound", mi.BOUNDS)
def test_gradient_of_each_gain_in_the_policy(float64, bound):
    """Over finitely many actions, where the expectations under pi and p* are sums."""
    rng = np.random.default_rng(12)
    t, logits = (
        jnp.asarray(rng.normal(size=(5, 4))),
        jnp.asarray(rng.normal(size=(5, 4))),
    )
    t_data = t[0]

    def exact_gain(logits):
        # As many equal samples as actions: their probabilities go into T.
        log_pi = jax.nn.log_softmax(logits, axis=0)
        weighted = t + log_pi + jnp.log(5.0)
        return mi.gain(bound, t_data, weighted)

    log_pi = jax.nn.log_softmax(logits, axis=0)
    log_z = jax.nn.logsumexp(t + log_pi, axis=0)
    improved = jnp.exp(t + log_pi - log_z[None])
    # sum_a p*(a) grad log pi(a) with respect to the logits is p* - pi.
    want = -mi.state_weight(bound, log_z)[None] * (improved - jnp.exp(log_pi)) / 4.0
    np.testing.assert_allclose(
        jax.grad(exact_gain)(logits), want, rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("function", [mi.gain, mi.state_weight])
def test_an_unknown_bound_is_refused_by_name(function):
    values = (jnp.zeros(3), jnp.zeros((2, 3)))[: 2 if function is mi.gain else 1]
    with pytest.raises(UsageError, match="bound 'nwj'"):
        function("nwj", *values)


@pytest.mark.parametrize("gain", [mi.nwj_gain, mi.donsker_varadhan_gain, mi.misa_gain])
def test_finite_in_float32_at_any_critic(gain):
    t_data = jnp.array([1e4, -1e4, 0.0], jnp.float32)
    t_policy = jnp.array([[1e4, -1e4, 300.0], [2e4, -3e4, -300.0]], jnp.float32)
    value, grads = jax.value_and_grad(gain, argnums=(0, 1))(t_data, t_policy)
    assert value.dtype == jnp.float32 and np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)
    # A critic that is far too high on the policy's actions is pulled down.
    assert grads[1][1, 0] < 0


def test_a_batch_of_another_shape_is_refused():
    t_data, t_policy = jnp.zeros(3), jnp.zeros((3, 4))
    for call in (
        mi.nwj_gain,
        mi.donsker_varadhan_gain,
        mi.misa_gain,
        mi.with_positive,
        lambda t, samples: mi.misa_gain(samples, t),
        lambda t, samples: mi.bounds(jnp.zeros(2), 0.0, t, jnp.zeros((2, 3))),
    ):
        with pytest.raises(AssertionError):
            call(t_data, t_policy)
