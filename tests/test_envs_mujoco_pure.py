"""MuJoCo bodies inside `jit`: the same bits as outside, nothing remembered."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from offrl_jax import envs
from offrl_jax.envs import host_calls, mujoco_pure
from offrl_jax.envs.base import PureEnv, renew
from offrl_jax.envs.mujoco import MujocoEnv
from offrl_jax.envs.mujoco_bodies import BODIES
from offrl_jax.envs.mujoco_pure import MujocoState, Simulation, pure_from
from offrl_jax.errors import OffrlError, UsageError

HOPPER, HUMANOID = "mujoco/Hopper-v5", "mujoco/Humanoid-v5"


@pytest.fixture(autouse=True)
def _no_log_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)


def draw(env: PureEnv, *shape: int, scale: float = 1.0) -> jax.Array:
    drawn = np.random.default_rng(5).uniform(
        -scale, scale, (*shape, env.spec.action_dim)
    )
    return jnp.asarray(drawn, jnp.float32)


def play(env: PureEnv, state, actions: jax.Array):
    """Every step `[T, n]` under open-loop actions `[T, n, A]`, and the last state."""
    return jax.jit(lambda s, a: jax.lax.scan(jax.vmap(env.step), s, a))(state, actions)


def started(env: PureEnv, n: int, seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), n)
    return jax.jit(jax.vmap(env.reset))(keys), keys


def assert_same(first, second) -> None:
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("env_id", BODIES)
def test_whole_episodes_are_those_of_mujoco_env(env_id: str):
    env, host, n = envs.make_pure(env_id), MujocoEnv(env_id, threads=2), 3
    assert env.name == env_id and env.spec == host.spec and not env.has_success
    (state, obs), keys = started(env, n)
    seeds = np.asarray(jax.vmap(jax.random.bits)(keys))
    np.testing.assert_array_equal(obs, host.reset(seeds))
    # Those that can fall have done so after 150 steps.
    whole = ("mujoco/HalfCheetah-v5", "mujoco/Pusher-v5")
    steps = env.spec.horizon if env_id in whole else 150
    actions = draw(env, steps, n, scale=0.3)
    last, got = play(env, state, actions)
    assert got.reward.dtype == got.obs.dtype == jnp.float32
    # Row by row as far as the host goes; the pure one goes on beyond the end.
    active, compared = np.ones(n, bool), 0
    for t in range(steps):
        want = host.step(np.asarray(actions[t]), active)
        for name in ("obs", "terminated", "truncated", "success"):
            ours, theirs = np.asarray(getattr(got, name)[t]), getattr(want, name)
            np.testing.assert_array_equal(ours[active], theirs[active], err_msg=name)
        reward = np.float32(want.reward)
        np.testing.assert_array_equal(np.asarray(got.reward[t])[active], reward[active])
        compared += active.sum()
        active &= ~(want.terminated | want.truncated)
        if not active.any():
            break
    if BODIES[env_id].healthy:
        assert not active.any() and compared > 60
    else:
        assert compared == n * steps
    np.testing.assert_array_equal(last.t, steps)
    assert not got.truncated[:-1].any()
    assert got.truncated[-1].all() == (env_id in whole)
    host.close()


@pytest.mark.parametrize("name", ["Hopper-v5", "Humanoid-v5"])
def test_an_episode_is_gymnasiums(name: str):
    env, reference = envs.make_pure(f"mujoco/{name}"), gymnasium.make(name)
    key = jax.random.key(8)
    state, obs = jax.jit(env.reset)(key)
    shown, _ = reference.reset(seed=int(jax.random.bits(key)))
    np.testing.assert_array_equal(obs, np.float32(shown))
    step, scale = jax.jit(env.step), np.float32(BODIES[env.name].control_scale)
    for action in draw(env, 1000, scale=0.2):
        state, got = step(state, action)
        shown, reward, terminated, truncated, _ = reference.step(
            scale * np.asarray(action)
        )
        np.testing.assert_array_equal(got.obs, np.float32(shown))
        assert got.reward == np.float32(reward)
        assert got.terminated == terminated and got.truncated == truncated
        if terminated:
            break
    assert terminated and state.t > 15


class Counting(Simulation):
    """Notes how many episodes each call starts or steps."""

    def __init__(self, env_id: str, threads: int | None = None) -> None:
        super().__init__(env_id, threads)
        self.begun: list[int] = []
        self.stepped: list[int] = []

    def begin(self, seed: np.ndarray, wanted: np.ndarray):
        self.begun.append(int(wanted.sum()))
        return super().begin(seed, wanted)

    def step(self, bits: np.ndarray, action: np.ndarray):
        self.stepped.append(len(bits))
        return super().step(bits, action)


def test_any_nest_of_vmap_is_one_call_per_step():
    simulation = Counting(HOPPER)
    env = pure_from(simulation, HOPPER)
    keys = jax.random.split(jax.random.key(0), (2, 3, 4))
    nested = jax.vmap(jax.vmap(jax.vmap(env.reset)))
    state, _ = jax.block_until_ready(jax.jit(nested)(keys))
    assert simulation.begun == [24]
    actions = draw(env, 5, 2, 3, 4)

    def members(s, a):  # the outer axis mapped around the scan, as a population is
        return jax.lax.scan(jax.vmap(jax.vmap(env.step)), s, a)

    _, got = jax.block_until_ready(jax.jit(jax.vmap(members, (0, 1)))(state, actions))
    assert simulation.stepped == [24] * 5
    flat = jax.tree.map(lambda x: x.reshape(24, *x.shape[3:]), state)
    _, plain = play(env, flat, actions.reshape(5, 24, 3))
    np.testing.assert_array_equal(
        jnp.moveaxis(got.obs, 0, 1).reshape(5, 24, -1), plain.obs
    )
    # One start for all, mapped actions: the state is repeated.
    one = jax.tree.map(lambda x: x[0, 0, 0], state)
    _, spread = jax.jit(jax.vmap(env.step, (None, 0)))(one, actions[0, 0, 0])
    _, alone = jax.jit(env.step)(one, actions[0, 0, 0, 2])
    assert_same(jax.tree.map(lambda x: x[2], spread), alone)
    assert simulation.stepped[-2:] == [4, 1]


@pytest.mark.parametrize("env_id", [HOPPER, HUMANOID, "mujoco/HalfCheetah-v5"])
def test_a_saved_state_goes_on_with_the_same_bits(env_id: str):
    """From a file, into simulators that never saw the episode, in other company."""
    env = pure_from(Simulation(env_id, 2), env_id)
    (state, _), _ = started(env, 4)
    actions = draw(env, 60, 4, scale=0.4)
    end, whole = play(env, state, actions)
    middle, _ = play(env, state, actions[:25])
    np.savez("state.npz", **middle._asdict())
    with np.load("state.npz") as saved:
        loaded = MujocoState(*(jnp.asarray(saved[f]) for f in MujocoState._fields))
    assert loaded.bits.dtype == jnp.uint32 and loaded.t.tolist() == [25] * 4
    other = pure_from(Simulation(env_id, 3), env_id)
    # Its simulators have been used for something else.
    play(other, started(other, 5, seed=9)[0][0], draw(other, 7, 5))
    order = jnp.array([2, 0])
    resumed_end, resumed = play(
        other, jax.tree.map(lambda x: x[order], loaded), actions[25:, order]
    )
    assert_same(resumed_end, jax.tree.map(lambda x: x[order], end))
    assert_same(resumed, jax.tree.map(lambda x: x[25:, order], whole))


@pytest.mark.parametrize("env_id", [HOPPER, HUMANOID])
def test_threads_and_pieces_change_nothing(env_id: str, monkeypatch):
    shown = []
    for threads, piece in ((1, 64 * 1024), (2, 4096), (3, 100)):
        monkeypatch.setattr(host_calls, "PIECE_BYTES", piece)
        env = pure_from(Simulation(env_id, threads), env_id)
        (state, obs), _ = started(env, 7)
        shown.append((obs, play(env, state, draw(env, 10, 7))))
    assert_same(shown[0], shown[1])
    assert_same(shown[0], shown[2])


def test_calls_from_several_threads_at_once():
    simulation = Simulation(HUMANOID, 2)
    starts = [
        simulation.begin(np.arange(i, i + 6, dtype=np.uint32), np.ones(6, bool))[0]
        for i in range(0, 40, 10)
    ]
    action = np.asarray(draw(envs.make_pure(HUMANOID), 6))
    together = threading.Barrier(4)

    def run(bits: np.ndarray) -> np.ndarray:
        together.wait()
        for _ in range(8):
            bits, *_ = simulation.step(bits, action)
        return bits

    with ThreadPoolExecutor(4) as pool:
        crowded = list(pool.map(run, starts))
    together = threading.Barrier(1)
    for start, found in zip(starts, crowded, strict=True):
        np.testing.assert_array_equal(run(start), found)
    assert len(simulation._idle) <= 8


class TestRenew:
    def test_only_what_is_over_starts_anew(self):
        simulation = Counting(HOPPER)
        env = pure_from(simulation, HOPPER)
        (state, obs), _ = started(env, 4)
        state, _ = play(env, state, draw(env, 3, 4))
        keys = jax.random.split(jax.random.key(7), 4)
        over = jnp.array([False, True, False, True])
        placed, place = [], simulation._engine.place
        simulation._engine.place = lambda *a: placed.append(place(*a))
        mapped = jax.jit(jax.vmap(lambda *a: renew(env, *a)))
        new, shown = jax.block_until_ready(mapped(keys, state, obs, over))
        assert simulation.begun == [4, 2] and len(placed) == 2
        fresh = jax.vmap(env.reset)(keys)
        for i in range(4):
            want = jax.tree.map(lambda x, i=i: x[i], fresh if over[i] else (state, obs))
            assert_same((jax.tree.map(lambda x, i=i: x[i], new), shown[i]), want)
        np.testing.assert_array_equal(new.t, [3, 0, 3, 0])

    @pytest.mark.parametrize("env_id", ["classic/gates-v0", "control/CartPole-v1"])
    def test_environments_without_their_own(self, env_id: str):
        env = envs.make_pure(env_id)
        state, obs = env.reset(jax.random.key(0))
        key = jax.random.key(1)
        kept = renew(env, key, state, obs, jnp.array(False))
        fresh = renew(env, key, state, obs, jnp.array(True))
        jax.tree.map(lambda a, b: assert_bits(a, b), kept, (state, obs))
        jax.tree.map(lambda a, b: assert_bits(a, b), fresh, env.reset(key))


def assert_bits(first: jax.Array, second: jax.Array) -> None:
    if jax.dtypes.issubdtype(first.dtype, jax.dtypes.prng_key):
        first, second = jax.random.key_data(first), jax.random.key_data(second)
    np.testing.assert_array_equal(first, second)


def test_nan_actions_show_and_no_gradient_passes():
    env = envs.make_pure(HOPPER)
    state, _ = env.reset(jax.random.key(0))
    _, got = env.step(state, jnp.array([0.0, jnp.nan, 0.0]))
    assert np.isnan(got.reward) and np.isfinite(got.obs).all()
    slope = jax.jit(jax.grad(lambda a: env.step(state, a)[1].reward))(jnp.ones(3))
    np.testing.assert_array_equal(slope, 0.0)


def test_a_failing_simulator_is_told_and_the_next_call_works(monkeypatch):
    simulation = Simulation(HOPPER, 2)
    env = pure_from(simulation, HOPPER)
    (state, _), _ = started(env, 4)
    actions = draw(env, 1, 4)
    _, before = play(env, state, actions)

    def broken(*_):
        raise RuntimeError("the leg came off")

    with monkeypatch.context() as patch:
        patch.setattr(simulation._engine, "advance", broken)
        message = "the simulator of 'mujoco/Hopper-v5' failed: the leg came off"
        with pytest.raises(OffrlError, match=message):
            simulation.step(np.asarray(state.bits), np.asarray(actions[0]))
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(play(env, state, actions))
    _, after = play(env, state, actions)
    assert_same(before, after)


def test_what_has_a_pure_form():
    assert envs.make_pure(HOPPER) is envs.make_pure(HOPPER)
    assert envs.make_pure("classic/pendulum-v0").name == "classic/pendulum-v0"
    for env_id in ("gymnasium/Ant-v5", next(iter(envs.OGBENCH_IDS))):
        with pytest.raises(UsageError, match="cannot be stepped inside") as caught:
            envs.make_pure(env_id)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="did you mean 'mujoco/Hopper-v5'"):
        envs.make_pure("mujoco/Hopper-v4")
    with pytest.raises(UsageError, match="unknown environment"):
        mujoco_pure.as_pure("control/CartPole-v1")


POPULATION = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, PartitionSpec as P
devices = int(sys.argv[1])
jax.config.update("jax_num_cpu_devices", devices)
from offrl_jax import envs
env = envs.make_pure("mujoco/Humanoid-v5")
members, episodes = 24, 16

def member(key, weights):  # with work of the kind that shares XLA's threads
    state, obs = jax.vmap(env.reset)(jax.random.split(key, episodes))
    def one(carry, _):
        state, obs = carry
        state, step = jax.vmap(env.step)(state, jnp.tanh(obs @ weights))
        return (state, step.obs), step.reward
    (state, _), reward = jax.lax.scan(one, (state, obs), None, length=3)
    return state.bits, reward

run = jax.vmap(member)
if devices > 1:
    mesh = jax.make_mesh((devices,), ("m",), axis_types=(AxisType.Auto,))
    run = jax.shard_map(run, mesh=mesh, in_specs=P("m"), out_specs=P("m"))
weights = jnp.zeros((members, 348, 17))
bits, reward = jax.jit(run)(jax.random.split(jax.random.key(0), members), weights)
print(reward.shape, np.asarray(bits).astype(np.uint64).sum())
"""


def test_populations_on_one_and_two_devices_do_not_stop_for_ever(tmp_path: Path):
    """Arguments of over 100 kB per device, callbacks on all of XLA's threads."""
    words = Simulation(HUMANOID, 1).words + 17
    assert 12 * 16 * words * 4 > 102_400
    said = set()
    for devices in (1, 2):
        done = subprocess.run(
            [sys.executable, "-c", POPULATION, str(devices)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=100,
            env={
                "PYTHONPATH": str(Path(envs.__file__).parents[2]),
                "JAX_PLATFORMS": "cpu",
            },
        )
        assert done.returncode == 0, done.stderr
        said.add(done.stdout)
    assert len(said) == 1 and "(24, 3, 16)" in said.pop()
