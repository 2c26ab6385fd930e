"""What a trained critic makes of its data: embeddings of state-action pairs in 2-D.

The embedding of a pair is the last hidden layer of a run's first critic, the features
that its value is linear in, after activation and normalisation.  t-SNE (van der Maaten
& Hinton 2008) projects the embeddings of sampled pairs.  Reads a results folder and the
data store, trains nothing.  The figure needs scikit-learn, an optional extra.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from offrl_jax import networks
from offrl_jax.agents.registry import REGISTRY, get_entry
from offrl_jax.benchmark.checkpoints import Checkpoints
from offrl_jax.benchmark.planning import config_from_plain
from offrl_jax.benchmark.preparation import prepare_task, stream
from offrl_jax.catalogue import LoadedTask, load_task
from offrl_jax.datasets.schema import Episodes
from offrl_jax.datasets.store import Store
from offrl_jax.errors import DataError, ResultsError, UsageError, unknown_name
from offrl_jax.leaderboard.runs import base_of, final_runs
from offrl_jax.results import (
    Job,
    checkpoint_path,
    lock_path,
    read_plan,
    read_rows,
    try_lock,
)
from offrl_jax.types import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAIRS = 2_000
"""Pairs that are drawn where no number is given and the data hold as many."""
PERPLEXITY = 30.0
"""Of t-SNE: the neighbours that a pair's distances count for, effectively."""
FEWEST_PAIRS = 100
"""About three times the perplexity, below which t-SNE sees no neighbourhoods."""


class Pairs(NamedTuple):
    """State-action pairs sampled from a task's data, in the order of the data.

    Attributes:
      index: `[N]`, rows of the training data.
      obs: `[N, O]`, as the agent saw them, standardised where it standardises.
      action: `[N, A]`.
      reward: `[N]`, the task's, untransformed.
      return_to_go: `[N]`, float64, undiscounted sum of the task's rewards from the pair
        to the end of its episode.
    """

    index: np.ndarray
    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    return_to_go: np.ndarray


class Projection(NamedTuple):
    """Embedded pairs.

    Attributes:
      pairs: what was embedded.
      q: `[N]`, the first critic's values.
      position: `[N, 2]`, the projected embeddings.
    """

    pairs: Pairs
    q: np.ndarray
    position: np.ndarray


def find_run(
    folder: Path,
    on_message: Callable[[str], None],
    *,
    seed: int,
    agent: str | None = None,
    task: str | None = None,
    setting: str | None = None,
    run_id: str | None = None,
) -> tuple[Job, int]:
    """The planned job and member that the choices leave, of the runs that count.

    Args:
      folder: of results.
      on_message: told of torn last lines.
      seed: of the run.
      agent: label, or name, which stands for every preset.
      task: task id.
      setting: name of the setting.
      run_id: of a job, to tell runs of different length apart.

    Raises:
      UsageError: no run, or several, are left.
      ResultsError: the folder has no plan, or the run is not finished or diverged.
    """
    rows, plan = read_rows(folder, on_message), read_plan(folder)
    if plan is None:
        raise ResultsError(
            f"{folder}: no plan.json, without which no checkpoint can be read; name "
            "the results folder that offrl run or offrl benchmark wrote"
        )
    jobs = {job.run_id: job for job in plan.jobs}
    left = [run for run in final_runs(rows, plan)[0] if run.run_id in jobs]
    options: tuple[tuple[str, Any, Callable[[Any], tuple[Any, ...]]], ...] = (
        ("agent", agent, lambda run: (run.cell.agent, base_of(run.cell.agent))),
        ("task", task, lambda run: (run.cell.task,)),
        ("seed", seed, lambda run: (run.seed,)),
        ("setting", setting, lambda run: (run.cell.setting,)),
        ("run-id", run_id, lambda run: (run.run_id,)),
    )
    for option, wanted, names in options:
        known = {str(names(run)[0]) for run in left}
        if wanted is not None:
            kept = [run for run in left if wanted in names(run)]
            if not kept:
                raise unknown_name(f"{option} of these results", str(wanted), known)
            left = kept
            known = {str(names(run)[0]) for run in left}
        if len(known) > 1:
            raise UsageError(
                f"{folder} holds several runs; choose one with --{option}: "
                + ", ".join(sorted(known))
            )
    if not left:
        raise ResultsError(f"{folder}: the plan holds no run; run something into it")
    (run,) = left
    job = jobs[run.run_id]
    name = f"{run.cell.agent} on {run.cell.task}, seed {run.seed}"
    if run.diverged:
        raise ResultsError(f"{name}: diverged, its critic has no finite embedding")
    if run.row is None:
        why = f" ({run.failure})" if run.failure else ""
        raise ResultsError(
            f"{name}: not finished, {run.reached} of {job.updates_total} updates{why}; "
            "the command that began it continues it"
        )
    (index,) = (
        i
        for i, member in enumerate(job.members)
        if (member.task, member.setting, member.seed)
        == (run.cell.task, run.cell.setting, run.seed)
    )
    return job, index


