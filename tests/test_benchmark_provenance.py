"""What the hash of the training sources is taken of, against the graph of imports."""

from __future__ import annotations

from pathlib import Path

import grimp

import offrl_jax
from offrl_jax.benchmark import provenance

PACKAGE = Path(offrl_jax.__file__).parent
# Where a trained number comes from: the loop over a job, and what it is prepared from.
ROOTS = ("offrl_jax.agents.registry", "offrl_jax.population", "offrl_jax.evaluation")
# Names, types and messages, on which no number depends.
EXEMPT = {"offrl_jax", "offrl_jax.errors", "offrl_jax.version"}


def module_of(path: Path) -> str:
    parts = ("offrl_jax", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_everything_that_training_imports_counts():
    graph = grimp.build_graph("offrl_jax")
    wanted = set(ROOTS).union(*(graph.find_upstream_modules(root) for root in ROOTS))
    counted = {module_of(path) for path in provenance.training_sources(PACKAGE)}
    assert {"offrl_jax.flows", "offrl_jax.agents.fidec"} <= wanted
    assert wanted - EXEMPT <= counted


def test_a_room_that_is_new_counts_and_a_report_does_not(tmp_path: Path):
    for name in ("fisher/solvers.py", "reports.py", "cli/new.py", "benchmark/jobs.py"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    found = provenance.training_sources(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == ["benchmark/jobs.py", "fisher/solvers.py"]
