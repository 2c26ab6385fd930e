"""`offrl embed`: features against NumPy, positions against scikit-learn, refusals."""

from __future__ import annotations

import csv
import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_runner import (
    DATA,
    RESULTS,
    TINY,
    USAGE,
    arrays,
    files,
    offrl,
    settings,
    write_npz,
)

from offrl_jax import embedding, networks
from offrl_jax.agents.entry import resolve
from offrl_jax.agents.registry import REGISTRY, get_entry
from offrl_jax.benchmark.checkpoints import Checkpoints
from offrl_jax.datasets.schema import to_transitions
from offrl_jax.datasets.store import Store
from offrl_jax.errors import ResultsError
from offrl_jax.results import (
    checkpoint_path,
    lock_path,
    read_plan,
    try_lock,
    write_plan,
)
from offrl_jax.types import Spec

pytest_plugins = ["cli_fixtures"]

SMALL = ("--updates", "40", "--episodes", "2", "--evaluations", "1")
WIDTHS = ("--set", "hidden=8,16", "--set", "batch_size=16")
EMBED = ("embed", "out", "--out", "e.png")


@pytest.fixture(scope="module")
def _trained(tmp_path_factory):
    """A store and results: two seeds of td3_bc, one of bc, on 45 x 4 transitions."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings(folder).items():
            patch.setenv(name, value)
        patch.chdir(folder)
        npz = write_npz(folder / "tiny.npz", **arrays(episodes=45, length=4))
        assert offrl("data", "import", str(npz), "--task", TINY) == 0
        for agent, seeds in (("td3_bc", "2"), ("bc", "1")):
            command = ("run", "--agent", agent, "--task", TINY, "--results", "out")
            assert offrl(*command, "--seeds", seeds, *SMALL, *WIDTHS) == 0
    return folder


@pytest.fixture
def home(_trained, tmp_path, monkeypatch, capsys):
    """A copy in the working directory, for the tests to damage."""
    for name, value in settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    shutil.copytree(_trained / "data", tmp_path / "data")
    shutil.copytree(_trained / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    # The command chooses the CPU for its process, which here is the tests'.
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    capsys.readouterr()
    return tmp_path


def _silent(line: str) -> None:
    pytest.fail(f"unexpected message: {line}")


def _store(home: Path) -> Store:
    return Store(home / "data")


def test_the_restored_critic_is_the_runs(home):
    """By the seed: another member's parameters are others."""
    found = []
    for seed in (0, 1):
        job, index = embedding.find_run(
            home / "out", _silent, agent="td3_bc", seed=seed
        )
        assert job.members[index].seed == seed
        found.append(embedding.restore_critic(home / "out", job, index, _silent))
    saved, _ = Checkpoints(checkpoint_path(home / "out", job.run_id)).restore(None)  # type: ignore[misc]
    critic = saved["population"]["agent"]["critics"][0]
    for seed, params in enumerate(found):
        assert jax.tree.structure(params) == jax.tree.structure(critic)
        for leaf, every in zip(
            jax.tree.leaves(params), jax.tree.leaves(critic), strict=True
        ):
            np.testing.assert_array_equal(leaf, every[seed])
    assert not np.array_equal(*(jax.tree.leaves(params)[1] for params in found))


