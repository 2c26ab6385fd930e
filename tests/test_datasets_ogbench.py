"""OGBench's data: procedure, rewards, storage, resumption, official files."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.sparse import csgraph
from test_envs_ogbench import HAS_OGBENCH, needs_ogbench

import offrl_jax
from offrl_jax import catalogue
from offrl_jax.benchmark.preparation import prepare_task, prepare_tasks
from offrl_jax.datasets import ogbench, ogbench_episodes, schema
from offrl_jax.datasets.ogbench import Labels, Raw
from offrl_jax.datasets.ogbench_generation import generate, make_plan
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, UsageError
from offrl_jax.sources import stack_tasks

MAZE = "ogbench/pointmaze-medium-navigate-v0"
MAZE_TASKS = [f"{MAZE[:-3]}-singletask-task{goal}-v0" for goal in range(1, 6)]
SMALL: dict[str, Any] = {"trajectories": 12, "seed": 3, "rows": 50}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with twelve short trajectories of the medium maze, and one held out."""
    if not HAS_OGBENCH:
        pytest.skip("needs the package ogbench (extra ogbench)")
    store = Store(tmp_path_factory.mktemp("ogbench"))
    generate(make_plan(MAZE, **SMALL), store)
    return store


class TestIds:
    def test_every_task_belongs_to_a_dataset(self) -> None:
        assert len(ogbench.TASKS) == 35
        for one, (name, goal) in ogbench.TASKS.items():
            assert one == ogbench.task_id(name, goal)
            assert ogbench.dataset_of(one) == name
            assert ogbench.dataset_of(ogbench.dataset_id(name)) == name

    def test_another_id_is_refused(self) -> None:
        with pytest.raises(UsageError, match="did you mean 'ogbench/scene-play-v0'"):
            ogbench.dataset_of("ogbench/scene-noisy-v0")

    @pytest.mark.parametrize("what", ["trajectories", "seed", "rows"])
    def test_numbers_that_are_too_small_are_refused(self, what: str) -> None:
        with pytest.raises(UsageError, match=f"{what} must be at least .*, got -1"):
            make_plan(MAZE, **{what: -1})

    def test_a_tenth_as_many_are_held_out(self) -> None:
        jobs = make_plan("ogbench/scene-play-v0").jobs
        assert len([job for job in jobs if job[0] == "train"]) == 1000
        assert len([job for job in jobs if job[0] == "val"]) == 100
        assert [split for split, _ in make_plan(MAZE, 9).jobs] == ["train"] * 9


class TestEpisodes:
    def test_by_hand(self) -> None:
        """Two trajectories of four rows: the last of each has no transition."""
        numbers = np.arange(8, dtype=np.float32)
        terminals = np.array([0, 0, 0, 1, 0, 0, 0, 1], bool)
        column = numbers[:, None]
        raw = Raw(column, -column / 8, terminals, column, terminals)
        met = np.array([0, 1, 1, 1, 0, 0, 0, 1], bool)
        found = ogbench.to_episodes(raw, {4: Labels(met - np.float32(1), met)})[4]
        assert found.obs[:, 0].tolist() == [0, 1, 2, 4, 5, 6]
        assert (found.action[:, 0] * -8).tolist() == [0, 1, 2, 4, 5, 6]
        assert found.next_obs[:, 0].tolist() == [1, 2, 3, 5, 6, 7]
        # The step into the goal, from row 0, earns nothing: rewards are of s, not s'.
        assert found.reward.tolist() == [-1, 0, 0, -1, -1, -1]
        assert found.terminated.tolist() == [False, True, True, False, False, False]
        assert found.truncated.tolist() == [False, False, True, False, False, True]
        schema.validate(found, "hand")
        transitions = schema.to_transitions(found)
        assert np.asarray(transitions.discount).tolist() == [1, 0, 0, 1, 1, 1]


