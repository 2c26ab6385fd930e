"""MuJoCo in threads against `gymnasium.make`, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest

from offrl_jax import envs
from offrl_jax.envs import mujoco_bodies
from offrl_jax.envs.base import PureEnv
from offrl_jax.envs.mujoco import MujocoEnv, _load_model, available_cores
from offrl_jax.envs.mujoco_bodies import BODIES
from offrl_jax.errors import UsageError

V5 = (
    "HalfCheetah-v5",
    "Hopper-v5",
    "Humanoid-v5",
    "Pusher-v5",
    "Swimmer-v5",
    "Walker2d-v5",
)
ENDLESS = ("HalfCheetah-v5", "Pusher-v5", "Swimmer-v5")
# What Gymnasium's actions are beyond ours, in the precision of its action space.
SCALE = {"Humanoid-v5": np.float32(0.4), "Pusher-v5": np.float32(2.0)}


@pytest.fixture(autouse=True)
def _no_log_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Gymnasium's own cheetah makes MuJoCo write a log where the process stands."""
    monkeypatch.chdir(tmp_path)


def actions(env: MujocoEnv, n: int, steps: int, scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(11)
    drawn = rng.uniform(-scale, scale, (steps, n, env.spec.action_dim))
    return drawn.astype(np.float32)


def play(env: MujocoEnv, seeds: np.ndarray, plan: np.ndarray) -> list[np.ndarray]:
    """Everything an episode shows under open-loop actions, until all have ended."""
    shown, active = [env.reset(seeds)], np.ones(len(seeds), bool)
    for action in plan:
        step = env.step(action, active)
        shown += [step.obs, step.reward, step.terminated, step.truncated]
        active &= ~(step.terminated | step.truncated)
    return shown


@pytest.mark.parametrize("name", V5)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_whole_episodes_are_gymnasiums_bits(name: str, dtype: type):
    env, seeds = MujocoEnv(f"mujoco/{name}", threads=2), np.array([3, 4, 1000])
    references = [gymnasium.make(name) for _ in seeds]
    starts = [e.reset(seed=int(s))[0] for e, s in zip(references, seeds, strict=True)]
    np.testing.assert_array_equal(env.reset(seeds), np.float32(starts))
    active, steps = np.ones(len(seeds), bool), 0
    # Small actions keep the walkers up for longer than random falling.
    horizon = env.spec.horizon
    plan = actions(env, len(seeds), horizon, 1.0 if name in ENDLESS else 0.2)
    # The body scales by a Python float, which takes the precision of the action.
    scale = dtype(env._engine.body.control_scale)
    assert np.float32(scale) == SCALE.get(name, 1)
    for action in plan.astype(dtype):
        got = env.step(action, active)
        assert got.reward.dtype == np.float64 and got.obs.dtype == np.float32
        assert not got.success.any()
        for i in np.flatnonzero(active):
            obs, *rest, _ = references[i].step(scale * action[i])
            np.testing.assert_array_equal(got.obs[i], np.float32(obs))
            assert rest == [got.reward[i], got.terminated[i], got.truncated[i]]
            steps += 1
        active &= ~(got.terminated | got.truncated)
        if not active.any():
            break
    assert not active.any()
    assert steps == 3 * horizon if name in ENDLESS else steps > 100
    env.close()


@pytest.mark.parametrize("name", V5)
def test_specs_are_gymnasiums(name: str):
    reference, spec = gymnasium.make(name), envs.spec_of(f"mujoco/{name}")
    assert (spec.obs_dim,) == reference.observation_space.shape
    assert (spec.action_dim,) == reference.action_space.shape
    assert reference.spec is not None
    assert spec.horizon == reference.spec.max_episode_steps
    scale = SCALE.get(name, np.float32(1))
    np.testing.assert_array_equal(reference.action_space.low, -scale)  # pyright: ignore
    np.testing.assert_array_equal(reference.action_space.high, scale)  # pyright: ignore
    assert np.float32(BODIES[f"mujoco/{name}"].control_scale) == scale


@pytest.mark.parametrize("env_id", BODIES)
class TestEveryBody:
    def test_reuse_and_batch_size_change_nothing(self, env_id: str):
        env = MujocoEnv(env_id, threads=2)
        plan = actions(env, 5, 60)
        fresh = play(env, np.arange(5), plan)
        # A larger batch with other seeds in between, then a part in another order.
        play(env, np.arange(50, 58), actions(env, 8, 7))
        again = play(env, np.arange(5), plan)
        part = play(env, np.array([4, 1]), plan[:, [4, 1]])
        for first, second, few in zip(fresh, again, part, strict=True):
            np.testing.assert_array_equal(first, second)
            np.testing.assert_array_equal(first[[4, 1]], few)
        env.close()

    def test_threads_change_nothing(self, env_id: str):
        shown = []
        for threads in (1, 2, 3):
            env = MujocoEnv(env_id, threads)
            shown.append(play(env, np.arange(7), actions(env, 7, 40)))
            env.close()
        for one, *others in zip(*shown, strict=True):
            for other in others:
                np.testing.assert_array_equal(one, other)

    def test_inactive_rows_stand_still(self, env_id: str):
        env, active = MujocoEnv(env_id, threads=2), np.array([True, False, True])
        twin = MujocoEnv(env_id, threads=1)
        plan = actions(env, 3, 6)
        before = env.reset(np.arange(3))
        twin.reset(np.arange(3))
        for action in plan[:5]:
            step = env.step(action, active)
            np.testing.assert_array_equal(step.obs[1], before[1])
            assert step.reward[1] == 0.0
            assert not (step.terminated[1] or step.truncated[1])
            assert (step.obs[0] != before[0]).any() and step.reward[0] != 0.0
        # Woken up, the row goes on as if it had started now.
        woken = env.step(plan[5], ~active)
        alone = twin.step(plan[5], np.ones(3, bool))
        np.testing.assert_array_equal(woken.obs[1], alone.obs[1])
        assert woken.reward[1] == alone.reward[1]
        env.close()
        twin.close()

    def test_actions_beyond_the_bounds_are_clipped(self, env_id: str):
        env, ones = MujocoEnv(env_id, 1), np.ones((1, BODIES[env_id].spec.action_dim))
        seen = []
        for action in (ones, 5.0 * ones):
            env.reset(np.array([0]))
            seen.append(env.step(action, np.array([True])))
        np.testing.assert_array_equal(seen[0].obs, seen[1].obs)
        np.testing.assert_array_equal(seen[0].reward, seen[1].reward)
        env.close()

    def test_made_by_id(self, env_id: str):
        env = envs.make(env_id)
        assert not isinstance(env, PureEnv)
        assert env.name == env_id and env.spec == envs.spec_of(env_id)
        assert env.reset(np.array([0])).shape == (1, env.spec.obs_dim)
        assert dict(env.versions) == {
            "gymnasium": gymnasium.__version__,
            "mujoco": mujoco.__version__,
        }
        env.close()


class TestSafetyHalfCheetah:
    def test_recorded_transitions_from_their_states(self, shared_data: Path):
        """One step from every recorded state; float32 and contacts set the bounds."""
        data = np.load(shared_data / "neorl2" / "SafetyHalfCheetah-val.npz")
        env = MujocoEnv("neorl2/SafetyHalfCheetah-v1")
        errors = []
        for rows in np.array_split(np.arange(len(data["obs"])), 10):
            obs = data["obs"][rows].astype(np.float64)
            shown = env.reset_to(obs[:, :9], obs[:, 9:])
            np.testing.assert_array_equal(shown, data["obs"][rows])
            got = env.step(data["action"][rows], np.ones(len(rows), bool))
            errors.append(np.abs(got.obs - data["next_obs"][rows]))
            np.testing.assert_allclose(got.reward, data["reward"][rows], atol=5e-5)
            assert not got.terminated.any()
        position, velocity = np.split(np.concatenate(errors), 2, axis=1)
        assert position.max() < 3e-5
        # A contact magnifies the rounding of a recorded state in a few rows of 2000.
        assert np.median(velocity.max(1)) < 2e-6
        assert np.quantile(velocity.max(1), 0.995) < 2e-4
        assert velocity.max() < 1e-3
        assert not data["done"].any()
        env.close()

    def test_reward_by_hand_below_and_above_the_limit(self):
        env = MujocoEnv("neorl2/SafetyHalfCheetah-v1", threads=1)
        qpos, qvel = np.zeros((2, 9)), np.zeros((2, 9))
        qvel[:, 0] = (1.0, 6.0)
        action = np.full((2, 6), 0.5)
        before = env.reset_to(qpos, qvel)
        got = env.step(action, np.ones(2, bool))
        velocity = (got.obs[:, 0] - before[:, 0]) / 0.05
        assert velocity[0] < 3.2096 < velocity[1]
        expected = [velocity[0] - 0.1 * 6 * 0.25, -100.0]
        np.testing.assert_allclose(got.reward, expected, rtol=1e-5)
        env.close()

    def test_otherwise_it_is_the_cheetah(self):
        safe = MujocoEnv("neorl2/SafetyHalfCheetah-v1", threads=1)
        plain = MujocoEnv("mujoco/HalfCheetah-v5", threads=1)
        seeds, on = np.arange(4), np.ones(4, bool)
        np.testing.assert_array_equal(safe.reset(seeds)[:, 1:], plain.reset(seeds))
        for action in actions(plain, 4, 100):
            ours, theirs = safe.step(action, on), plain.step(action, on)
            np.testing.assert_array_equal(ours.obs[:, 1:], theirs.obs)
            slow = ours.reward != -100.0
            np.testing.assert_array_equal(ours.reward[slow], theirs.reward[slow])
        assert slow.any()
        safe.close()
        plain.close()


@pytest.mark.parametrize("name", ["Hopper-v5", "Humanoid-v5", "Walker2d-v5"])
def test_health_at_every_bound_is_gymnasiums(name: str):
    """Each coordinate in turn at, just below and just above every bound there is."""
    reference, body = gymnasium.make(name).unwrapped, BODIES[f"mujoco/{name}"]
    bounds = np.array([0.2, 0.7, 0.8, 1.0, 2.0, 100.0])
    bounds = np.concatenate([-bounds, bounds])
    values = [np.nextafter(bounds, -np.inf), bounds, np.nextafter(bounds, np.inf)]
    upright = reference.init_qpos, reference.init_qvel  # pyright: ignore
    nq = len(upright[0])
    verdicts = []
    for coordinate in range(sum(map(len, upright))):
        for value in np.concatenate(values):
            state = np.concatenate(upright)
            state[coordinate] = value
            # Not `set_state`: MuJoCo would complain of the stranger ones.
            reference.data.qpos[:], reference.data.qvel[:] = np.split(state, [nq])  # pyright: ignore
            assert body.healthy is not None
            (ours,) = body.healthy(state[None, :nq], state[None, nq:])
            assert ours == reference.is_healthy, (coordinate, value)  # pyright: ignore
            verdicts.append(ours)
    assert any(verdicts) and not all(verdicts)


@pytest.mark.parametrize("name", V5)
def test_model_is_gymnasiums_bit_for_bit(name: str):
    """Above all the cheetah's, whose total mass is set after compilation here."""
    ours = _load_model(BODIES[f"mujoco/{name}"].xml)
    theirs = gymnasium.make(name).unwrapped.model  # pyright: ignore
    compared = 0
    for field in dir(theirs):
        value = getattr(theirs, field)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(ours, field), value, err_msg=field)
            compared += 1
    assert compared > 100
    assert ours.opt.timestep == theirs.opt.timestep


