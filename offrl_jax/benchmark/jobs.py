"""One job from its plan to its rows: train in chunks, evaluate, checkpoint, resume."""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from offrl_jax.benchmark import provenance
from offrl_jax.benchmark.checkpoints import Checkpoints
from offrl_jax.benchmark.parts import (
    Part,
    folder_of,
    is_out_of_memory,
    join,
    names_of,
    part_of,
    read_parts,
    restore,
    write_parts,
)
from offrl_jax.benchmark.preparation import prepare
from offrl_jax.benchmark.progress import Reporter
from offrl_jax.benchmark.recording import (
    has_all_rows,
    record_point,
    recording_steps,
    row_of,
    write_failure,
)
from offrl_jax.catalogue import LoadedTask, episode_scores
from offrl_jax.envs.base import PureEnv
from offrl_jax.evaluation import EpisodeResults, Evaluator
from offrl_jax.population import PopulationState, Sums, from_host, to_host
from offrl_jax.results import (
    Job,
    MetricFile,
    Row,
    RowFile,
    checkpoint_path,
    metric_path,
    row_path,
)

CHECKPOINT_SECONDS = 25.0
"""Longest training time between two checkpoints: a kill loses less than 30 s."""
UNSAVED_SECONDS = 5.0
"""Training time that an evaluation, which may be long, may put at risk."""
CHUNK_SECONDS = 1.0
"""Aimed duration of one compiled call: a bar moves, a signal is heard."""
FIRST_CHUNK = 64
"""Updates of the first chunk, from which the speed is estimated."""


class Stopped(Exception):
    """The user asked to stop; everything is saved."""


class JobFailed(Exception):
    """One job cannot be finished on this device; the others may."""


@dataclasses.dataclass
class _Clock:
    """Seconds spent so far; survives a resume in the checkpoint's meta data."""

    train: float = 0.0
    compile: float = 0.0
    split_changed: bool = False


def run_job(
    job: Job,
    tasks: Mapping[str, LoadedTask],
    folder: Path,
    progress: Reporter,
    stop: Callable[[], bool],
) -> None:
    """Trains and evaluates a job, from wherever it was left, until all rows are there.

    The caller holds the job's lock.

    Args:
      job: of the plan.
      tasks: loaded tasks by id.
      folder: of the results.
      progress: told how far it is.
      stop: asked after every chunk; when true, everything is saved and `Stopped`
      raised.

    Raises:
      Stopped: see `stop`.
      ResultsError: a row, point or checkpoint could not be written.
      JobFailed: the device gave up, or single runs need more memory than it has; rows
        say so, and all other runs are finished.
    """
    with (
        RowFile(row_path(folder, job.run_id), progress.say) as rows,
        MetricFile(metric_path(folder, job.run_id), progress.say) as points,
    ):
        files = _Files(rows, points, checkpoint_path(folder, job.run_id))
        try:
            failed = _run_parts(job, tasks, files, progress, stop)
        except jax.errors.JaxRuntimeError as error:
            reason = _reason(error)
            write_failure(job, rows, reason)
            raise JobFailed(reason) from error
    if failed:
        raise JobFailed(
            f"{len(failed)} of {len(job.members)} runs need more memory than there is, "
            f"each by itself ({failed[-1]}); make batch_size or hidden smaller"
        )


class _Files(NamedTuple):
    """Where a job writes: rows, points, and the folder of its checkpoints."""

    rows: RowFile
    points: MetricFile
    checkpoints: Path


