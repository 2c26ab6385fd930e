from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pytest
from datasets_builders import as_lists, random_episodes

from offrl_jax.datasets import schema
from offrl_jax.errors import DataError

SEEDS = range(8)


@pytest.mark.parametrize("seed", SEEDS)
def test_bounds_of_episodes_equal_brute_force(seed: int) -> None:
    episodes = random_episodes(seed)
    rows = as_lists(episodes)
    assert episodes.starts.tolist() == [one[0] for one in rows]
    assert episodes.ends.tolist() == [one[-1] for one in rows]
    assert episodes.lengths.tolist() == [len(one) for one in rows]


@pytest.mark.parametrize("seed", SEEDS)
def test_transitions_equal_brute_force(seed: int) -> None:
    episodes = random_episodes(seed)
    found = schema.to_transitions(episodes)
    for rows in as_lists(episodes):
        for row in rows:
            last = row == rows[-1]
            assert found.has_next_action[row] == (0.0 if last else 1.0)
            wanted = 0 * episodes.action[row] if last else episodes.action[row + 1]
            np.testing.assert_array_equal(found.next_action[row], wanted)
            terminal = bool(episodes.terminated[row])
            assert found.discount[row] == (0.0 if terminal else 1.0)
            if not last:
                np.testing.assert_array_equal(
                    found.next_obs[row], episodes.obs[row + 1]
                )
    for leaf in found:
        assert leaf.dtype == np.float32
        assert len(leaf) == len(episodes)


def test_time_out_keeps_the_discount_and_terminal_does_not() -> None:
    episodes = random_episodes(0, count=3)
    discount = np.asarray(schema.to_transitions(episodes).discount)
    # Built as: terminal, cut, both.
    assert discount[episodes.ends].tolist() == [0.0, 1.0, 0.0]


def test_transitions_leave_the_episodes_alone() -> None:
    episodes = random_episodes(1)
    before = schema.dataset_hash(episodes)
    schema.to_transitions(episodes)
    assert schema.dataset_hash(episodes) == before


@pytest.mark.parametrize("seed", SEEDS)
def test_returns_equal_brute_force(seed: int) -> None:
    episodes = random_episodes(seed)
    wanted = [
        sum(float(episodes.reward[r]) for r in rows) for rows in as_lists(episodes)
    ]
    found = schema.episode_returns(episodes)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_valid_episodes_pass(seed: int) -> None:
    schema.validate(random_episodes(seed), "here")


def _change(name: str, row: object, value: object) -> schema.Episodes:
    episodes = random_episodes(3)
    array = getattr(episodes, name).copy()
    array[row] = value
    return dataclasses.replace(episodes, **{name: array})


@pytest.mark.parametrize("name", ["obs", "action", "reward", "next_obs"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named(name: str, value: float) -> None:
    episodes = random_episodes(3)
    row = int(episodes.starts[4])
    with pytest.raises(
        DataError, match=rf"^F: field '{name}', row {row} \(episode 4\)"
    ):
        schema.validate(_change(name, row, value), "F")


def test_an_action_out_of_bounds_is_named() -> None:
    with pytest.raises(DataError, match=r"'action', row 2 .* component 1 is 1\.001"):
        schema.validate(_change("action", (2, 1), 1.001), "F")
    with pytest.raises(DataError, match=r"component 0 is -2"):
        schema.validate(_change("action", (0, 0), -2.0), "F")


def test_rounding_of_an_action_is_tolerated() -> None:
    schema.validate(_change("action", (2, 1), np.float32(1 + 5e-7)), "F")
    with pytest.raises(DataError):
        schema.validate(_change("action", (2, 1), np.float32(1 + 3e-6)), "F")


def test_a_last_episode_without_end_is_refused() -> None:
    episodes = random_episodes(3)
    cut = schema.Episodes(
        *(getattr(episodes, name)[: episodes.ends[-1]] for name in schema.FIELDS)
    )
    assert episodes.lengths[-1] > 1
    with pytest.raises(DataError, match=f"last row {len(cut) - 1} ends no episode"):
        schema.validate(cut, "F")


def test_no_end_at_all_is_refused() -> None:
    episodes = random_episodes(3)
    none = dataclasses.replace(
        episodes,
        terminated=np.zeros(len(episodes), bool),
        truncated=np.zeros(len(episodes), bool),
    )
    with pytest.raises(DataError, match="ends no episode"):
        schema.validate(none, "F")


def test_a_missing_end_between_episodes_is_found() -> None:
    episodes = random_episodes(3)
    end = int(episodes.ends[5])
    terminated, truncated = episodes.terminated.copy(), episodes.truncated.copy()
    terminated[end] = truncated[end] = False
    broken = dataclasses.replace(episodes, terminated=terminated, truncated=truncated)
    with pytest.raises(
        DataError, match=rf"'next_obs', row {end} \(episode 5\) differs"
    ):
        schema.validate(broken, "F")


def test_shuffled_rows_are_found() -> None:
    episodes = random_episodes(3)
    start = int(episodes.starts[np.argmax(episodes.lengths)])
    order = np.arange(len(episodes))
    order[[start, start + 1]] = order[[start + 1, start]]
    shuffled = dataclasses.replace(
        episodes, obs=episodes.obs[order], next_obs=episodes.next_obs[order]
    )
    with pytest.raises(DataError, match="differs from 'obs'"):
        schema.validate(shuffled, "F")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("obs", lambda x: x.astype(np.float64), "'obs' is float64, must be float32"),
        ("terminated", lambda x: x.astype(np.float32), "must be bool"),
        ("reward", lambda x: x[:, None], r"'reward' has shape .* must have 1 axis"),
        ("obs", lambda x: x[:, 0], "'obs' has shape .* must have 2 axes"),
        ("action", lambda x: x[:-1], "'action' has .* rows"),
        ("next_obs", lambda x: x[:, :-1], "'next_obs' has shape"),
        ("action", lambda x: x[:, :0], "at least one component"),
        ("obs", lambda x: x.tolist(), "'obs' is list"),
    ],
)
def test_wrong_arrays_are_refused(name: str, change, message: str) -> None:
    episodes = random_episodes(3)
    broken = dataclasses.replace(episodes, **{name: change(getattr(episodes, name))})
    with pytest.raises(DataError, match=message):
        schema.validate(broken, "F")