def test_the_pusher_sees_the_right_bodies():
    model = gymnasium.make("Pusher-v5").unwrapped.model  # pyright: ignore
    seen = (mujoco_bodies._TIP, mujoco_bodies._OBJECT, mujoco_bodies._GOAL)
    assert [model.body(i).name for i in seen] == ["tips_arm", "object", "goal"]


@pytest.mark.parametrize("name", ["Hopper-v5", "Humanoid-v5"])
def test_nan_action_is_gymnasiums_without_the_log(name: str, tmp_path: Path):
    """A control of zeros for the simulator, a NaN in the reward."""
    env, on = MujocoEnv(f"mujoco/{name}", threads=1), np.array([True])
    env.reset(np.array([0]))
    action = np.full((1, env.spec.action_dim), 0.5)
    action[0, 1] = np.nan
    ours = [env.step(action, on), env.step(np.ones_like(action), on)]
    env.close()
    assert list(tmp_path.iterdir()) == []
    reference = gymnasium.make(name)
    reference.reset(seed=0)
    scale = SCALE.get(name, np.float32(1))
    for got, drive in zip(ours, (action[0], np.ones(len(action[0]))), strict=True):
        # Not through the wrappers, which warn of NaN.
        obs, reward, *_ = reference.unwrapped.step(np.float32(drive) * scale)
        np.testing.assert_array_equal(got.obs[0], np.float32(obs))
        np.testing.assert_allclose(got.reward[0], reward, rtol=1e-6)
    assert np.isnan(ours[0].reward[0]) and not np.isnan(ours[1].reward[0])