def _run_parts(
    job: Job,
    tasks: Mapping[str, LoadedTask],
    files: _Files,
    progress: Reporter,
    stop: Callable[[], bool],
) -> list[str]:
    """Runs a job whole, or in the parts that memory forced it into, now or before.

    Returns:
      The reasons of runs that do not even fit alone.
    """
    path = files.checkpoints
    parts = read_parts(path, job)
    failed: list[str] = []
    template: Any = None
    position = 0
    while position < len(parts):
        part = parts[position]
        own = part_of(job, part)
        if len(parts) > 1 and has_all_rows(own, files.rows):
            position += 1
            continue
        try:
            run = _Run(job, part, tasks, files, progress, stop)
            try:
                template = run.run()
            finally:
                run.close()
            position += 1
            continue
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = _reason(error)
        # Beyond the handler, whose traceback holds the arrays that did not fit.
        run = None
        gc.collect()
        if part.size == 1:
            write_failure(own, files.rows, reason)
            failed.append(reason)
            position += 1
            continue
        parts[position : position + 1] = part.halves()
        write_parts(path, parts)
        progress.say(
            f"{job.run_id}: {part.size} runs at once need more memory than there is "
            f"({reason}); they go on in halves, and their rows will say split_changed"
        )
    if len(parts) > 1 and not failed and template is not None:
        join(path, job, parts, template, progress.say)
    return failed


def _reason(error: BaseException) -> str:
    """The first line of an error, shortened."""
    lines = str(error).splitlines()
    return lines[0][:160] if lines else type(error).__name__