def critic_module(job: Job) -> nn.Module:
    """The network of the job's critics.

    Raises:
      UsageError: the agent has none.
    """
    entry = get_entry(base_of(job.agent))
    if entry.critic is None:
        having = sorted(name for name, e in REGISTRY.items() if e.critic is not None)
        raise UsageError(
            f"agent '{entry.name}' has no critic to embed pairs with; agents that "
            f"have one: {', '.join(having)}"
        )
    return entry.critic(config_from_plain(entry.config, job.config))


def restore_critic(
    folder: Path, job: Job, index: int, on_message: Callable[[str], None]
) -> networks.Params:
    """Parameters of the first critic of a finished run, from the job's last checkpoint.

    Args:
      folder: of results.
      job: from its plan.
      index: of the member.
      on_message: told of damaged generations.

    Raises:
      ResultsError: there is no checkpoint, or not the one of these members at the end
        of training, or another process is working on the job.
    """
    path = checkpoint_path(folder, job.run_id)
    again = "embed before checkpoints are removed, or train into another folder"
    if not path.is_dir():
        raise ResultsError(f"{path}: no checkpoint, it was removed; {again}")
    with try_lock(lock_path(folder, job.run_id)) as held:
        if not held:
            raise ResultsError(f"{job.run_id}: another process is working on it; wait")
        try:
            # Without a template: plain arrays by name, whatever the number of devices.
            found = Checkpoints(path, on_message).restore(None)
        except ValueError as error:
            raise ResultsError(
                f"{path}: cannot be restored ({str(error).splitlines()[0][:160]}); "
                "use the version of offrl_jax that wrote it"
            ) from error
    if found is None:
        raise ResultsError(f"{path}: holds no undamaged checkpoint; {again}")
    saved, meta = found
    population = saved["population"]
    phase = list(job.phase_updates)[meta["phase"]]
    step = int(population["step"][0])
    if (phase, step) != (list(job.phase_updates)[-1], job.updates_total):
        raise ResultsError(
            f"{path}: its last checkpoint is of update {step} of phase {phase}, not of "
            f"the end; {again}"
        )
    # The members' keys never change: they tell whose parameters these are.
    keys = [
        np.asarray(jax.random.key_data(jax.random.key(stream(m.task, m.seed))))
        for m in job.members
    ]
    if not np.array_equal(population["key"], np.stack(keys)):
        raise ResultsError(
            f"{path}: is of other members than the plan says, so no run can be told "
            f"from another; {again}"
        )
    return jax.tree.map(lambda leaf: leaf[index], population["agent"]["critics"][0])