def test_empty_data_are_refused() -> None:
    episodes = random_episodes(3)
    empty = schema.Episodes(*(getattr(episodes, n)[:0] for n in schema.FIELDS))
    with pytest.raises(DataError, match="holds no transition"):
        schema.validate(empty, "F")


def test_messages_are_one_line() -> None:
    with pytest.raises(DataError) as caught:
        schema.validate(_change("obs", 1, np.nan), "F")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [(100, 0.05, 5), (12, 0.05, 1), (2, 0.05, 1), (10, 0.25, 3), (4, 0.99, 3)],
)
def test_the_last_episodes_are_held_out(
    count: int, fraction: float, held_out: int
) -> None:
    episodes = random_episodes(2, count=count)
    train, validation = schema.split_validation(episodes, fraction)
    assert validation is not None
    assert len(validation.ends) == held_out
    assert len(train.ends) == count - held_out
    for name in schema.FIELDS:
        joined = np.concatenate([getattr(train, name), getattr(validation, name)])
        np.testing.assert_array_equal(joined, getattr(episodes, name))
        assert np.shares_memory(getattr(train, name), getattr(episodes, name))
    schema.validate(train, "train")
    schema.validate(validation, "validation")


def test_nothing_is_held_out_of_one_episode() -> None:
    episodes = random_episodes(2, count=1)
    assert schema.split_validation(episodes) == (episodes, None)
    with pytest.raises(ValueError, match="not in"):
        schema.split_validation(episodes, 1.0)


def test_taking_episodes_checks_its_range() -> None:
    episodes = random_episodes(2, count=4)
    middle = schema.take_episodes(episodes, 1, 3)
    assert middle.lengths.tolist() == episodes.lengths[1:3].tolist()
    for first, last in ((0, 5), (2, 2), (-1, 2)):
        with pytest.raises(ValueError, match="out of range"):
            schema.take_episodes(episodes, first, last)


def test_the_hash_is_sha256_of_names_shapes_and_bytes() -> None:
    episodes = random_episodes(4)
    plain = hashlib.sha256()
    for name in ("obs", "action", "reward", "next_obs", "terminated", "truncated"):
        array = getattr(episodes, name)
        plain.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        plain.update(array.tobytes())
    assert schema.dataset_hash(episodes) == plain.hexdigest()


def test_the_hash_sees_every_field_and_no_memory_layout() -> None:
    episodes = random_episodes(4)
    before = schema.dataset_hash(episodes)
    fortran = dataclasses.replace(episodes, obs=np.asfortranarray(episodes.obs))
    assert schema.dataset_hash(fortran) == before
    for name in schema.FIELDS:
        array = getattr(episodes, name).copy()
        array[0] = ~array[0] if array.dtype == bool else array[0] + 1
        changed = dataclasses.replace(episodes, **{name: array})
        assert schema.dataset_hash(changed) != before