class _Run:
    """The host loop of one job: owns clock, bar, rows, points and checkpoints.

    The sums of the metrics since the last point are empty whenever a phase begins; in
    between they lie beside the state in every checkpoint, so that an interval that was
    interrupted goes on.
    """

    def __init__(
        self,
        whole: Job,
        part: Part,
        tasks: Mapping[str, LoadedTask],
        files: _Files,
        progress: Reporter,
        stop: Callable[[], bool],
    ) -> None:
        self.whole, self.part = whole, part
        self.job = job = part_of(whole, part)
        self.tasks = tasks
        self.files = files
        self.rows, self.points = files.rows, files.points
        self.progress = progress
        self.stop = stop
        self.checkpoints = Checkpoints(
            folder_of(files.checkpoints, whole, part), say=progress.say
        )
        self.ready = prepare(job, tasks)
        self.clock = _Clock(split_changed=part.size < len(whole.members))
        self.saved_at = time.monotonic()
        self.all_updates = sum(job.phase_updates.values())
        self.evaluators: dict[tuple[str, int], Evaluator] = {}
        self.note = ""
        self.sums: list[Sums] = []

    def run(self) -> Any:
        """Trains and evaluates to the end; returns what was saved last."""
        job, agent = self.job, self.ready.agent
        state = self.ready.population.init(self.ready.streams, self.ready.own_hyper)
        args = (state, self.ready.table, self.ready.task, self.ready.hyper)
        self.sums = [empty(*args) for empty in self.ready.population.no_sums]
        phase, state = self._resume(state)
        label = f"{job.agent} on {_subject(job)}, {len(job.members)} runs"
        done = self._done(phase, state)
        self.progress.begin(label, self.all_updates, done, len(job.members))
        for index in range(phase, len(agent.phases)):
            if index > phase:
                state = self.ready.population.next_phase(state)
            state = self._train_phase(index, state)
        saved = self._save(len(agent.phases) - 1, state, keep=1)
        speed = len(job.members) * self.all_updates / max(self.clock.train, 1e-9)
        self.progress.end(
            f"{label}: done, {self.clock.train:.0f} s of training, "
            f"{self.clock.compile:.0f} s of compilation, {speed:,.0f} updates/s"
        )
        return saved

    def close(self) -> None:
        """Frees simulators and their threads."""
        for env in self.ready.envs.values():
            if not isinstance(env, PureEnv):
                env.close()

    def _resume(self, state: PopulationState) -> tuple[int, PopulationState]:
        """The phase and state to continue with."""
        found = restore(
            self.files.checkpoints,
            self.whole,
            self.part,
            self._saved(state),
            self.progress.say,
        )
        if found is None:
            return 0, state
        saved, meta = found
        mesh = self.ready.population.mesh
        state = from_host(saved["population"], state, mesh)
        self.sums = from_host(saved["sums"], self.sums, mesh)
        self.clock = _Clock(**meta["clock"])
        if (meta["split"], meta["versions"]) != (self._split(), _compilers()):
            self.clock.split_changed = True
            self.progress.say(
                f"{self.job.run_id}: continues on {self._split()} {_compilers()}, was "
                f"on {meta['split']} {meta['versions']}; rows will say split_changed"
            )
        return meta["phase"], state

    def _split(self) -> dict[str, Any]:
        return {
            "members": len(self.job.members),
            "devices": self.ready.population.mesh.size,
            "platform": jax.local_devices()[0].platform,
        }

    def _saved(self, state: PopulationState) -> dict[str, Any]:
        """A checkpoint: a policy is of no use without the statistics of its input."""
        size = len(self.job.members)
        return {
            "population": to_host(state, size),
            "sums": to_host(self.sums, size),
            "obs_stats": self.ready.stats,
        }

    def _save(self, phase: int, state: PopulationState, keep: int = 2) -> Any:
        saved = self._saved(state)
        meta = {
            "members": names_of(self.job),
            "phase": phase,
            "updates": self._done(phase, state),
            "clock": dataclasses.asdict(self.clock),
            "split": self._split(),
            "versions": _compilers(),
        }
        self.checkpoints.save(saved, meta, keep)
        self.saved_at = time.monotonic()
        return saved

    def _done(self, phase: int, state: PopulationState) -> int:
        """Updates of all phases done so far."""
        names = [phase.name for phase in self.ready.agent.phases[:phase]]
        before = sum(self.job.phase_updates[name] for name in names)
        return before + _step(state)

    def _train_phase(self, index: int, state: PopulationState) -> PopulationState:
        """Runs a phase to its end: writes points and, along the last one, evaluates."""
        ready, job = self.ready, self.job
        phase = ready.agent.phases[index]
        last_phase = index == len(ready.agent.phases) - 1
        total = job.phase_updates[phase.name]
        evaluations = job.eval_steps if last_phase else ()
        points = recording_steps(total, phase.stride)
        stops = {*evaluations, *points}
        train = ready.population.record[index]
        args = (ready.table, ready.task, ready.hyper)
        empty = ready.population.no_sums[index](state, *args)

        started = time.monotonic()
        self.progress.update(self._done(index, state), "compiling")
        state, self.sums[index], _ = jax.block_until_ready(
            train(state, self.sums[index], *args, 0)
        )
        self.clock.compile += time.monotonic() - started

        step = _step(state)
        if step in evaluations:
            self._evaluate(step, state)
        chunk = FIRST_CHUNK
        while step < total:
            goal = min(stop for stop in stops if stop > step)
            calls = max(1, min(chunk, goal - step) // phase.stride)
            started = time.monotonic()
            state, self.sums[index], metrics = jax.block_until_ready(
                train(state, self.sums[index], *args, calls * phase.stride)
            )
            seconds = time.monotonic() - started
            self.clock.train += seconds
            step += calls * phase.stride
            speed = calls * phase.stride / seconds
            aim = int(np.clip(speed * CHUNK_SECONDS, chunk // 4, chunk * 4))
            chunk = max(phase.stride, aim)
            self.note = f"{speed * len(job.members):,.0f} updates/s"
            self.progress.update(self._done(index, state), self.note)
            if step in points:
                # Before any checkpoint that no longer holds the interval's sums.
                size = len(job.members)
                record_point(
                    self.points,
                    job,
                    phase.name,
                    step,
                    to_host(metrics, size),
                    np.asarray(state.diverged_at)[:size] >= 0,
                )
                self.sums[index] = empty
            if step in evaluations:
                self._evaluate(step, state)
            if self.stop():
                self._save(index, state)
                raise Stopped
            if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                self._save(index, state)
        return state

    def _evaluate(self, step: int, state: PopulationState) -> None:
        """Evaluates all members at `step` and writes the rows that are missing."""
        job, ready = self.job, self.ready
        there = self.rows.row_ids.keys() - self.rows.failed
        # Rows that a killed process wrote stay: they may come from another split.
        open_members = {
            index
            for index, member in enumerate(job.members)
            if job.row_key(member, step) not in there
        }
        if not open_members:
            return
        last_phase = len(ready.agent.phases) - 1
        self.progress.update(self._done(last_phase, state), "evaluating")
        if time.monotonic() - self.saved_at > UNSAVED_SECONDS:
            self._save(last_phase, state)
        last = step == job.updates_total
        episodes = job.protocol["episodes" if last else "curve_episodes"]
        for env_id, members in ready.evaluated_by.items():
            if open_members.isdisjoint(members.tolist()):
                continue
            started = time.monotonic()
            results = self._results(env_id, members, episodes, state)
            seconds = time.monotonic() - started
            # At once, not after the last environment: an evaluation can take long.
            for index in sorted(open_members.intersection(members.tolist())):
                row = self._row(index, step, results.get(index), seconds)
                self.rows.append(row)

    def _results(
        self, env_id: str, members: np.ndarray, episodes: int, state: PopulationState
    ) -> dict[int, EpisodeResults]:
        """Episodes of the members of one environment; none of diverged ones."""
        job, ready = self.job, self.ready
        diverged = np.asarray(state.diverged_at)[members] >= 0
        if diverged.all():
            return {}
        agent_state, hyper, stats = state.agent, ready.hyper, ready.stats
        if len(members) < len(job.members):
            agent_state, hyper, stats = (
                jax.tree.map(lambda leaf: np.asarray(leaf)[members], tree)
                for tree in (state.agent, ready.own_hyper, ready.stats)
            )
        found = self._evaluator(env_id, episodes)(
            agent_state,
            hyper,
            stats,
            ready.streams[members],
            job.protocol["seed"],
            ~diverged,
        )
        return {
            int(member): jax.tree.map(lambda x, row=row: x[row], found)
            for row, member in enumerate(members)
            if not diverged[row]
        }

    def _evaluator(self, env_id: str, episodes: int) -> Evaluator:
        """Made once per environment and number of episodes, so it compiles once."""
        known = self.evaluators.get((env_id, episodes))
        if known is None:
            known = Evaluator(
                self.ready.agent.act,
                self.ready.envs[env_id],
                episodes,
                self.ready.population.mesh,
            )
            self.evaluators[env_id, episodes] = known
        return known

    def _row(
        self, index: int, step: int, result: EpisodeResults | None, eval_s: float
    ) -> Row:
        task = self.tasks[self.job.members[index].task].task
        score = None
        if result is not None and task.reference is not None:
            scores = episode_scores(task.reference, result.returns, result.successes)
            score = float(np.mean(scores))
        env = self.ready.envs[str(task.env_id)]
        simulators = {} if isinstance(env, PureEnv) else env.versions
        done = self.all_updates - self.job.updates_total + step
        plain = (
            EpisodeResults([], [], None)  # type: ignore[arg-type]
            if result is None
            else jax.tree.map(lambda leaf: leaf.tolist(), result)
        )
        return row_of(
            self.job,
            index,
            step=step,
            returns=plain.returns,
            lengths=plain.lengths,
            successes=plain.successes,
            score=score,
            status="diverged" if result is None else "ok",
            split_changed=self.clock.split_changed,
            updates_per_s=len(self.job.members) * done / max(self.clock.train, 1e-9),
            wall_s=self.clock.train,
            compile_s=self.clock.compile,
            eval_s=eval_s,
            versions={**provenance.versions(), **simulators},
            population=self._split(),
        )


def _compilers() -> dict[str, str]:
    """Versions that bits depend on."""
    return {name: provenance.versions()[name] for name in ("jax", "jaxlib")}


def _subject(job: Job) -> str:
    """What a job is about, in a word: `pendulum` for all datasets of the pendulum."""
    names = (member.task.rpartition("/")[2].partition("-")[0] for member in job.members)
    return ", ".join(dict.fromkeys(names))


def _step(state: PopulationState) -> int:
    """Updates of the current phase done; the same for all members."""
    return int(np.asarray(state.step)[0])
