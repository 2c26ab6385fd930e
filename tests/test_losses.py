"""Losses against numbers worked out by hand, with and without jit."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from offrl_jax import losses


class TdTargetTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        (1.0, 1.0, 10.0, 0.9, 10.0),
        (1.0, 0.0, 10.0, 0.9, 1.0),
        (-2.0, 1.0, -4.0, 0.5, -4.0),
    )
    def test_known(self, reward, discount, value, gamma, want):
        args = [jnp.float32(x) for x in (reward, discount, value, gamma)]
        got = self.variant(losses.td_target)(*args)
        np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_no_gradient_flows(self):
        grad = jax.grad(lambda v: losses.td_target(1.0, 1.0, v, 0.9))(2.0)
        assert grad == 0.0

    def test_refuses_batches(self):
        with pytest.raises(AssertionError):
            losses.td_target(jnp.ones(3), jnp.ones(3), jnp.ones(3), 0.9)


class SmoothedActionTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_known(self):
        action = jnp.array([0.0, 0.0, 0.9, -0.9, 0.2])
        noise = jnp.array([1.0, 5.0, 2.0, -2.0, -0.5])
        got = self.variant(losses.smoothed_action)(action, noise, 0.2, 0.5)
        # 0.2 * 5 = 1 is clipped to 0.5; 0.9 + 0.4 leaves the box.
        np.testing.assert_allclose(got, [0.2, 0.5, 1.0, -1.0, 0.1], rtol=1e-6)

    def test_no_noise_changes_nothing(self):
        action = jnp.array([0.3, -0.7])
        got = losses.smoothed_action(action, jnp.array([3.0, -3.0]), 0.0, 0.5)
        np.testing.assert_array_equal(got, action)


class ExpectileTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        (2.0, 0.7, 2.8), (-2.0, 0.7, 1.2), (3.0, 0.5, 4.5), (-3.0, 0.5, 4.5)
    )
    def test_known(self, difference, level, want):
        got = self.variant(losses.expectile)(
            jnp.float32(difference), jnp.float32(level)
        )
        np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_minimiser_is_the_expectile(self):
        """Of {0 w.p. 0.7, 1 w.p. 0.3} at level 0.7: 0.21 (1 - v) = 0.21 v."""
        q = jnp.array([0.0] * 7 + [1.0] * 3)

        def loss(v):
            return jnp.mean(jax.vmap(losses.expectile, (0, None))(q - v, 0.7))

        np.testing.assert_allclose(jax.grad(loss)(0.5), 0.0, atol=1e-7)
        assert jax.grad(loss)(0.4) < 0.0 < jax.grad(loss)(0.6)


class AwrWeightTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(
        (0.0, 3.0, 1.0),
        (np.log(2.0), 3.0, 8.0),
        (-np.log(2.0), 2.0, 0.25),
        (1e4, 3.0, 100.0),
        (5.0, 0.0, 1.0),
    )
    def test_known(self, advantage, beta, want):
        got = self.variant(losses.awr_weight)(
            jnp.float32(advantage), jnp.float32(beta), 100.0
        )
        np.testing.assert_allclose(got, want, rtol=1e-5)

    def test_no_gradient_flows_even_where_exp_overflows(self):
        for advantage in (0.3, 1e4):
            assert jax.grad(losses.awr_weight)(advantage, 3.0, 100.0) == 0.0


class DistanceTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_known(self):
        a, b = jnp.array([1.0, 0.0, -1.0]), jnp.array([0.0, 0.0, 1.0])
        np.testing.assert_allclose(
            self.variant(losses.mean_square)(a, b), 5 / 3, rtol=1e-6
        )
        np.testing.assert_allclose(
            self.variant(losses.sum_square)(a, b), 5.0, rtol=1e-6
        )

    def test_refuse_unequal_shapes(self):
        for distance in (losses.mean_square, losses.sum_square):
            with pytest.raises(AssertionError):
                distance(jnp.ones(3), jnp.ones(1))


class QScaleTest(parameterized.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.parameters(([1.0, -3.0], 2.5, 1.25), ([10.0, 10.0], 1.0, 0.1))
    def test_known(self, q, alpha, want):
        got = self.variant(losses.q_scale)(jnp.array(q), jnp.float32(alpha))
        np.testing.assert_allclose(got, want, rtol=1e-6)

    def test_no_gradient_flows(self):
        grad = jax.grad(losses.q_scale)(jnp.array([1.0, -3.0]), 2.5)
        np.testing.assert_array_equal(grad, [0.0, 0.0])

    def test_scaled_values_do_not_depend_on_the_rewards_unit(self):
        q = jnp.array([0.5, -2.0, 4.0])
        scaled = losses.q_scale(q, 2.5) * q
        np.testing.assert_allclose(
            losses.q_scale(1000.0 * q, 2.5) * 1000.0 * q, scaled, rtol=1e-5
        )

    def test_zero_values_give_a_finite_factor(self):
        np.testing.assert_allclose(losses.q_scale(jnp.zeros(4), 2.5), 2.5e6, rtol=1e-5)


if __name__ == "__main__":
    absltest.main()