def load_data(job: Job, index: int, store: Store) -> LoadedTask:
    """The data that a run was trained on.

    Raises:
      DataError: they are absent or damaged, or others by now.
    """
    name = job.members[index].task
    task = load_task(name, store)
    problem = store.check(name, "train").problem
    if problem is not None:
        raise DataError(f"{name}: {problem}")
    then = job.datasets[name]
    # Generated data are the same if the recipe is, on any machine.
    now = {"recipe_hash": task.recipe_hash, "dataset_hash": task.dataset_hash}
    kind = "recipe_hash" if then["recipe_hash"] else "dataset_hash"
    if then[kind] != now[kind]:
        raise DataError(
            f"{name}: the data in {store.path} are not those of the run; point "
            "--data-dir to them"
        )
    return task


def returns_to_go(episodes: Episodes) -> np.ndarray:
    """Undiscounted sum of rewards from each row to its episode's end, `[N]` float64."""
    reward = np.asarray(episodes.reward, np.float64)
    ends = np.flatnonzero(episodes.terminated | episodes.truncated)
    found = np.empty_like(reward)
    start = 0
    for end in ends:
        part = slice(start, end + 1)
        found[part] = np.cumsum(reward[part][::-1])[::-1]
        start = end + 1
    return found


def sample_pairs(
    task: LoadedTask, job: Job, count: int | None, random_seed: int
) -> Pairs:
    """Pairs drawn from the training data, uniformly and without repetition.

    Args:
      task: with its data.
      job: whose agent's structure names the transforms of the data.
      count: N; None: `PAIRS`, or all if there are fewer.
      random_seed: of the draw.

    Raises:
      UsageError: more than there are, or too few for neighbourhoods, or a seed that
        is none.
    """
    if not 0 <= random_seed < 2**32:
        raise UsageError(f"--random-seed is {random_seed}: choose 0 to {2**32 - 1}")
    episodes = task.train
    transitions, _ = prepare_task(
        episodes, job.config["obs_transform"], job.config["reward_transform"]
    )
    there = len(episodes.reward)
    size = min(PAIRS, there) if count is None else count
    if size > there:
        raise UsageError(
            f"--pairs is {size}: {task.task.id} has {there} transitions to draw from"
        )
    if size < FEWEST_PAIRS:
        what = f"--pairs is {size}" if count is not None else f"there are {size} pairs"
        raise UsageError(
            f"{what}: a projection of neighbourhoods needs {FEWEST_PAIRS} or more"
        )
    rng = np.random.default_rng(random_seed)
    index = np.sort(rng.choice(there, size, replace=False))
    return Pairs(
        index=index,
        obs=np.asarray(transitions.obs)[index],
        action=np.asarray(transitions.action)[index],
        reward=np.asarray(episodes.reward)[index],
        return_to_go=returns_to_go(episodes)[index],
    )


def last_hidden(
    critic: nn.Module, params: networks.Params, obs: Array, action: Array
) -> tuple[Array, Array]:
    """What the last dense layer of a critic is given, and the critic's value.

    Args:
      critic: `(obs, action) -> [N]`, whose last `nn.Dense` is its linear output.
      params: of it.
      obs: `[N, O]`.
      action: `[N, A]`.

    Returns:
      Features `[N, F]`, F the width of the last hidden layer, and values `[N]`.
    """
    inputs: list[Array] = []

    def keep(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, nn.Dense) and context.method_name == "__call__":
            inputs.append(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        q = networks.apply(critic, params, obs, action)
    return inputs[-1], q


def check_extra() -> None:
    """Tells early what the projection would miss.

    Raises:
      UsageError: scikit-learn is not installed.
    """
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"embeddings need scikit-learn ({error}); install the extra: pip install "
            "'offrl-jax[embed]'"
        ) from error


