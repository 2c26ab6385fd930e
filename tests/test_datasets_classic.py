from __future__ import annotations

import subprocess
import sys
from collections import deque

import numpy as np
import pytest

from offrl_jax import envs
from offrl_jax.datasets import (
    behaviour,
    behaviour_dmsd,
    behaviour_gates,
    behaviour_pendulum,
    behaviour_point_maze,
    classic,
    reference,
    schema,
)
from offrl_jax.datasets.behaviour import Component
from offrl_jax.envs import point_maze

MODULES = {
    "pendulum": behaviour_pendulum,
    "point_maze": behaviour_point_maze,
    "gates": behaviour_gates,
    "dmsd": behaviour_dmsd,
}


@pytest.fixture(scope="module")
def generated() -> dict[str, classic.Generated]:
    return {task: classic.generate(task) for task in classic.TASKS}


def _mean_return(made: classic.Generated) -> float:
    return float(schema.episode_returns(made.episodes).mean())


def test_every_dataset_is_valid_and_of_useful_size(generated) -> None:
    assert len(generated) == 16
    for task, made in generated.items():
        schema.validate(made.episodes, task)
        assert 45_000 <= len(made.episodes) <= 100_000, task
        spec = classic.env_spec(classic.split_id(task)[0])
        assert made.episodes.obs.shape[1] == spec.obs_dim
        assert made.episodes.action.shape[1] == spec.action_dim
        assert made.episodes.lengths.max() <= spec.horizon


@pytest.mark.parametrize("environment", ["pendulum", "dmsd"])
def test_qualities_are_clearly_apart(generated, environment: str) -> None:
    minimum, maximum = reference.CLASSIC[environment]
    score = {
        q: 100
        * (_mean_return(generated[f"classic/{environment}-{q}-v0"]) - minimum)
        / (maximum - minimum)
        for q in classic.QUALITIES
    }
    assert abs(score["random"]) < 5
    assert 20 < score["mixed"] < score["medium"] < 65
    assert score["expert"] > 95


def test_generating_twice_gives_the_same_bytes(generated) -> None:
    for environment in classic.ENVIRONMENTS:
        task = f"classic/{environment}-mixed-v0"
        again = classic.generate(task)
        before = generated[task]
        assert again.recipe_hash == before.recipe_hash
        assert schema.dataset_hash(again.episodes) == schema.dataset_hash(
            before.episodes
        )


def test_another_process_gives_the_same_bytes(generated) -> None:
    task = "classic/dmsd-mixed-v0"
    code = (
        "from offrl_jax.datasets import classic, schema\n"
        f"print(schema.dataset_hash(classic.generate({task!r}).episodes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == schema.dataset_hash(generated[task].episodes)


def test_seed_and_task_change_everything(generated) -> None:
    task = "classic/dmsd-mixed-v0"
    other = classic.generate(task, seed=1)
    assert other.recipe_hash != generated[task].recipe_hash
    rows = other.episodes.obs[0] == generated[task].episodes.obs[0]
    assert not rows.all()
    hashes = {made.recipe_hash for made in generated.values()}
    firsts = {made.episodes.obs[:3].tobytes() for made in generated.values()}
    assert len(hashes) == len(firsts) == 16


def test_transitions_are_those_of_the_environment(generated) -> None:
    """Recorded pendulum steps against Gymnasium's own Pendulum-v1."""
    import gymnasium

    episodes = generated["classic/pendulum-medium-v0"].episodes
    env = gymnasium.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    for row in range(0, 400, 7):
        cosine, sine, velocity = episodes.obs[row].astype(np.float64)
        env.state = np.array([np.arctan2(sine, cosine), velocity])  # pyright: ignore
        obs, reward, *_ = env.step(2.0 * episodes.action[row])
        np.testing.assert_allclose(episodes.next_obs[row], obs, atol=1e-5)
        assert episodes.reward[row] == pytest.approx(float(reward), abs=1e-4)
    env.close()


def _cell(obs: np.ndarray) -> tuple[int, int]:
    half = np.array([len(point_maze.LAYOUT[0]), len(point_maze.LAYOUT)]) / 2
    x, y = obs[:2] * half + half
    return int(y), int(x)


def test_medium_maze_data_must_be_stitched(generated) -> None:
    episodes = generated["classic/point_maze-medium-v0"].episodes
    reached = 0
    cells: set[tuple[int, int]] = set()
    for first, last in zip(episodes.starts, episodes.ends, strict=True):
        begin, end = _cell(episodes.obs[first]), _cell(episodes.next_obs[last])
        reached += bool(episodes.terminated[last])
        assert not (begin in point_maze.START_CELLS and episodes.terminated[last])
        cells |= {begin, end}
    # The pieces together cover the whole maze, and some end at the goal.
    assert cells == set(point_maze.free_cells())
    assert 5 <= reached <= 0.05 * len(episodes.ends)


def test_few_mixed_maze_episodes_show_the_whole_way(generated) -> None:
    episodes = generated["classic/point_maze-mixed-v0"].episodes
    whole = sum(
        bool(episodes.terminated[last])
        and _cell(episodes.obs[first]) in point_maze.START_CELLS
        for first, last in zip(episodes.starts, episodes.ends, strict=True)
    )
    assert whole <= 0.03 * len(episodes.ends)


def test_maze_rewards_only_at_terminal_steps(generated) -> None:
    for quality in classic.QUALITIES:
        made = generated[f"classic/point_maze-{quality}-v0"]
        episodes = made.episodes
        np.testing.assert_array_equal(episodes.reward == 1, episodes.terminated)
        assert set(np.unique(episodes.reward)) <= {0.0, 1.0}
        share = episodes.terminated.sum() / len(episodes.ends)
        assert made.success_rate == pytest.approx(share)
    assert generated["classic/point_maze-expert-v0"].success_rate > 0.99
    assert generated["classic/pendulum-expert-v0"].success_rate is None


def test_waypoints_follow_shortest_ways() -> None:
    """Distances against a separate flood fill; each waypoint is one cell nearer."""
    cells = behaviour_point_maze.CELLS
    distance, towards = behaviour_point_maze.distances_and_next()
    for target, cell in enumerate(cells):
        seen = {cell: 0}
        queue = deque([cell])
        while queue:
            i, j = queue.popleft()
            for step in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)):
                if point_maze.LAYOUT[step[0]][step[1]] != "#" and step not in seen:
                    seen[step] = seen[i, j] + 1
                    queue.append(step)
        assert distance[target].tolist() == [seen[c] for c in cells]
        for here, nearer in enumerate(towards[target]):
            expected = max(distance[target, here] - 1, 0)
            assert distance[target, nearer] == expected
            gap = np.abs(np.subtract(cells[here], cells[nearer])).sum()
            assert gap == (0 if here == target else 1)


