"""The splits of GTAPolicy: sizes, no leak, gold answers that their grader accepts, overrides."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines import build
from data_pipelines.gta_policy.catalogue import (
    PAPER_RULES,
    POLICY_NAME,
    Profile,
    override_rule_book,
)
from data_pipelines.gta_policy.dataset import GTAPolicySettings, make_splits
from data_pipelines.gta_policy.tasks import BOUNDARY_CREDITS, sample_profile, split_tasks
from data_pipelines.streaming import read_split
from trimpi_jax.grading.grader import grade_completions

SETTINGS = GTAPolicySettings(train=40, test=24, seed=3)


@pytest.fixture(scope="module")
def splits():
    return {name: list(examples) for name, examples in make_splits(SETTINGS).items()}


def test_sizes_are_the_papers_by_default():
    settings = GTAPolicySettings()
    assert (settings.train, settings.test) == (451, 106)


def test_splits_have_their_sizes_and_share_no_task(splits):
    sizes = {name: len(examples) for name, examples in splits.items()}
    assert sizes == {"train": 40, "cot": 40, "test": 24, "override": 24}
    ids = {name: {e.example_id for e in examples} for name, examples in splits.items()}
    assert {name: len(found) for name, found in ids.items()} == sizes
    images = {name: {i for e in examples for i in e.images} for name, examples in splits.items()}
    assert not images["train"] & images["test"]
    assert images["test"] == images["override"]
    assert ids["train"] == ids["cot"] and ids["test"] == ids["override"]


def test_only_cot_has_thoughts_and_nothing_else_differs(splits):
    for plain, thought in zip(splits["train"], splits["cot"], strict=True):
        assert plain.cot == "" and thought.cot == plain.meta["gold_cot"]
        for part in ("query", "answer", "images", "policy_text"):
            assert getattr(plain, part) == getattr(thought, part)


def test_a_query_never_contains_the_policy(splits):
    for example in splits["train"] + splits["override"]:
        assert POLICY_NAME in example.query and example.policy_name == POLICY_NAME
        assert "Rule " not in example.query and "credits >" not in example.query
        assert example.policy_text.startswith(f"# {POLICY_NAME}")


def test_every_gold_call_follows_from_profile_and_rules(splits):
    books = {"train": PAPER_RULES, "test": PAPER_RULES, "override": override_rule_book(3)}
    for split, book in books.items():
        for example in splits[split]:
            user = Profile(**example.meta["profile"])
            call = json.loads(example.answer)
            assert call["name"] == book.versioned_name(example.meta["tool"], user)
            for line in example.query.splitlines():  # the history follows the same book
                if line[:1].isdigit() and ". Call: " in line:
                    name = json.loads(line.split(". Call: ")[1])["name"]
                    assert name == book.versioned_name(name.split("_v")[0], user)


def test_the_thought_states_profile_rule_and_version(splits):
    for example in splits["cot"]:
        user, name = example.meta["profile"], json.loads(example.answer)["name"]
        assert f"{user['age']} years old, has {user['credits']} credits" in example.cot
        assert example.cot.endswith(f"So I call {name}.")
        if example.meta["rule"]:
            rule = PAPER_RULES.rules[example.meta["rule"] - 1]
            assert f"Rule {rule.number}: {rule}." in example.cot
            assert f"Rule {rule.number}: {rule}." in example.policy_text
            for condition in rule.when:
                why = f"{condition.field} {user[condition.field]} is"
                assert why.lower() in example.cot.lower()


def test_gold_completions_are_graded_as_right(splits):
    examples = [example for found in splits.values() for example in found]
    texts = [f"<think>{e.meta['gold_cot']}</think>\\boxed{{{e.answer}}}" for e in examples]
    grades = grade_completions(texts, examples, [True] * len(texts))
    assert {grade.accuracy for grade in grades} == {1.0}
    assert {grade.format for grade in grades} == {1.0}


def test_overrides_are_put_into_the_prompt_and_change_versions(splits):
    versioned = [e for e in splits["override"] if e.meta["rule"]]
    changed = [e for e in versioned if e.answer != e.meta["trained_answer"]]
    assert all(e.meta["policy_in_prompt"] for e in splits["override"])
    assert len(changed) >= 0.6 * len(versioned) > 0
    for ours, theirs in zip(splits["test"], splits["override"], strict=True):
        assert theirs.meta["trained_answer"] == ours.answer
        assert theirs.policy_text != ours.policy_text


def test_the_same_seed_gives_the_same_shards(tmp_path):
    settings = GTAPolicySettings(train=8, test=4, seed=5)
    manifests = [build.build("gta_policy", settings, tmp_path / str(i)) for i in range(2)]
    assert manifests[0]["splits"] == manifests[1]["splits"]
    (example,) = read_split(tmp_path / "0", "override", 1)
    assert example.meta["answer_form"]["form"] == "gta_call"
    other = build.build("gta_policy", GTAPolicySettings(train=8, test=4, seed=6), tmp_path / "2")
    assert other["splits"] != manifests[0]["splits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "web"}, "source is one of"),
        ({"source": "official"}, "needs gta_dir"),
        ({"gta_dir": "x"}, "no effect with source synthetic"),
        ({"test": 1}, "train and test must be >= 2"),
        ({"text_baseline": 1.0}, "text_baseline must be in"),
        ({"seed": -1, "text_layer": -1}, "seed must be >= 0; text_layer must be >= 0"),
    ],
)
def test_settings_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build.make_settings("gta_policy", options)


@given(st.lists(st.integers(2, 6), min_size=1, max_size=40), st.integers(0, 60), st.integers(0, 9))
def test_a_split_is_exact_or_refused(counts, test_steps, seed):
    try:
        train, test = split_tasks(counts, test_steps, np.random.default_rng(seed))
    except ValueError as error:
        assert "no set of these" in str(error)
        reachable = {0}
        for count in counts:
            reachable |= {total + count for total in reachable}
        assert test_steps not in reachable
        return
    assert sum(counts[i] for i in test) == test_steps
    assert sorted(train + test) == list(range(len(counts)))


def test_users_stand_on_thresholds_now_and_then():
    rng = np.random.default_rng(0)
    users = [sample_profile(rng) for _ in range(600)]
    assert {user.account_type for user in users} == set("ABCD")
    assert set(BOUNDARY_CREDITS) <= {user.credits for user in users}
    assert 0.2 < np.mean([user.age < 21 for user in users]) < 0.5