def project(features: np.ndarray, random_seed: int) -> np.ndarray:
    """t-SNE of features `[N, F]` in two dimensions: `[N, 2]`, float32.

    It starts from the first two principal components, which keeps the global structure
    (Kobak & Linderman 2021); positions have no unit.

    Raises:
      ResultsError: the features are not finite, or are all the same.
      UsageError: scikit-learn is not installed.
    """
    if not np.isfinite(features).all():
        raise ResultsError("the critic's embeddings are not finite: the run diverged")
    if not np.ptp(features, axis=0).any():
        raise ResultsError(
            "the critic's embeddings are the same for all pairs: its hidden units are "
            "all dead; there is nothing to project"
        )
    check_extra()
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # a dependency of scikit-learn

    tsne = TSNE(perplexity=PERPLEXITY, init="pca", random_state=random_seed, n_jobs=1)
    # One thread: sums in one order, and no waiting for cores that others use.
    with threadpool_limits(1):
        return np.asarray(tsne.fit_transform(features), np.float32)


def embed(
    critic: nn.Module, params: networks.Params, pairs: Pairs, random_seed: int
) -> Projection:
    """Embeds pairs with one critic and projects them."""
    features, q = jax.jit(partial(last_hidden, critic))(params, pairs.obs, pairs.action)
    position = project(np.asarray(features), random_seed)
    return Projection(pairs, np.asarray(q), position)


def embed_run(
    folder: Path,
    store: Store,
    on_message: Callable[[str], None],
    *,
    seed: int,
    agent: str | None = None,
    task: str | None = None,
    setting: str | None = None,
    run_id: str | None = None,
    pairs: int | None = None,
    random_seed: int = 0,
) -> tuple[Projection, str]:
    """From a results folder to a projection and its title.

    Arguments and errors are those of `find_run`, `critic_module`, `check_extra`,
    `restore_critic`, `load_data`, `sample_pairs` and `project`, in this order.
    """
    job, index = find_run(
        folder,
        on_message,
        seed=seed,
        agent=agent,
        task=task,
        setting=setting,
        run_id=run_id,
    )
    critic = critic_module(job)
    check_extra()
    params = restore_critic(folder, job, index, on_message)
    drawn = sample_pairs(load_data(job, index, store), job, pairs, random_seed)
    member = job.members[index]
    title = f"{job.agent} on {member.task}, {member.setting}, seed {member.seed}"
    return embed(critic, params, drawn, random_seed), title


def to_csv(projection: Projection) -> str:
    """The projection as CSV, one line per pair."""
    pairs = projection.pairs
    columns: Mapping[str, Iterable[Any]] = {
        "row": pairs.index,
        "x": projection.position[:, 0],
        "y": projection.position[:, 1],
        "reward": pairs.reward,
        "return_to_go": pairs.return_to_go,
        "q": projection.q,
    }
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(columns)
    for row in zip(*columns.values(), strict=True):
        writer.writerow([f"{value:.7g}" for value in row])
    return stream.getvalue()


def draw(projection: Projection, title: str) -> Figure:
    """The projection three times, coloured by reward, return-to-go and Q.

    Colours span the 1st to 99th percentile, so that one outlier does not take them all.

    Raises:
      UsageError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"figures need matplotlib ({error}); install it: pip install matplotlib"
        ) from error
    pairs = projection.pairs
    values = {
        "reward": pairs.reward,
        "return to go (undiscounted)": pairs.return_to_go,
        "Q of the first critic": projection.q,
    }
    figure = Figure(figsize=(12.0, 4.4), layout="constrained")
    for axes, (name, colour) in zip(
        figure.subplots(1, len(values)), values.items(), strict=True
    ):
        low, high = np.percentile(colour, (1, 99))
        dots = axes.scatter(
            *projection.position.T,
            c=colour,
            s=6,
            cmap="viridis",
            vmin=low,
            vmax=high,
            linewidths=0,
            rasterized=True,
        )
        axes.set(xticks=(), yticks=(), box_aspect=1)
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(name, fontsize="medium")
        bar = figure.colorbar(dots, ax=axes, shrink=0.8, extend="both")
        bar.ax.tick_params(labelsize="small")
    figure.suptitle(title, fontsize="medium")
    return figure