def test_pairs_are_rows_of_the_data_as_the_agent_saw_them(home):
    job, index = embedding.find_run(home / "out", _silent, agent="td3_bc", seed=0)
    task = embedding.load_data(job, index, _store(home))
    pairs = embedding.sample_pairs(task, job, 120, 7)
    again = embedding.sample_pairs(task, job, 120, 7)
    other = embedding.sample_pairs(task, job, 120, 8)
    np.testing.assert_array_equal(pairs.index, again.index)
    assert not np.array_equal(pairs.index, other.index)
    assert len(np.unique(pairs.index)) == 120
    raw = to_transitions(task.train)
    obs = np.asarray(task.train.obs)
    # td3_bc standardises, as its authors: std + 1e-3.
    want = (obs - obs.mean(0)) / (obs.std(0) + 1e-3)
    np.testing.assert_allclose(pairs.obs, want[pairs.index], atol=1e-5)
    np.testing.assert_array_equal(pairs.action, np.asarray(raw.action)[pairs.index])
    reward = np.asarray(task.train.reward, np.float64)
    for place, row in enumerate(pairs.index):
        end = 4 * (row // 4) + 4  # Episodes of four steps, all truncated.
        assert pairs.return_to_go[place] == pytest.approx(reward[row:end].sum())
    assert len(embedding.sample_pairs(task, job, None, 0).index) == len(reward)


def _numpy_critic(layers, obs, action, activation):
    x = np.concatenate([obs, action], axis=1)
    for kernel, bias in layers[:-1]:
        x = activation(x @ kernel + bias)
    kernel, bias = layers[-1]
    return x, (x @ kernel + bias)[:, 0]


@pytest.mark.parametrize("activation", [nn.relu, nn.elu], ids=["relu", "elu"])
def test_features_of_a_critic_by_hand(activation):
    critic = networks.Critic((5, 7), activation=activation)
    rng = np.random.default_rng(0)
    obs, action = (rng.normal(size=(6, n)).astype(np.float32) for n in (3, 2))
    params = critic.init(jax.random.key(1), jnp.asarray(obs), jnp.asarray(action))
    mlp = params["params"]["MLP_0"]
    layers = [
        (np.asarray(mlp[name]["kernel"]), np.asarray(mlp[name]["bias"]))
        for name in ("Dense_0", "Dense_1", "Dense_2")
    ]
    by_hand = {
        nn.relu: lambda x: np.maximum(x, 0),
        nn.elu: lambda x: np.where(x > 0, x, np.expm1(x)),
    }[activation]
    want = _numpy_critic(layers, obs, action, by_hand)
    got = embedding.last_hidden(critic, params, jnp.asarray(obs), jnp.asarray(action))
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_agent_declares_the_critic_that_its_state_has(name):
    """The value is linear in the features, whatever the layers below are."""
    entry = get_entry(name)
    config, hyper = resolve(entry, family="", preset="quick", overrides={})
    agent = entry.make(config, Spec(3, 2, 10))
    shapes = jax.eval_shape(agent.init, jax.random.key(0), hyper)
    if entry.critic is None:
        assert not hasattr(shapes, "critics")
        return
    obs, action = jnp.ones((5, 3)), jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)
    critic = entry.critic(config)
    own = jax.eval_shape(critic.init, jax.random.key(1), obs, action)
    assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes.critics[0])
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), own
    )
    features, q = embedding.last_hidden(critic, params, obs, action)
    assert features.shape[0] == 5 and q.shape == (5,)
    (kernel,) = (
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if leaf.shape == (features.shape[1], 1)
    )
    # Differences between pairs do not see the bias.
    linear = np.asarray(features @ kernel)[:, 0]
    np.testing.assert_allclose(q - q[0], linear - linear[0], atol=1e-5)


def test_returns_to_go_of_episodes_of_any_length(home):
    job, index = embedding.find_run(home / "out", _silent, agent="td3_bc", seed=0)
    train = embedding.load_data(job, index, _store(home)).train
    short = dataclasses.replace(
        train,
        **{
            field: np.asarray(getattr(train, field))[:4]
            for field in ("obs", "action", "next_obs")
        },
        reward=np.array([1.0, 2.0, 4.0, 8.0], np.float32),
        terminated=np.array([True, False, False, False]),
        truncated=np.array([False, False, False, True]),
    )
    np.testing.assert_array_equal(embedding.returns_to_go(short), [1, 14, 12, 8])


def test_degenerate_features_are_told():
    with pytest.raises(ResultsError, match="all dead"):
        embedding.project(np.zeros((200, 4), np.float32), 0)
    with pytest.raises(ResultsError, match="not finite"):
        embedding.project(np.full((200, 4), np.nan, np.float32), 0)


