"""Fisher preconditioners as optax transformations."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from offrl_jax import fisher

PARAMS = {
    "Dense_0": {"bias": jnp.zeros(3), "kernel": jnp.zeros((2, 3))},
    "log_std": {"free": jnp.zeros(4)},
}


def draw(seed: int, *leading: int):
    leaves, structure = jax.tree.flatten(PARAMS)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(
        [
            jax.random.normal(k, leading + x.shape)
            for k, x in zip(keys, leaves, strict=True)
        ]
    )


G, V = draw(1), draw(2)
SCORES = draw(3, 5)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.asarray(x, float).ravel() for x in jax.tree.leaves(tree)])


def rows(tree) -> np.ndarray:
    leaves = [np.asarray(x, float) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def once(transform, g=G, score=V, **extra):
    return transform.update(g, transform.init(g), None, score=score, **extra)


def close(got, want, rtol=1e-4):
    np.testing.assert_allclose(flat(got), want, rtol=rtol, atol=1e-5)


# What is emitted.


@pytest.mark.parametrize("damping", [0.1, 3.0])
def test_both_conventions(damping):
    v, g = flat(V), flat(G)
    raw = np.linalg.solve(damping * np.eye(v.size) + np.outer(v, v), g)
    emitted, _ = once(fisher.scale_by_rank1_fisher(damping, deflate=False))
    close(emitted, raw)
    emitted, _ = once(fisher.scale_by_rank1_fisher(damping))
    close(emitted, damping * raw)
    vs = rows(SCORES)
    raw = np.linalg.solve(damping * np.eye(v.size) + vs.T @ vs / 5, g)
    for deflate, want in ((False, raw), (True, damping * raw)):
        transform = fisher.scale_by_woodbury_fisher(damping, deflate=deflate)
        close(once(transform, score=SCORES)[0], want)


def test_infinite_damping_is_gradient_descent():
    for transform, score in (
        (fisher.scale_by_rank1_fisher(1e9), V),
        (fisher.scale_by_woodbury_fisher(1e9), SCORES),
    ):
        close(once(transform, score=score)[0], flat(G), rtol=1e-6)


def test_sign_of_the_gradient_does_not_matter():
    plus, _ = once(fisher.scale_by_rank1_fisher(0.2))
    minus, _ = once(fisher.scale_by_rank1_fisher(0.2), jax.tree.map(jnp.negative, G))
    close(minus, -flat(plus), rtol=1e-6)


@pytest.mark.parametrize("blockwise, per", [(True, "layer"), ("leaf", "leaf")])
def test_blockwise(blockwise, per):
    got, state = once(
        fisher.scale_by_rank1_fisher(0.3, blockwise=blockwise, deflate=False)
    )
    close(got, flat(fisher.blockwise_rank1_direction(V, G, 0.3, per)))
    assert state.damping.shape == ({"layer": 2, "leaf": 3}[per],)
    got, _ = once(
        fisher.scale_by_woodbury_fisher(0.3, blockwise=blockwise, deflate=False),
        score=SCORES,
    )
    close(got, flat(fisher.blockwise_woodbury_direction(SCORES, G, 0.3, per)))
    # Blocks damped relative to their own scores.
    _, state = once(
        fisher.scale_by_rank1_fisher(0.5, blockwise=blockwise, relative=True)
    )
    if per == "layer":
        own = [fisher.norm2(V["Dense_0"]), fisher.norm2(V["log_std"])]
        np.testing.assert_allclose(state.damping, 0.5 * np.array(own), rtol=1e-5)


def test_relative_damping_follows_the_scores():
    """Bias-corrected: exact from the first update on, a weighted mean later."""
    decay, transform = 0.8, fisher.scale_by_rank1_fisher(0.1, relative=True, decay=0.8)
    state, sizes = transform.init(G), []
    for step in range(4):
        v = jax.tree.map(lambda x, step=step: (step + 1.0) * x, V)
        emitted, state = transform.update(G, state, None, score=v)
        sizes.append(flat(v) @ flat(v))
        weights = decay ** np.arange(step, -1, -1)
        want = 0.1 * (weights @ sizes) / weights.sum()
        np.testing.assert_allclose(state.damping, [want], rtol=1e-5)
        close(emitted, flat(fisher.rank1_deflation(v, G, want)))
    # Scaling all scores changes nothing: the sizes of v and damping cancel.
    transform = fisher.scale_by_rank1_fisher(0.1, relative=True)
    scaled = jax.tree.map(lambda x: 30.0 * x, V)
    close(once(transform, score=scaled)[0], flat(once(transform)[0]))
    # The mean over k, not the sum.
    transform = fisher.scale_by_woodbury_fisher(0.1, relative=True)
    _, state = once(transform, score=SCORES)
    want = 0.1 * np.square(rows(SCORES)).sum(1).mean()
    np.testing.assert_allclose(state.damping, [want], rtol=1e-5)


def test_zeros_stay_finite():
    zeros = jax.tree.map(jnp.zeros_like, G)
    many = jax.tree.map(jnp.zeros_like, SCORES)
    for relative in (False, True):
        for kl in (None, 0.01):
            one = fisher.scale_by_rank1_fisher(0.1, relative=relative, kl=kl)
            some = fisher.scale_by_woodbury_fisher(0.1, relative=relative, kl=kl)
            for transform, score in ((one, zeros), (some, many)):
                for g in (zeros, G):
                    for tree in once(transform, g, score):
                        assert np.isfinite(flat(tree)).all()


# Diagnostics.


def test_diagnostics_by_hand():
    v, g, damping = flat(V), flat(G), 0.4
    matrix = damping * np.eye(v.size) + np.outer(v, v)
    for deflate in (True, False):
        u, state = once(fisher.scale_by_rank1_fisher(damping, deflate=deflate))
        got = fisher.diagnostics(state)
        assert got["count"] == 1
        assert got["step"] == 1
        want = (v @ g) ** 2 / (v @ v) / (g @ g)
        assert float(got["cos2"]) == pytest.approx(want, rel=1e-4)
        want = (v @ g) ** 2 / (damping + v @ v) / (g @ g)
        assert float(got["removed"]) == pytest.approx(want, rel=1e-4)
        assert float(got["score_norm2"]) == pytest.approx(v @ v, rel=1e-5)
        assert float(got["damping"]) == pytest.approx(damping)
        want = 0.5 * flat(u) @ matrix @ flat(u)
        assert float(got["predicted_kl"]) == pytest.approx(want, rel=1e-4)
    shrunk = 1 - flat(once(fisher.scale_by_rank1_fisher(damping))[0]) @ g / (g @ g)
    assert float(got["removed"]) == pytest.approx(shrunk, rel=1e-4)


def test_diagnostics_of_many_scores_and_blocks():
    vs, g, damping = rows(SCORES), flat(G), 0.4
    matrix = damping * np.eye(g.size) + vs.T @ vs / 5
    u, state = once(fisher.scale_by_woodbury_fisher(damping), score=SCORES)
    got = fisher.diagnostics(state)
    cos2 = (vs @ g) ** 2 / np.square(vs).sum(1) / (g @ g)
    assert float(got["cos2"]) == pytest.approx(cos2.mean(), rel=1e-4)
    assert float(got["removed"]) == pytest.approx(1 - flat(u) @ g / (g @ g), rel=1e-4)
    want = np.square(vs).sum(1).mean()
    assert float(got["score_norm2"]) == pytest.approx(want, rel=1e-5)
    want = 0.5 * flat(u) @ matrix @ flat(u)
    assert float(got["predicted_kl"]) == pytest.approx(want, rel=1e-4)
    # One score in a stack is the rank-1 rule, in everything.
    one = jax.tree.map(lambda x: x[None], V)
    stacked = once(fisher.scale_by_woodbury_fisher(damping), score=one)
    single = once(fisher.scale_by_rank1_fisher(damping))
    np.testing.assert_allclose(flat(stacked), flat(single), rtol=1e-3, atol=1e-5)
    # Blocks: the share of the gradient along the scores of all of them.
    _, state = once(fisher.scale_by_rank1_fisher(damping, blockwise=True))
    shares = [
        float(fisher.inner(V[k], G[k])) ** 2 / float(fisher.norm2(V[k])) for k in V
    ]
    assert float(state.cos2) == pytest.approx(sum(shares) / (g @ g), rel=1e-4)
    assert float(state.removed) < float(state.cos2)


def test_diagnostics_find_their_state_in_a_chain():
    chain = optax.chain(
        optax.clip_by_global_norm(1.0),
        fisher.scale_by_rank1_fisher(0.1),
        optax.trace(0.9),
        optax.scale(-0.1),
    )
    _, state = once(chain)
    got = fisher.diagnostics(state)
    assert set(got) == {
        "count",
        "damping",
        "cos2",
        "removed",
        "score_norm2",
        "step",
        "predicted_kl",
    }
    assert all(x.shape == () and x.dtype == jnp.float32 for x in got.values())
    assert fisher.diagnostics(optax.sgd(0.1).init(G)) == {}


# The trust region.


@pytest.mark.parametrize("deflate", [True, False])
@pytest.mark.parametrize("many", [False, True])
def test_trust_region_inside(deflate, many):
    """The emitted step costs the KL by the very matrix that was inverted."""
    damping, kl, vs = 0.4, 0.01, rows(SCORES)
    make = fisher.scale_by_woodbury_fisher if many else fisher.scale_by_rank1_fisher
    score = SCORES if many else V
    second = vs.T @ vs / 5 if many else np.outer(flat(V), flat(V))
    matrix = damping * np.eye(vs.shape[1]) + second
    transform = make(damping, deflate=deflate, kl=kl, largest_step=1e6)
    u, state = once(transform, score=score)
    assert 0.5 * flat(u) @ matrix @ flat(u) == pytest.approx(kl, rel=1e-3)
    assert float(state.predicted_kl) == pytest.approx(kl, rel=1e-4)
    plain, _ = once(make(damping, deflate=deflate), score=score)
    close(u, float(state.step) * flat(plain))
    # A step that would be too long is cut.
    u, state = once(
        make(damping, deflate=deflate, kl=1e9, largest_step=0.5), g=G, score=score
    )
    close(u, 0.5 * flat(plain))
    want = 0.5 * flat(u) @ matrix @ flat(u)
    assert float(state.predicted_kl) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("deflate", [True, False])
def test_trust_region_outside_equals_the_one_inside(deflate):
    damping, kl = 0.4, 0.01
    scale = damping if deflate else 1.0
    chain = optax.chain(
        fisher.scale_by_rank1_fisher(damping, deflate=deflate),
        fisher.scale_by_trust_region(kl, 1e6, scale=scale),
    )
    got, state = once(chain, gradient=G)
    want, inside = once(
        fisher.scale_by_rank1_fisher(damping, deflate=deflate, kl=kl, largest_step=1e6)
    )
    close(got, flat(want))
    found = fisher.diagnostics(state)
    assert float(found["step"]) == pytest.approx(float(inside.step), rel=1e-4)
    assert float(found["predicted_kl"]) == pytest.approx(kl, rel=1e-4)
    # After a change of sign the same.
    minus = fisher.scale_by_trust_region(kl, 1e6, scale=scale)
    u, _ = once(fisher.scale_by_rank1_fisher(damping, deflate=deflate))
    u = jax.tree.map(jnp.negative, u)
    close(minus.update(u, minus.init(u), gradient=G)[0], -flat(want))


# As part of optax.


def test_chain_under_jit_vmap_and_scan():
    """A lane of a sweep over dampings, as traced scalars, equals the run alone."""

    def run(damping, key):
        chain = optax.chain(
            optax.clip_by_global_norm(10.0),
            fisher.scale_by_rank1_fisher(damping, relative=True, blockwise=True),
            optax.scale(-0.05),
        )

        def step(carry, key):
            params, state = carry
            g = jax.tree.map(lambda p: p - 1.0, params)
            v = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
            updates, state = chain.update(g, state, params, score=v)
            return (optax.apply_updates(params, updates), state), (
                fisher.diagnostics(state)["removed"]
            )

        carry = (PARAMS, chain.init(PARAMS))
        (params, state), removed = jax.lax.scan(step, carry, jax.random.split(key, 30))
        return params, fisher.diagnostics(state), removed

    dampings = jnp.float32([0.01, 1.0, 1e6])
    keys = jax.random.split(jax.random.key(0), 3)
    swept = jax.jit(jax.vmap(run))(dampings, keys)
    alone = jax.jit(run)(dampings[1], keys[1])
    lane = jax.tree.map(lambda x: x[1], swept)
    np.testing.assert_allclose(flat(lane), flat(alone), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(swept[1]["count"], 30.0)
    # The last lane is gradient descent: 1 - 0.95^30.
    descent = jax.tree.map(lambda x: x[2], swept[0])
    close(descent, 1 - 0.95**30)
    assert (swept[2][0] > swept[2][2]).all()


def test_state_keeps_its_structure_and_dtypes():
    for dtype in (jnp.float32, jnp.bfloat16):
        g, v = (jax.tree.map(lambda x, d=dtype: x.astype(d), t) for t in (G, V))
        transform = fisher.scale_by_rank1_fisher(0.1, relative=True, kl=0.1)
        start = transform.init(g)
        emitted, state = transform.update(g, start, None, score=v)
        assert all(x.dtype == dtype for x in jax.tree.leaves(emitted))
        for before, after in zip(start, state, strict=True):
            assert (before.shape, before.dtype) == (after.shape, after.dtype)


def test_sums_of_bfloat16_are_taken_in_float32():
    ones = {"w": jnp.ones(50_000, jnp.bfloat16)}
    _, state = once(fisher.scale_by_rank1_fisher(1.0), ones, ones)
    assert float(state.score_norm2) == 50_000.0
    assert float(state.cos2) == pytest.approx(1.0, rel=1e-5)


def test_misuse_is_told():
    transform = fisher.scale_by_rank1_fisher(0.1)
    with pytest.raises(ValueError, match="needs a score"):
        transform.update(G, transform.init(G))
    with pytest.raises(ValueError, match="score has a leaf of shape"):
        once(transform, score=SCORES)
    with pytest.raises(ValueError, match="behind 1 leading axis"):
        once(fisher.scale_by_woodbury_fisher(0.1), score=V)
    with pytest.raises(ValueError, match="is structured"):
        once(transform, score=V["Dense_0"])
    with pytest.raises(ValueError, match="blocks per 'row'"):
        fisher.scale_by_rank1_fisher(0.1, blockwise="row").init(G)
    region = fisher.scale_by_trust_region(0.1)
    with pytest.raises(ValueError, match="needs the gradient"):
        region.update(G, region.init(G))


def test_predicted_kl_keeps_its_floor_where_score_and_gradient_are_parallel():
    """There `g.g - c v.g` is all rounding: often 0 or negative."""
    transform = fisher.scale_by_rank1_fisher(damping := 1e-6, deflate=False)

    def predicted(g):
        state = transform.update(g, transform.init(g), score=3.0 * g)[1]
        return state.predicted_kl, damping + state.score_norm2, fisher.norm2(g)

    rows = jax.random.normal(jax.random.key(0), (100, 50))
    got, total, length = jax.jit(jax.vmap(predicted))(rows)
    floor = 0.5 * length / total
    assert bool(jnp.all(got >= 0.999 * floor))
    # Its true value, met by all whose difference has vanished.
    assert float(jnp.mean(jnp.abs(got / floor - 1.0) < 1e-3)) > 0.2


def test_example_of_the_documentation():
    """It runs as printed and learns; and the model's own labels keep cos2 small."""
    page = Path(__file__).parent.parent / "docs" / "fisher.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    names: dict = {}
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        exec(block, names)
    assert float(names["accuracy"]) > 0.97
    assert 0.001 < float(jnp.mean(names["seen"]["removed"])) < 0.15