@pytest.mark.parametrize("environment", classic.ENVIRONMENTS)
@pytest.mark.parametrize("which", ["minimum", "maximum"])
def test_references_are_reproduced(environment: str, which: str) -> None:
    """Fewer episodes under another seed: within four standard errors of both means."""
    recorded = reference.CLASSIC[environment][which == "maximum"]
    found = classic.measure_reference(environment, which, episodes=1024, seed=7)
    assert found.episodes == 1024
    # The recorded mean is of EPISODES episodes and has an error of its own.
    error = found.standard_error * np.sqrt(1 + 1024 / reference.EPISODES)
    assert abs(found.mean - recorded) <= 4 * error + 1e-6


def test_dmsd_references_agree_with_the_published_ones() -> None:
    """NeoRL-2 publishes 30.60 and 849.51 for the same environment."""
    minimum, maximum = reference.CLASSIC["dmsd"]
    span = 849.51 - 30.6
    assert abs(minimum - 30.6) < 0.01 * span
    assert abs(maximum - 849.51) < 0.01 * span


def test_reference_command_prints_every_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "EPISODES", 8)
    reference.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [e, w] for e in classic.ENVIRONMENTS for w in ("minimum", "maximum")
    ]


def test_an_episode_does_not_depend_on_how_many_there_are() -> None:
    module = behaviour_dmsd
    rng = np.random.default_rng(0)
    knobs = behaviour.draw_knobs(
        module.BEHAVIOUR, (Component(300, {"noise": (0, 1)}),), rng
    )
    many = behaviour.rollout(module.BEHAVIOUR, knobs, seed=3)
    few = behaviour.rollout(module.BEHAVIOUR, {k: v[:5] for k, v in knobs.items()}, 3)
    np.testing.assert_array_equal(many.obs[:5], few.obs)
    assert many.obs.shape == (300, 100, 6)


def test_knobs_stay_in_their_ranges_and_unknown_ones_are_refused() -> None:
    mixture = (Component(50, {"noise": (0.2, 0.3)}), Component(70, {"noise": (1, 2)}))
    found = behaviour.draw_knobs(
        behaviour_dmsd.BEHAVIOUR, mixture, np.random.default_rng(0)
    )
    low = (found["noise"] >= 0.2) & (found["noise"] <= 0.3)
    high = (found["noise"] >= 1) & (found["noise"] <= 2)
    assert (low.sum(), high.sum()) == (50, 70)
    assert low[50:].any()  # in random order, so that the last 5 % are of every kind
    assert (found["brake"] == 1.0).all()
    with pytest.raises(ValueError, match="no such knobs"):
        behaviour.draw_knobs(
            behaviour_dmsd.BEHAVIOUR,
            (Component(1, {"gain": (0, 1)}),),
            np.random.default_rng(0),
        )


def test_packing_stops_at_the_first_end() -> None:
    flags = np.array([[0, 1, 0, 1], [0, 0, 0, 1], [1, 1, 1, 1]], bool)
    numbers = np.arange(12, dtype=np.float32).reshape(3, 4)
    rows = behaviour.Rollout(
        obs=numbers[..., None],
        action=numbers[..., None],
        reward=numbers,
        next_obs=numbers[..., None],
        terminated=flags,
        truncated=np.zeros((3, 4), bool),
        success=np.array([[0, 0, 1, 1], [0, 1, 0, 0], [1, 0, 0, 0]], bool),
    )
    assert behaviour.pack(rows).reward.tolist() == [0, 1, 4, 5, 6, 7, 8]
    assert behaviour.successes(rows).tolist() == [False, True, True]


def test_ids_are_read_and_environments_are_known() -> None:
    assert classic.split_id("classic/point_maze-mixed-v0") == ("point_maze", "mixed")
    with pytest.raises(ValueError, match="not a classic task"):
        classic.split_id("classic/cartpole-mixed-v0")
    for environment in classic.ENVIRONMENTS:
        name = classic.env_id(environment)
        assert envs.spec_of(name) == classic.env_spec(environment)
