"""Registry, labels and the layers of settings."""

from __future__ import annotations

import dataclasses
import math

import pytest

from offrl_jax.agents import bc, td3_bc
from offrl_jax.agents.entry import POSITIVE, Preset, Range, resolve
from offrl_jax.agents.registry import REGISTRY, get_entry, parse_label
from offrl_jax.errors import UsageError
from offrl_jax.types import Spec


def resolved(entry=td3_bc.ENTRY, family="none", preset=None, **overrides):
    return resolve(entry, family=family, preset=preset, overrides=overrides)


def test_registry_names_and_unknown_name():
    assert set(REGISTRY) >= {"bc", "gaussian_bc", "td3_bc", "iql", "rebrac"}
    assert get_entry("iql").name == "iql"
    with pytest.raises(UsageError, match=r"unknown agent 'td3bc'.*'td3_bc'"):
        get_entry("td3bc")


@pytest.mark.parametrize(
    "label, want", [("td3_bc", ("td3_bc", None)), ("bc@quick", ("bc", "quick"))]
)
def test_labels(label, want):
    assert parse_label(label) == want


@pytest.mark.parametrize(
    "label, message",
    [
        ("td3_bc@quik", "unknown preset of td3_bc 'quik'.*'quick'"),
        ("tdd3_bc@quick", "unknown agent 'tdd3_bc'"),
        ("td3_bc@", "malformed"),
        ("td3_bc@quick@quick", "malformed"),
        ("", "unknown agent ''"),
    ],
)
def test_bad_labels(label, message):
    with pytest.raises(UsageError, match=message):
        parse_label(label)


def test_layers_override_each_other_in_order():
    entry = dataclasses.replace(
        td3_bc.ENTRY,
        families={"f": Preset({"batch_size": 7}, {"alpha": 1.0, "tau": 0.5})},
        presets={"p": Preset({"hidden": (3,)}, {"tau": 0.25, "discount": 0.5})},
    )
    config, hyper = resolved(entry, "f", "p", discount="0.75")
    assert (config.batch_size, config.hidden) == (7, (3,))
    assert (hyper.alpha, hyper.tau, hyper.discount) == (1.0, 0.25, 0.75)
    assert hyper.policy_noise == td3_bc.Hyper().policy_noise
    # Without a preset, and in a family that the agent does not know.
    assert resolved(entry, "f")[1].tau == 0.5
    assert resolved(entry, "g") == (td3_bc.Config(), td3_bc.Hyper())


def test_strings_are_parsed_to_the_type_of_the_setting():
    config, hyper = resolved(
        REGISTRY["rebrac"],
        hidden="64, 32",
        batch_size="128",
        actor_layer_norm="true",
        obs_transform="standardise",
        actor_lr="1e-4",
        critic_lr=1,
    )
    assert config.hidden == (64, 32) and config.batch_size == 128
    assert config.actor_layer_norm is True
    assert config.obs_transform == "standardise"
    assert hyper.actor_lr == 1e-4
    assert hyper.critic_lr == 1.0 and type(hyper.critic_lr) is float
    for text in ("(64,)", "[64]", "64", "64,"):
        assert resolved(hidden=text)[0].hidden == (64,)
    assert resolved(hidden=[8, 8])[0].hidden == (8, 8)


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("batch_size", "12.5", "an integer"),
        ("batch_size", 12.0, "an integer"),
        ("batch_size", True, "an integer"),
        ("alpha", "much", "a number"),
        ("alpha", None, "a number"),
        ("alpha", False, "a number"),
        ("hidden", "256;256", "integers such as 256,256"),
        ("hidden", "", "integers such as 256,256"),
        ("hidden", (), "integers such as 256,256"),
        ("hidden", 64, "integers such as 256,256"),
        ("obs_transform", 3, "a name"),
    ],
)
def test_wrong_types_are_told_in_one_line(name, value, expected):
    with pytest.raises(UsageError) as error:
        resolved(**{name: value})
    message = str(error.value)
    assert message == (f"setting '{name}' of td3_bc is {value!r}; expected {expected}")


def test_wrong_boolean():
    with pytest.raises(UsageError, match="'1'; expected true or false"):
        resolved(REGISTRY["rebrac"], actor_layer_norm="1")