@needs_ogbench
class TestRewards:
    def test_of_the_maze_by_hand(self) -> None:
        """Goals are centres of cells 4 wide, met within 1; task 1's is cell (6, 6)."""
        places = np.array(
            [[20.0, 20.0], [20.9, 20.0], [20.8, 20.8], [0, 0]], np.float32
        )
        raw = Raw(places, places, np.ones(4, bool), places, np.zeros((4, 0), np.int64))
        labels = ogbench.label("pointmaze-medium-navigate", raw)
        assert labels[1].met.tolist() == [True, True, False, False]
        assert labels[1].reward.tolist() == [0, 0, -1, -1]
        assert labels[5].met.tolist() == [False, False, False, True]  # cell (1, 1)

    @pytest.mark.parametrize(
        ("name", "goal"), [("scene-play", 2), ("puzzle-3x3-play", 1)]
    )
    def test_of_the_arm_are_its_environments(self, name: str, goal: int) -> None:
        """Labels of recorded positions are the rewards that the simulation gave."""
        from offrl_jax.envs.ogbench import Simulator, begin

        environment = ogbench.DATASETS[name].environment
        env = Simulator(f"{environment}-singletask-task{goal}-v0").spawn()
        begin(env, 1)
        rng = np.random.default_rng(0)
        rewards, qpos, buttons = [], [], []
        for t in range(20):
            if t % 5 == 4:  # something changes: a button, and in the scene the drawer
                env._cur_button_states[t % env._num_buttons] ^= 1
                if environment == "scene":
                    env._data.joint("drawer_slide").qpos[0] = rng.choice([-0.16, 0.0])
            _, reward, _, _, info = env.step(rng.uniform(-1, 1, 5))
            rewards.append(reward)
            qpos.append(info["prev_qpos"])
            buttons.append(info["prev_button_states"])
        empty = np.zeros((20, 1), np.float32)
        states = np.float32(qpos), np.stack(buttons)
        labels = ogbench.label(name, Raw(empty, empty, np.ones(20, bool), *states))
        np.testing.assert_array_equal(labels[goal].reward, rewards)
        assert len(set(rewards)) > 1
        # By hand where it can be: buttons pressed as the goal wants them.
        if environment == "puzzle-3x3":
            wanted = env.task_infos[goal - 1]["goal_button_states"]
            unmet = (np.stack(buttons) != wanted).sum(axis=1)
            np.testing.assert_array_equal(labels[goal].reward, -unmet)

    def test_of_the_cube_by_hand(self) -> None:
        from offrl_jax.envs.ogbench import Simulator

        env = Simulator("cube-single-singletask-task1-v0").spawn()
        goals = [info["goal_xyzs"][0] for info in env.task_infos]
        qpos = np.zeros((10, 21), np.float32)
        qpos[:5, 14:17] = goals
        qpos[5:, 14:17] = np.add(goals, [0.03, 0.0, 0.03])  # 0.042 m away
        empty = np.zeros((10, 1), np.float32)
        none = np.zeros((10, 0), np.int64)
        raw = Raw(empty, empty, np.ones(10, bool), qpos, none)
        for goal, labels in ogbench.label("cube-single-play", raw).items():
            near = np.linalg.norm(qpos[:, 14:17] - goals[goal - 1], axis=1) <= 0.04
            np.testing.assert_array_equal(labels.met, near)
            np.testing.assert_array_equal(labels.reward, near - np.float32(1))
            assert near[goal - 1] and not near[goal + 4]


