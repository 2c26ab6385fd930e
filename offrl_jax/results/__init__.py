"""Results on disk: rows of raw returns, metrics, the plan that asked for them, locks.

The ground floor of benchmark and leaderboard: the first writes, the second reads, and
neither knows the other.  Standard library only, so that reading results needs no JAX.

A results folder holds

    plan.json                 what is to be run (`Plan`)
    commands.jsonl            the commands that asked for it
    rows/<run_id>.jsonl       one `Row` per member and evaluation (or .jsonl.gz)
    metrics/<run_id>.jsonl    one `MetricPoint` per member and interval of updates
    checkpoints/<run_id>/     the benchmark's own business
    locks/<run_id>.lock       held while a process works on the job
"""

from offrl_jax.results.commands import note_command, read_commands
from offrl_jax.results.files import RowFile, read_rows
from offrl_jax.results.folder import (
    checkpoint_path,
    files_below,
    lock,
    lock_path,
    metric_path,
    plan_path,
    row_path,
    try_lock,
)
from offrl_jax.results.metrics import MetricFile, MetricPoint, read_metrics
from offrl_jax.results.plan import (
    Job,
    Member,
    Plan,
    read_plan,
    read_plans,
    write_plan,
)
from offrl_jax.results.rows import BEHAVIOUR, ONLINE, SCHEMA, Row, RowKey

__all__ = [
    "BEHAVIOUR",
    "ONLINE",
    "SCHEMA",
    "Job",
    "Member",
    "MetricFile",
    "MetricPoint",
    "Plan",
    "Row",
    "RowFile",
    "RowKey",
    "checkpoint_path",
    "files_below",
    "lock",
    "lock_path",
    "metric_path",
    "note_command",
    "plan_path",
    "read_commands",
    "read_metrics",
    "read_plan",
    "read_plans",
    "read_rows",
    "row_path",
    "try_lock",
    "write_plan",
]
