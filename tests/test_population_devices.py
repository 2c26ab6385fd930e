"""Members on eight devices, in a process of its own, against one device."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SIZES = (5, 11)
_SCRIPT = """
import sys
import jax
import numpy as np
from offrl_jax.agents import td3_bc
from offrl_jax.population import make_mesh, make_population, place, to_host
from offrl_jax.sources import dataset_sampler, stack_tasks
from offrl_jax.types import Spec, Transitions

assert jax.local_device_count() == 8
rng = np.random.default_rng(0)
draw = lambda *shape: rng.uniform(-1, 1, shape).astype(np.float32)
ones = np.ones(40, np.float32)
data = [
    Transitions(
        draw(40, 3), draw(40, 1), draw(40), ones, draw(40, 3), draw(40, 1), ones
    )
    for _ in range(2)
]
config = td3_bc.Config(hidden=(8,), batch_size=8, policy_delay=1)
agent = td3_bc.make_td3_bc(config, Spec(3, 1, 10))
found = {}
for size in map(int, sys.argv[2].split(",")):
    hyper = jax.tree.map(lambda x: np.full(size, x, np.float32), td3_bc.Hyper())
    for devices in (1, 8):
        mesh = make_mesh(jax.local_devices()[:devices])
        population = make_population(agent, dataset_sampler(), size, mesh)
        task = np.arange(size, dtype=np.int32) % 2
        args = place(population, stack_tasks(data), task, hyper)
        state = population.init(np.arange(size), hyper)
        for leaf in jax.tree.leaves((state, *args[1:])):
            assert leaf.shape[0] == population.padded == -(-size // devices) * devices
            assert len(leaf.sharding.device_set) == devices
        def keep(name, tree):
            for i, leaf in enumerate(jax.tree.leaves(tree)):
                found[f"{name} {size} {devices} {i}"] = leaf
        keep("init", to_host(state, size))
        state, metrics = population.run[0](state, *args, 1)
        keep("gradient", to_host(state.agent.critic_opt.mu, size))
        keep("state", to_host(state, size))
        keep("metrics", to_host(metrics, size))
np.savez(sys.argv[1], **found)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, np.ndarray]:
    """Leaves by what they are: `init 5 8 0` is leaf 0 of 5 members on 8 devices."""
    path = tmp_path_factory.mktemp("eight") / "found.npz"
    root = Path(__file__).parent.parent
    environment = {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(root / ".pytest_cache" / "xla"),
        "PYTHONPATH": str(root),
    }
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(path), ",".join(map(str, SIZES))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(path) as arrays:
        return dict(arrays)


def pairs(found, kind: str, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    start = f"{kind} {size} 1 "
    names = [name for name in found if name.startswith(start)]
    assert names
    return [(found[n], found[n.replace(start, f"{kind} {size} 8 ")]) for n in names]


@pytest.mark.parametrize("size", SIZES)
def test_members_begin_equal_bit_for_bit(found, size):
    for one, eight in pairs(found, "init", size):
        assert one.shape[0] == size
        np.testing.assert_array_equal(one, eight)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["gradient", "state", "metrics"])
def test_one_update_is_the_same_to_float_tolerance(found, kind, size):
    for one, eight in pairs(found, kind, size):
        np.testing.assert_allclose(one, eight, rtol=1e-4, atol=1e-6)


def test_members_differ_and_have_learnt(found):
    """Else the comparisons would compare nothing."""
    weights = [pair[1] for pair in pairs(found, "gradient", 11) if pair[1].ndim == 3]
    assert weights
    for gradient in weights:
        assert len(np.unique(gradient.reshape(11, -1), axis=0)) == 11