class TestWays:
    """Of the point through a maze."""

    walls = np.array(
        [
            [1, 1, 1, 1, 1, 1],
            [1, 0, 0, 0, 0, 1],
            [1, 0, 1, 1, 0, 1],
            [1, 0, 1, 0, 0, 1],
            [1, 1, 1, 1, 1, 1],
        ]
    )

    def test_junctions_by_hand(self) -> None:
        free = ogbench_episodes.free_cells(self.walls)
        corridors = {(1, 2), (1, 3), (2, 1), (2, 4)}
        assert set(ogbench_episodes.junctions(self.walls)) == {*free} - corridors

    @pytest.mark.parametrize("distance", [0, 1, 4, 9])
    def test_distances_are_scipys(self, distance: int) -> None:
        free = ogbench_episodes.free_cells(self.walls)
        apart = np.abs(np.array(free)[:, None] - np.array(free)[None]).sum(axis=-1)
        steps = csgraph.shortest_path(apart == 1, unweighted=True)
        for i, start in enumerate(free):
            found = ogbench_episodes.cells_at_distance(self.walls, start, distance)
            assert found == [free[j] for j in np.flatnonzero(steps[i] == distance)]

    @needs_ogbench
    def test_a_short_walk_ends_four_cells_away(self) -> None:
        name = "pointmaze-large-stitch"
        simulator = ogbench_episodes.make_simulator(name)
        maze = simulator.spawn().maze_map
        for number in range(4):
            raw = ogbench_episodes.trajectory(simulator, name, 201, (0, number))
            np.testing.assert_array_equal(raw.qpos, raw.observations)
            cells = [
                tuple(int(k) for k in np.floor(place[::-1] / 4 + 1.5))
                for place in raw.qpos
            ]
            assert all(maze[cell] == 0 for cell in cells)
            far = ogbench_episodes.cells_at_distance(maze, cells[0], 4)
            # It hovers about its goal, which may lie near the border of its cell.
            assert any(cell in far for cell in cells[-50:])
            # A direction of length 1 and noise of standard deviation 0.5, clipped.
            assert np.abs(raw.actions).max() == 1.0
            rest = raw.actions[np.abs(raw.actions).max(axis=1) < 1]
            assert 0.2 < rest.std() < 0.7

    @needs_ogbench
    def test_a_long_walk_goes_on_to_other_goals(self) -> None:
        name = "pointmaze-medium-navigate"
        simulator = ogbench_episodes.make_simulator(name)
        raw = ogbench_episodes.trajectory(simulator, name, 1001, (0, 1))
        moved = np.linalg.norm(raw.qpos[::50] - raw.qpos[0], axis=1)
        assert moved.max() > 10
        # In the last half it is still on its way: no place holds it.
        assert raw.qpos[500:].std(axis=0).max() > 3
        assert raw.terminals.sum() == 1 and raw.terminals[-1]


@needs_ogbench
class TestPlay:
    def test_the_arm_carries_the_cube(self) -> None:
        name = "cube-single-play"
        simulator = ogbench_episodes.make_simulator(name)
        raw = ogbench_episodes.trajectory(simulator, name, 120, (0, 0))
        cube = raw.qpos[:, 14:17]
        assert cube[:, 2].max() > 0.06  # of a cube 0.04 high that lies at 0.02
        assert np.linalg.norm(cube[-1, :2] - cube[0, :2]) > 0.05
        # What is observed of it, in the package's units.
        seen = raw.observations[:, 19:22] / 10 + np.float32([0.425, 0, 0])
        np.testing.assert_allclose(seen, cube, atol=1e-6)
        np.testing.assert_array_equal(raw.observations[:, :6], raw.qpos[:, :6])

    def test_a_trajectory_depends_on_its_number_alone(self) -> None:
        """In the scene, where episodes change the model that they share."""
        name = "scene-play"
        simulator = ogbench_episodes.make_simulator(name)
        alone = ogbench_episodes.trajectory(simulator, name, 25, (0, 7))
        ogbench_episodes.trajectory(simulator, name, 25, (0, 8))
        np.random.seed(5)  # noqa: NPY002  (nobody else's draws matter)
        theirs = np.random.get_state()[1]  # noqa: NPY002
        after = ogbench_episodes.trajectory(simulator, name, 25, (0, 7))
        jax.tree.map(np.testing.assert_array_equal, alone, after)
        now = np.random.get_state()[1]  # noqa: NPY002
        np.testing.assert_array_equal(now, theirs)

    def test_out_of_sight_by_hand(self) -> None:
        inside = np.array([[0.4, 0.0, 0.02], [0.4, -0.32, 0.07], [0.4, 0.28, 0.3]])
        assert ogbench_episodes.cube_in_sight(inside)
        for place in ([0.4, 0.29, 0.02], [0.4, -0.3, 0.05], [0.4, -0.31, 0.09]):
            assert not ogbench_episodes.cube_in_sight(np.vstack([inside, place]))