@pytest.mark.parametrize(
    "name, value",
    [
        ("batch_size", 0),
        ("policy_delay", "0"),
        ("hidden", (64, 0)),
        ("discount", 1.01),
        ("discount", -0.1),
        ("tau", 0.0),
        ("actor_lr", "-1e-3"),
        ("critic_lr", 0.0),
        ("alpha", "nan"),
        ("noise_clip", math.inf),
    ],
)
def test_senseless_values_are_refused(name, value):
    with pytest.raises(UsageError, match=f"setting '{name}' of td3_bc .* value in"):
        resolved(**{name: value})


@pytest.mark.parametrize("name, value", [("discount", 1.0), ("alpha", 0.0)])
def test_ends_of_closed_ranges_are_allowed(name, value):
    assert getattr(resolved(**{name: value})[1], name) == value


CHOICES = [
    (entry, field.name)
    for entry in REGISTRY.values()
    for field in dataclasses.fields(entry.config)
    if "choices" in field.metadata
]


@pytest.mark.parametrize("entry, name", CHOICES, ids=lambda x: getattr(x, "name", x))
def test_unknown_choices_are_refused_on_both_ways_in(entry, name):
    message = f"unknown {name} of {entry.name} 'no such one'"
    with pytest.raises(UsageError, match=message):
        resolved(entry, **{name: "no such one"})
    config, _ = resolved(entry)
    assert (
        getattr(config, name)
        in type(config).__dataclass_fields__[name].metadata["choices"]
    ), "the default is one of them"
    # Agents that share a function are named as in its own file.
    owner = entry.make.__name__.removeprefix("make_")
    with pytest.raises(UsageError, match=f"unknown {name} of {owner} 'no such one'"):
        entry.make(dataclasses.replace(config, **{name: "no such one"}), Spec(2, 1, 5))


def test_every_agent_with_named_variants_declares_them():
    assert {entry.name for entry, _ in CHOICES} == {
        "a2c", "acpo", "awr", "deflow", "fidec", "flow_bc", "fql", "ifql", "iql",
        "misa", "rank1_ac", "rank1_iql", "woodbury_ac"
    }  # fmt: skip
    plain = {
        (entry.name, field.name)
        for entry in REGISTRY.values()
        for field in dataclasses.fields(entry.config)
        if isinstance(field.default, str) and "choices" not in field.metadata
    }
    transforms = {"obs_transform", "reward_transform"}
    assert {name for _, name in plain} == transforms


def test_unknown_settings_and_presets_name_the_nearest():
    with pytest.raises(UsageError, match=r"unknown setting of bc 'hiden'.*'hidden'"):
        resolved(bc.ENTRY, hiden="64")
    with pytest.raises(UsageError, match=r"unknown preset of td3_bc 'quck'.*'quick'"):
        resolved(preset="quck")


def test_a_preset_with_an_unknown_setting_is_refused():
    entry = dataclasses.replace(bc.ENTRY, presets={"p": Preset(hyper={"rate": 1.0})})
    with pytest.raises(UsageError, match="unknown setting of bc 'rate'"):
        resolved(entry, preset="p")


def test_ranges():
    assert str(POSITIVE) == "(0, inf)" and str(Range(0.0, 1.0)) == "[0, 1]"
    assert str(Range()) == "(-inf, inf)"
    assert Range(0.0, 1.0, open_high=True).holds(0.0)
    assert not Range(0.0, 1.0, open_high=True).holds(1.0)
    assert not Range().holds(math.nan)


def test_the_published_neorl2_grids_can_be_expressed():
    """BC: layers {2, 3} x lr {1e-4, 5e-4, 1e-3}; TD3+BC: alpha x policy noise."""
    for agent in ("bc", "gaussian_bc"):
        for hidden in ("256,256", "256,256,256"):
            for lr in ("1e-4", "5e-4", "1e-3"):
                config, hyper = resolved(
                    REGISTRY[agent], "neorl2", hidden=hidden, lr=lr
                )
                assert len(config.hidden) == hidden.count(",") + 1
                assert hyper.lr == float(lr)
    for alpha in (0.05, 0.1, 0.2):
        for noise in (0.5, 1.5, 2.5):
            _, hyper = resolved(family="neorl2", alpha=alpha, policy_noise=noise)
            assert (hyper.alpha, hyper.policy_noise) == (alpha, noise)
            assert hyper.actor_lr == hyper.critic_lr == 3e-4