class TestProjection:
    @pytest.fixture(autouse=True)
    def _needs_the_extra(self):
        pytest.importorskip("sklearn", reason="t-SNE needs the extra `embed`")

    def test_command(self, home, capsys):
        command = (*EMBED, "--agent", "td3_bc", "--seed", "1", "--pairs", "120")
        before = files(home / "out")
        assert offrl(*command) == 0
        assert "wrote e.png and e.csv, 120 pairs" in capsys.readouterr().out
        assert files(home / "out") == before
        with (home / "e.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        assert list(rows[0]) == ["row", "x", "y", "reward", "return_to_go", "q"]
        # The values, by NumPy from the checkpoint and the data.
        job, index = embedding.find_run(home / "out", _silent, agent="td3_bc", seed=1)
        params = embedding.restore_critic(home / "out", job, index, _silent)
        mlp = params["params"]["MLP_0"]
        layers = [
            (mlp[f"Dense_{i}"]["kernel"], mlp[f"Dense_{i}"]["bias"]) for i in range(3)
        ]
        assert [kernel.shape[1] for kernel, _ in layers] == [8, 16, 1]
        task = embedding.load_data(job, index, _store(home))
        pairs = embedding.sample_pairs(task, job, 120, 0)
        features, q = _numpy_critic(
            layers, pairs.obs, pairs.action, lambda x: np.maximum(x, 0)
        )
        column = {
            name: np.array([float(row[name]) for row in rows]) for name in rows[0]
        }
        np.testing.assert_array_equal(column["row"], pairs.index)
        np.testing.assert_allclose(column["q"], q, atol=1e-5)
        np.testing.assert_allclose(column["reward"], pairs.reward, rtol=1e-6)
        np.testing.assert_allclose(
            column["return_to_go"], pairs.return_to_go, rtol=1e-6
        )
        # Neighbours among the features stay neighbours, far better than by chance.
        from sklearn.manifold import trustworthiness

        position = np.stack([column["x"], column["y"]], axis=1)
        assert trustworthiness(features, position, n_neighbors=10) > 0.9
        shuffled = np.random.default_rng(0).permutation(position)
        assert trustworthiness(features, shuffled, n_neighbors=10) < 0.6
        from matplotlib.image import imread

        image = imread(home / "e.png")
        assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 200
        # Again, the same bytes; under another seed, other pairs.
        first = {name: (home / name).read_bytes() for name in ("e.png", "e.csv")}
        assert offrl(*command) == 0
        for name, content in first.items():
            assert (home / name).read_bytes() == content
        assert offrl(*command, "--random-seed", "1") == 0
        assert (home / "e.csv").read_bytes() != first["e.csv"]


class TestRefusals:
    """One line each, and no file is changed."""

    @pytest.mark.parametrize(
        "arguments, code, parts",
        [
            ((), USAGE, ("several runs", "--agent: bc, td3_bc")),
            (("--agent", "bc"), USAGE, ("'bc' has no critic", "td3_bc")),
            (("--agent", "iql"), USAGE, ("unknown agent of these results 'iql'",)),
            (("--agent", "td3_bc", "--seed", "5"), USAGE, ("seed", "'5'", "0, 1")),
            (("--agent", "td3_bc", "--task", "local/tin-v0"), USAGE, (TINY,)),
            (("--agent", "td3_bc", "--setting", "x"), USAGE, ("setting", "'x'")),
            (("--agent", "td3_bc", "--run-id", "x"), USAGE, ("run-id", "'x'")),
            (("--agent", "td3_bc", "--pairs", "20"), USAGE, ("--pairs is 20", "100")),
            (("--agent", "td3_bc", "--pairs", "999"), USAGE, ("has 172 transitions",)),
            (("--agent", "td3_bc", "--random-seed", "-1"), USAGE, ("--random-seed",)),
        ],
    )
    def test_choices(self, home, refused, arguments, code, parts):
        self._needs_sklearn(arguments)
        refused(code, parts, *EMBED, *arguments)

    def _needs_sklearn(self, arguments):
        """What comes after the check of the extra."""
        if {"--pairs", "--random-seed"} & set(arguments):
            pytest.importorskip("sklearn", reason="is told first that it is missing")

    def test_suffix(self, home, refused):
        refused(USAGE, ".gif", "embed", "out", "--out", "e.gif", "--agent", "td3_bc")

    def test_without_the_extra(self, home, refused, monkeypatch):
        monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
        parts = ("need scikit-learn", "pip install 'offrl-jax[embed]'")
        refused(USAGE, parts, *EMBED, "--agent", "td3_bc")

    @pytest.mark.parametrize(
        "damage, code, parts",
        [
            ("plan", RESULTS, ("no plan.json",)),
            ("checkpoints", RESULTS, ("no checkpoint, it was removed",)),
            ("generations", RESULTS, ("holds no undamaged checkpoint",)),
            ("data", DATA, (TINY, "offrl data import")),
            ("other data", DATA, ("not those of the run",)),
            ("other members", RESULTS, ("other members than the plan says",)),
            ("lock", RESULTS, ("another process is working on it",)),
            ("rows", RESULTS, ("not finished, 0 of 40 updates",)),
        ],
    )
    def test_what_is_missing(
        self, home: Path, refused: Callable[..., None], damage, code, parts
    ):
        pytest.importorskip("sklearn", reason="is told first that it is missing")
        out = home / "out"
        plan = read_plan(out)
        assert plan is not None
        (job,) = (job for job in plan.jobs if job.agent == "td3_bc")
        command = (*EMBED, "--agent", "td3_bc")
        if damage == "lock":
            with try_lock(lock_path(out, job.run_id)) as held:
                assert held
                refused(code, parts, *command)
            return
        if damage == "plan":
            (out / "plan.json").unlink()
        elif damage == "checkpoints":
            shutil.rmtree(out / "checkpoints")
        elif damage == "generations":
            for path in checkpoint_path(out, job.run_id).iterdir():
                shutil.rmtree(path)
        elif damage == "data":
            shutil.rmtree(home / "data")
        elif damage == "rows":
            for path in (out / "rows").glob("td3_bc*"):
                path.unlink()
        elif damage == "other members":
            turned = dataclasses.replace(job, members=job.members[::-1])
            jobs = tuple(turned if j is job else j for j in plan.jobs)
            write_plan(out, dataclasses.replace(plan, jobs=jobs))
        else:
            hashes = {TINY: {**job.datasets[TINY], "dataset_hash": "0" * 64}}
            changed = dataclasses.replace(job, datasets=hashes)
            jobs = tuple(changed if j is job else j for j in plan.jobs)
            write_plan(out, dataclasses.replace(plan, jobs=jobs))
        refused(code, parts, *command)