class TestGeneration:
    def test_any_number_of_processes_gives_the_same(
        self, filled: Store, tmp_path: Path
    ) -> None:
        other = Store(tmp_path)
        told: list[int] = []
        generate(make_plan(MAZE, **SMALL), other, processes=2, tell=told.append)
        assert told == [*range(14)]
        for task in MAZE_TASKS:
            for split in ("train", "val"):
                one, two = filled.record(task, split), other.record(task, split)
                assert one.dataset_hash == two.dataset_hash
                assert one.recipe_hash == two.recipe_hash
                assert other.check(task, split).problem is None

    def test_is_stored_as_five_tasks_once_on_disk(self, filled: Store) -> None:
        for name in ("obs", "action", "next_obs", "truncated"):
            paths = [
                filled.folder(task, "train") / f"{name}.npy" for task in MAZE_TASKS
            ]
            assert len({path.stat().st_ino for path in paths}) == 1
        assert len({filled.record(task).recipe_hash for task in MAZE_TASKS}) == 5
        assert len({filled.record(task).dataset_hash for task in MAZE_TASKS}) > 1
        record = filled.record(MAZE_TASKS[2])
        assert record.transitions == 12 * 49
        assert record.info["trajectories"] == 12
        assert record.source["kind"].startswith("regenerated")
        assert record.source["recipe"]["seed"] == 3
        assert record.source["versions"]["ogbench"].startswith("1.2")
        assert "of s" in record.source["rewards"]

    def test_without_hard_links_arrays_are_copied(
        self, filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(source: Path, target: Path) -> None:
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
        other = Store(tmp_path)
        generate(make_plan(MAZE, **SMALL), other)
        paths = [other.folder(task, "train") / "obs.npy" for task in MAZE_TASKS]
        assert len({path.stat().st_ino for path in paths}) == 5
        for task in MAZE_TASKS:
            assert other.record(task).arrays == filled.record(task).arrays
            assert other.check(task, "train").problem is None

    def test_an_interrupted_one_goes_on(
        self, filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, calls = ogbench_episodes.trajectory, []

        def interrupted(*args: Any) -> Raw:
            calls.append(args[-1])
            if len(calls) == 6:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(ogbench_episodes, "trajectory", interrupted)
        store, plan = Store(tmp_path), make_plan(MAZE, **SMALL)
        with pytest.raises(DataError, match=r"5 of 13 trajectories are kept: the same"):
            generate(plan, store)
        assert not any(store.has(task) for task in MAZE_TASKS)
        folder = plan.folder(store)
        assert not [*folder.glob(".partial-*")]
        # What a killed process leaves is no trajectory.
        (folder / ".partial-1-train-000005.npz").write_bytes(b"half")
        told: list[int] = []
        generate(plan, store, tell=told.append)
        assert told[0] == 5
        assert len(calls) == 6 + 8
        for task in MAZE_TASKS:
            assert store.record(task).dataset_hash == filled.record(task).dataset_hash

    def test_a_longer_one_keeps_what_is_there(
        self, filled: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        short, long = Store(tmp_path / "short"), make_plan(MAZE, **SMALL)
        generate(make_plan(MAZE, 3, seed=3, rows=50), short)
        os.rename(short.path / "generated", tmp_path / "generated")
        calls: list[Any] = []
        real = ogbench_episodes.trajectory
        monkeypatch.setattr(
            ogbench_episodes, "trajectory", lambda *a: calls.append(a) or real(*a)
        )
        generate(long, Store(tmp_path))
        assert len(calls) == 13 - 3
        found = Store(tmp_path).record(MAZE_TASKS[0]).dataset_hash
        assert found == filled.record(MAZE_TASKS[0]).dataset_hash

    def test_a_damaged_trajectory_is_named(self, filled: Store, tmp_path: Path) -> None:
        plan = make_plan(MAZE, **SMALL)
        path = plan.folder(filled) / "train-000004.npz"
        whole = path.read_bytes()
        other = plan.folder(Store(tmp_path))
        other.mkdir(parents=True)
        for one in plan.folder(filled).glob("*.npz"):
            os.link(one, other / one.name)
        damaged = other / path.name
        damaged.unlink()
        damaged.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(DataError, match=r"train-000004\.npz: damaged.*remove it"):
            generate(plan, Store(tmp_path))
        assert not any(Store(tmp_path).has(task) for task in MAZE_TASKS)

    def test_stored_data_are_not_replaced(self, filled: Store) -> None:
        said = generate(make_plan(MAZE, **SMALL), filled)
        assert said.endswith("(there already)")
        with pytest.raises(
            DataError, match=r"12 trajectories of 50 rows, seed 3.*remo"
        ):
            generate(make_plan(MAZE, 13, seed=3, rows=50), filled)

    @needs_ogbench
    def test_a_killed_process_is_told_and_costs_its_work_alone(
        self, tmp_path: Path
    ) -> None:
        store, plan = Store(tmp_path), make_plan(MAZE, 300, rows=50)
        killed = []

        def kill(done: int) -> None:
            if done == 3:
                killed.extend(multiprocessing.active_children()[:1])
                killed[0].kill()

        with pytest.raises(DataError, match=r"a process was killed.*of 330 trajectori"):
            generate(plan, store, processes=2, tell=kill)
        assert killed
        kept = len([*plan.folder(store).glob("[tv]*.npz")])
        assert 3 <= kept < 330
        assert not any(store.has(task) for task in MAZE_TASKS)
        for process in multiprocessing.active_children():
            process.join(10)
        assert not multiprocessing.active_children()


class TestTasks:
    def test_the_entry_says_what_the_data_are(self, filled: Store) -> None:
        loaded = catalogue.load_task(MAZE_TASKS[3], filled)
        task = loaded.task
        assert task.family == "ogbench"
        assert task.env_id == "ogbench/pointmaze-medium-singletask-task4-v0"
        assert "not the authors' files" in task.provenance
        assert loaded.validation is not None
        assert len(loaded.validation) == 49

    def test_absent_data_say_how_to_get_them(self, tmp_path: Path) -> None:
        with pytest.raises(
            DataError, match=r"offrl data generate ogbench/scene-play-v0"
        ):
            catalogue.load_task(
                "ogbench/scene-play-singletask-task1-v0", Store(tmp_path)
            )

    def test_the_score_is_the_success_rate(self, tmp_path: Path) -> None:
        task = catalogue.get_task(MAZE_TASKS[0], Store(tmp_path))
        assert task.reference is not None
        returns, successes = np.array([-1000.0, -12.0]), np.array([False, True])
        scores = catalogue.episode_scores(task.reference, returns, successes)
        assert scores.tolist() == [0.0, 100.0]
        with pytest.raises(ValueError, match="needs successes"):
            catalogue.episode_scores(task.reference, returns, None)

    @pytest.mark.parametrize("obs_transform", ["none", "standardise"])
    def test_goals_share_observations_on_the_device(
        self, filled: Store, obs_transform: str
    ) -> None:
        loaded = [catalogue.load_task(task, filled) for task in MAZE_TASKS]
        own = [prepare_task(one.train, obs_transform, "none") for one in loaded]
        shared = prepare_tasks(loaded, obs_transform, "none")
        rows = 12 * 49
        table = stack_tasks([transitions for transitions, _ in shared])
        for name in ("obs", "next_obs", "action"):
            assert getattr(table.transitions, name).shape == (rows, 2)
        assert table.transitions.reward.shape == (5 * rows,)
        for t, (transitions, stats) in enumerate(own):
            jax.tree.map(np.testing.assert_array_equal, stats, shared[t][1])
            for name in transitions._fields:
                start = getattr(table.offset, name)[t]
                found = getattr(table.transitions, name)[
                    start : start + table.length[t]
                ]
                np.testing.assert_array_equal(found, getattr(transitions, name))

    def test_other_data_are_not_shared(self, filled: Store) -> None:
        one = catalogue.load_task(MAZE_TASKS[0], filled)
        again = catalogue.load_task(MAZE_TASKS[0], filled)
        unknown = dataclasses.replace(again, array_hashes={})
        pair = prepare_tasks([one, unknown], "none", "none")
        table = stack_tasks([transitions for transitions, _ in pair])
        assert table.transitions.obs.shape == (2 * 12 * 49, 2)

    def test_policies_are_scored_by_success(self, filled: Store) -> None:
        runs = offrl_jax.train(
            "bc@quick", MAZE_TASKS[2], seeds=2, updates=10, data_dir=filled.path
        )
        found = offrl_jax.evaluate(runs, episodes=1)
        assert found.successes is not None and found.successes.shape == (2, 1)
        np.testing.assert_array_equal(found.scores, 100 * found.successes.mean(axis=1))
        # One reward of -1 a step, but the last one of a success.
        steps = found.lengths - found.successes
        np.testing.assert_array_equal(found.returns, -steps)
