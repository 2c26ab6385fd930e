"""All algorithms by name; docs/add_an_agent.md says how to add one."""

from __future__ import annotations

from offrl_jax import errors
from offrl_jax.agents import (
    a2c,
    acktr,
    acpo,
    awac,
    awr,
    bc,
    brac,
    deflow,
    fidec,
    flow_bc,
    fql,
    gaussian_bc,
    ifql,
    inac,
    iql,
    misa,
    npg_full,
    ppo,
    rank1_ac,
    rank1_iql,
    rebrac,
    td3_bc,
    trpo,
    woodbury_ac,
)
from offrl_jax.agents.entry import AgentEntry

REGISTRY: dict[str, AgentEntry] = {
    entry.name: entry
    for entry in (
        bc.ENTRY,
        gaussian_bc.ENTRY,
        td3_bc.ENTRY,
        iql.ENTRY,
        rebrac.ENTRY,
        awr.ENTRY,
        awac.ENTRY,
        inac.ENTRY,
        brac.ENTRY,
        acpo.ENTRY,
        flow_bc.ENTRY,
        ifql.ENTRY,
        fql.ENTRY,
        deflow.ENTRY,
        fidec.ENTRY,
        misa.ENTRY,
        rank1_iql.ENTRY,
        rank1_ac.ENTRY,
        woodbury_ac.ENTRY,
        npg_full.ENTRY,
        a2c.ENTRY,
        ppo.ENTRY,
        trpo.ENTRY,
        acktr.ENTRY,
    )
}
"""Every algorithm; the conformance suite runs through all of them."""


def get_entry(name: str) -> AgentEntry:
    """The entry of the algorithm `name`.

    Raises:
      UsageError: there is none; the message names the nearest one.
    """
    if name not in REGISTRY:
        raise errors.unknown_name("agent", name, REGISTRY)
    return REGISTRY[name]


def parse_label(label: str) -> tuple[str, str | None]:
    """Splits `td3_bc@quick` into agent and preset; `td3_bc` has no preset (None).

    Raises:
      UsageError: an unknown agent or preset, or a label that is not NAME[@PRESET].
    """
    name, at, preset = label.partition("@")
    if "@" in preset or (at and not preset):
        raise errors.UsageError(
            f"agent label '{label}' is malformed; write NAME or NAME@PRESET"
        )
    entry = get_entry(name)
    if not at:
        return name, None
    if preset not in entry.presets:
        raise errors.unknown_name(f"preset of {name}", preset, entry.presets)
    return name, preset