def test_loading_says_nothing_and_leaves_no_file(tmp_path: Path):
    code = (
        "from offrl_jax import envs; import numpy as np;"
        "e = envs.make('mujoco/HalfCheetah-v5'); e.reset(np.arange(2)); e.close()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(Path(envs.__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
    )
    assert done.stdout == "" and done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_misuse_is_refused():
    env = MujocoEnv("mujoco/Hopper-v5", threads=1)
    env.reset(np.arange(2))
    with pytest.raises(ValueError, match="for 2 episodes"):
        env.step(np.zeros((3, 3)), np.ones(3, bool))
    with pytest.raises(ValueError, match="states of shape"):
        env.reset_to(np.zeros((2, 5)), np.zeros((2, 6)))
    fallen = np.zeros((2, 6))
    fallen[:, 1] = (0.3, 1.25)
    env.reset_to(fallen, np.zeros((2, 6)))
    step = env.step(np.zeros((2, 3)), np.ones(2, bool))
    np.testing.assert_array_equal(step.terminated, [True, False])
    with pytest.raises(ValueError, match="has ended"):
        env.step(np.zeros((2, 3)), np.ones(2, bool))
    env.close()
    with pytest.raises(UsageError, match="did you mean 'mujoco/Hopper-v5'"):
        MujocoEnv("mujoco/Hopper-v4")
    assert available_cores() >= 1
