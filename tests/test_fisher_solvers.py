"""Directions (F + damping)^-1 g, against numpy's dense solve in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from offrl_jax import fisher
from offrl_jax.fisher import tree_algebra

pytestmark = pytest.mark.little_optimised

SHAPES = {"params": {"Dense_0": {"bias": (4,), "kernel": (3, 4)}, "free": (2,)}}
SIZE = 18


def draw(seed: int, *leading: int, dtype=np.float64):
    """A tree of normal numbers in the shapes of `SHAPES`, as numpy."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=leading + shape).astype(dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def flat(tree) -> np.ndarray:
    # Not by jax, which would round float64 outside of `enable_x64`.
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves)


def flat_rows(tree) -> np.ndarray:
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(tree)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def on_device(tree, dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), tree)


def spd(size: int, seed: int, condition: float = 1e3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return (basis * np.geomspace(1.0, condition, size)) @ basis.T


# The solver.


@pytest.mark.parametrize("size", [1, 12, 32, 75])
def test_solve_spd_against_lapack(size):
    matrix, rng = spd(size, size), np.random.default_rng(size + 1)
    for shape in ((size,), (size, 5)):
        rhs = rng.normal(size=shape)
        want = np.linalg.solve(matrix, rhs)
        got = fisher.solve_spd(jnp.float32(matrix), jnp.float32(rhs))
        assert got.dtype == jnp.float32
        assert got.shape == shape
        np.testing.assert_allclose(got, want, atol=2e-4 * np.abs(want).max())
        with jax.enable_x64(True):
            got = fisher.solve_spd(jnp.asarray(matrix), jnp.asarray(rhs))
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_solve_spd_under_vmap_and_without_lapack():
    matrices = np.stack([spd(6, seed) for seed in range(5)])
    rhs = np.random.default_rng(0).normal(size=(5, 6))
    solve = jax.jit(jax.vmap(fisher.solve_spd))
    args = jnp.float32(matrices), jnp.float32(rhs)
    want = np.stack([np.linalg.solve(m, b) for m, b in zip(matrices, rhs, strict=True)])
    np.testing.assert_allclose(solve(*args), want, rtol=1e-3, atol=1e-5)
    assert "custom_call" not in solve.lower(*args).as_text()


def test_solve_spd_tells_what_it_cannot_do():
    assert np.isnan(fisher.solve_spd(-jnp.eye(3), jnp.ones(3))).all()
    with pytest.raises(ValueError, match="no system"):
        fisher.solve_spd(jnp.eye(3), jnp.ones(2))
    with pytest.raises(ValueError, match="no system"):
        fisher.solve_spd(jnp.ones((2, 3)), jnp.ones(2))


# One score.


@pytest.mark.parametrize("damping", [1e-3, 20.0])
def test_sherman_morrison(damping):
    v, g = draw(1), draw(2)
    matrix = damping * np.eye(SIZE) + np.outer(flat(v), flat(v))
    want = np.linalg.solve(matrix, flat(g))
    with jax.enable_x64(True):
        got = fisher.rank1_direction(
            on_device(v, jnp.float64), on_device(g, jnp.float64), damping
        )
        np.testing.assert_allclose(flat(got), want, rtol=1e-9)
    got = fisher.rank1_direction(on_device(v), on_device(g), damping)
    np.testing.assert_allclose(flat(got), want, rtol=2e-3, atol=1e-6 / damping)


def test_same_sample_changes_only_the_length():
    """Fact 1: F^-1 (a v) = a v / (damping + |v|^2)."""
    v = on_device(draw(3))
    g = jax.tree.map(lambda x: -2.5 * x, v)
    got = fisher.rank1_direction(v, g, 0.5)
    want = -2.5 * flat(v) / (0.5 + flat(v) @ flat(v))
    np.testing.assert_allclose(flat(got), want, rtol=1e-4)


def test_eigenvalues_of_the_inverse():
    """Fact 2: 1 / damping, and once 1 / (damping + |v|^2): always an ascent."""
    v, damping = on_device(draw(4)), 0.2
    unravel = ravel_pytree(v)[1]
    columns = jax.vmap(
        lambda e: ravel_pytree(fisher.rank1_direction(v, unravel(e), damping))[0]
    )(jnp.eye(SIZE))
    values = np.linalg.eigvalsh(np.asarray(columns, np.float64))
    np.testing.assert_allclose(values[1:], 1.0 / damping, rtol=1e-4)
    smallest = 1.0 / (damping + flat(v) @ flat(v))
    np.testing.assert_allclose(values[0], smallest, rtol=1e-3)


def test_quadratic_form_and_trust_region():
    """Fact 3: d^T F d = d . g, so the closed form spends exactly the KL."""
    v, g, damping = on_device(draw(5)), on_device(draw(6)), 0.7
    d = fisher.rank1_direction(v, g, damping)
    matrix = damping * np.eye(SIZE) + np.outer(flat(v), flat(v))
    form = flat(d) @ matrix @ flat(d)
    assert float(fisher.inner(d, g)) == pytest.approx(form, rel=1e-4)
    rate = float(fisher.trust_region_rate(0.01, 1e9, fisher.inner(d, g)))
    assert 0.5 * rate**2 * form == pytest.approx(0.01, rel=1e-4)
    assert float(fisher.trust_region_rate(0.01, 1e-3, fisher.inner(d, g))) == (
        pytest.approx(1e-3)
    )


def test_limits_of_the_damping():
    """Fact 4: no damping removes the component along v, a large one changes nothing."""
    v, g = on_device(draw(7)), on_device(draw(8))
    gone = fisher.rank1_deflation(v, g, 0.0)
    assert abs(flat(gone) @ flat(v)) < 1e-4 * np.linalg.norm(flat(v))
    rest = flat(g) - flat(v) * (flat(v) @ flat(g)) / (flat(v) @ flat(v))
    np.testing.assert_allclose(flat(gone), rest, atol=1e-5)
    same = fisher.rank1_deflation(v, g, 1e9)
    np.testing.assert_allclose(flat(same), flat(g), rtol=1e-6)
    raw = fisher.rank1_direction(v, g, 0.25)
    deflated = fisher.rank1_deflation(v, g, 0.25)
    np.testing.assert_allclose(0.25 * flat(raw), flat(deflated), rtol=1e-5, atol=1e-7)
    zeros = jax.tree.map(jnp.zeros_like, v)
    np.testing.assert_array_equal(flat(fisher.rank1_deflation(zeros, g, 0.0)), flat(g))


def test_tree_equals_flat():
    v, g, vs = on_device(draw(9)), on_device(draw(10)), on_device(draw(11, 5))
    unravel = ravel_pytree(g)[1]
    rows = jnp.float32(flat_rows(vs))
    fg = ravel_pytree(g)[0]
    for tree, vector in (
        (
            fisher.rank1_direction(v, g, 0.3),
            fisher.rank1_direction(ravel_pytree(v)[0], fg, 0.3),
        ),
        (
            fisher.woodbury_direction(vs, g, 0.3),
            fisher.woodbury_direction(rows, fg, 0.3),
        ),
    ):
        np.testing.assert_allclose(flat(tree), flat(unravel(vector)), rtol=1e-4)


# k scores.


@pytest.mark.parametrize("k", [1, 4, 30])
def test_woodbury(k):
    """Fact 5, with fewer and with more scores than dimensions."""
    vs, g, damping = draw(12, k), draw(13), 0.4
    rows = flat_rows(vs)
    want = np.linalg.solve(damping * np.eye(SIZE) + rows.T @ rows / k, flat(g))
    with jax.enable_x64(True):
        got = fisher.woodbury_direction(
            on_device(vs, jnp.float64), on_device(g, jnp.float64), damping
        )
        np.testing.assert_allclose(flat(got), want, rtol=1e-9, atol=1e-12)
    got = fisher.woodbury_direction(on_device(vs), on_device(g), damping)
    np.testing.assert_allclose(flat(got), want, atol=1e-4 * np.abs(want).max())
    deflated = fisher.woodbury_deflation(on_device(vs), on_device(g), damping)
    np.testing.assert_allclose(flat(deflated), damping * flat(got), atol=1e-5)


def test_woodbury_of_one_score_is_sherman_morrison():
    v, g = on_device(draw(14)), on_device(draw(15))
    got = fisher.woodbury_direction(jax.tree.map(lambda x: x[None], v), g, 0.1)
    want = fisher.rank1_direction(v, g, 0.1)
    np.testing.assert_allclose(flat(got), flat(want), rtol=1e-3, atol=1e-5)


# Blocks.


def test_blocks_of_a_tree():
    tree = draw(0)
    assert tree_algebra.block_indices(tree, "all") == ((0, 1, 2),)
    assert tree_algebra.block_indices(tree, "layer") == ((0, 1), (2,))
    assert tree_algebra.block_indices(tree, "leaf") == ((0,), (1,), (2,))
    with pytest.raises(ValueError, match="blocks per 'row'"):
        tree_algebra.block_indices(tree, "row")


@pytest.mark.parametrize("per, sizes", [("layer", [16, 2]), ("leaf", [4, 12, 2])])
def test_blockwise_is_a_block_diagonal_solve(per, sizes):
    v, g, vs = draw(16), draw(17), draw(18, 3)
    dampings = np.linspace(0.2, 0.9, len(sizes))
    ends = np.cumsum(sizes)
    same = (np.searchsorted(ends, np.arange(SIZE), side="right"))[:, None]
    mask = same == same.T
    ridge = np.diag(dampings[same[:, 0]])
    rows = flat_rows(vs)
    one = np.linalg.solve(ridge + mask * np.outer(flat(v), flat(v)), flat(g))
    many = np.linalg.solve(ridge + mask * (rows.T @ rows) / 3, flat(g))
    args = on_device(g), jnp.float32(dampings), per
    got = fisher.blockwise_rank1_direction(on_device(v), *args)
    np.testing.assert_allclose(flat(got), one, rtol=1e-3, atol=1e-5)
    got = fisher.blockwise_woodbury_direction(on_device(vs), *args)
    np.testing.assert_allclose(flat(got), many, rtol=1e-3, atol=1e-5)
    whole = np.linalg.solve(
        ridge * 0 + 0.3 * np.eye(SIZE) + np.outer(flat(v), flat(v)), flat(g)
    )
    got = fisher.blockwise_rank1_direction(on_device(v), on_device(g), 0.3, "all")
    np.testing.assert_allclose(flat(got), whole, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="damping is shaped"):
        fisher.blockwise_rank1_direction(on_device(v), on_device(g), jnp.ones(7), per)


# Dense, diagonal, conjugate gradients.


def test_dense_and_diagonal():
    matrix, g = spd(SIZE, 3), draw(19)
    want = np.linalg.solve(matrix + 0.5 * np.eye(SIZE), flat(g))
    got = fisher.dense_direction(jnp.float32(matrix), on_device(g), 0.5)
    np.testing.assert_allclose(flat(got), want, rtol=2e-3, atol=1e-5)
    diagonal = jax.tree.map(np.square, draw(20))
    got = fisher.diagonal_direction(on_device(diagonal), on_device(g), 0.5)
    np.testing.assert_allclose(flat(got), flat(g) / (flat(diagonal) + 0.5), rtol=1e-5)


def test_conjugate_gradient():
    """Exact after d iterations, better after each, and unchanged once converged."""
    matrix = jnp.float32(spd(SIZE, 5, condition=50.0))
    g = on_device(draw(21))
    unravel = ravel_pytree(g)[1]

    def product(tree):
        return unravel(matrix @ ravel_pytree(tree)[0])

    want = np.linalg.solve(np.float64(matrix) + 0.5 * np.eye(SIZE), flat(g))
    errors = []
    for iterations in (2, 5, 10, 40):
        x, residual = fisher.conjugate_gradient(product, g, iterations, 0.5)
        error = flat(x) - want
        errors.append(float(error @ (np.float64(matrix) + 0.5 * np.eye(SIZE)) @ error))
        rest = flat(g) - (np.float64(matrix) + 0.5 * np.eye(SIZE)) @ flat(x)
        assert float(residual) == pytest.approx(rest @ rest, rel=0.02, abs=1e-7)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    np.testing.assert_allclose(flat(x), want, atol=1e-4)
    again, _ = fisher.conjugate_gradient(product, g, 80, 0.5)
    np.testing.assert_array_equal(flat(again), flat(x))


def test_conjugate_gradient_stops_and_batches():
    matrices = jnp.float32(np.stack([spd(5, seed, 10.0) for seed in range(3)]))
    rhs = jnp.float32(np.random.default_rng(0).normal(size=(3, 5))).at[1].set(0.0)

    def solve(matrix, b):
        return fisher.conjugate_gradient(lambda v: matrix @ v, b, 12)[0]

    got = jax.jit(jax.vmap(solve))(matrices, rhs)
    want = [np.linalg.solve(m, b) for m, b in zip(matrices, rhs, strict=True)]
    np.testing.assert_allclose(got, want, atol=1e-4)
    np.testing.assert_array_equal(got[1], 0.0)
    # No positive curvature: the start is returned, not a division by zero.
    x, residual = fisher.conjugate_gradient(jnp.zeros_like, jnp.ones(4), 5)
    np.testing.assert_array_equal(x, 0.0)
    assert float(residual) == 4.0
    # A loose tolerance ends it early.
    _, rest = fisher.conjugate_gradient(
        lambda v: matrices[0] @ v, rhs[0], 12, tolerance=0.1
    )
    assert 1e-6 < float(rest) / float(rhs[0] @ rhs[0]) < 0.1


# Shapes and dtypes.


def test_misfits_are_refused():
    v, g = on_device(draw(22)), on_device(draw(23))
    stacked = jax.tree.map(lambda x: x[None], v)
    with pytest.raises(ValueError, match="score has a leaf of shape"):
        fisher.rank1_direction(stacked, g, 0.1)
    with pytest.raises(ValueError, match="behind 1 leading axis"):
        fisher.woodbury_direction(v, g, 0.1)
    with pytest.raises(ValueError, match="is structured"):
        fisher.rank1_direction(v["params"], g, 0.1)


def test_sums_of_bfloat16_are_taken_in_float32():
    """In bfloat16 a running sum of ones stops at 256."""
    ones = {"w": jnp.ones(50_000, jnp.bfloat16)}
    assert float(fisher.norm2(ones)) == 50_000.0
    got = fisher.rank1_direction(ones, ones, 50_000.0)
    assert got["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(got["w"]), 1e-5, rtol=1e-2)
