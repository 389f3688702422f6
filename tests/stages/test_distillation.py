"""Distillation: what is asked and how often, what is kept, what SFT sees of it, resume, bad input.

The actor is scripted by question and sample: only what it says with the policy in its prompt
counts. One test samples from a model.
"""

import dataclasses
import io
import itertools
import json

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_pipelines.building import write_dataset
from data_pipelines.example import completion_text
from data_pipelines.shards import check_dataset, read_manifest
from data_pipelines.streaming import read_split
from tests.data_pipelines.policy_reader import TREE
from tests.tiny_model import load_tiny_processor, make_png, make_question, tiny_config, tiny_params
from trimpi_jax.inputs.encode import encode_example
from trimpi_jax.io.progress import Progress
from trimpi_jax.models.processor import decode_completion, encode_completion
from trimpi_jax.rollouts.engine import Questions, make_engine
from trimpi_jax.rollouts.groups import PromptSizes
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages import distillation
from trimpi_jax.stages.distillation import DistillationSettings, distil, plan_rounds
from trimpi_jax.stages.make_cot import Journal
from trimpi_jax.stages.sft import encode_sft_row
from trimpi_jax.types import Rollouts

NEW_TOKENS = 48
RIGHT = completion_text("red, a cube", "Case 3")
WRONG = completion_text("blue", "Case 1")
SAID = {  # by question: its samples, round after round
    "q0": [RIGHT, RIGHT, WRONG, completion_text("cube", "Case 3")],
    "q1": [WRONG, "Case 3", "\\boxed{Case 3}", completion_text("red", "Case 3") + "!" * 99],
    "q2": [completion_text("it is \\boxed{Case 3}", "Case 3"), WRONG, WRONG, RIGHT],
    "too long": [RIGHT] * 4,
}
KEPT = [
    ("q0", 0, "red, a cube"),
    ("q0", 1, "red, a cube"),
    ("q0", 3, "cube"),
    ("q2", 3, "red, a cube"),
]


def settings_for(**changes):
    options = {"rollouts": 16, "samples": 2, "sample_prompts": 2, "max_new_tokens": NEW_TOKENS}
    return DistillationSettings(**(options | {"seed": 5} | changes))


def quiet():
    return Progress(Console(file=io.StringIO(), width=300))


@pytest.fixture
def engine():
    """An engine that nothing is compiled for until it is asked."""
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    sizes = PromptSizes((384,), (1,))
    return make_engine(tiny_config(), load_tiny_processor(), sizes, mesh, dtype="float32")


@pytest.fixture
def questions(tmp_path):
    """(dataset, split) of the scripted questions."""
    rows = [
        make_question(i, example_id=name, cot="", images=(make_png(i),))
        for i, name in enumerate(SAID)
    ]
    test = [make_question(9, example_id="t", images=(make_png(9),))]
    write_dataset(tmp_path / "in", {"train": rows, "test": test}, {"dataset": "scripted"})
    return tmp_path / "in", "train"


@pytest.fixture
def asked(monkeypatch, engine):
    """The actor by script; a list of the batches that it was asked."""
    batches, rounds = [], {}

    def ask(engine, weights, examples, sampler, key, *, aware, num_rows, max_chunk):
        assert aware and len(examples) <= num_rows == max_chunk and sampler.temperature == 1.0
        number = rounds.setdefault(jax.random.key_data(key).tobytes(), len(rounds))
        batches.append([example.example_id for example in examples])
        fitting = [example for example in examples if example.example_id != "too long"]
        shape = (len(fitting), sampler.completions, NEW_TOKENS)
        tokens, lengths = np.zeros(shape, np.int32), np.zeros(shape[:2], np.int32)
        stopped = np.ones(shape[:2], bool)
        for q, example in enumerate(fitting):
            for g in range(sampler.completions):
                text = SAID[example.example_id][number * sampler.completions + g]
                said = encode_completion(engine.processor, text)[:-1][:NEW_TOKENS]
                tokens[q, g, : len(said)], lengths[q, g] = said, len(said)
                stopped[q, g] = decode_completion(engine.processor, said) == text
        dropped = [example.example_id for example in examples if example not in fitting]
        return (
            Questions(fitting, [], [], [], dropped),
            Rollouts(tokens, np.zeros(shape, np.float32), lengths, stopped),
        )

    monkeypatch.setattr(distillation, "ask", ask)
    monkeypatch.setattr(type(engine), "load", lambda self, params, old=None: "weights")
    return batches


def run(engine, questions, folder, progress=None, about=None, **changes):
    about = about or {"actor_sha256": "a"}
    return distil(
        engine, None, questions, folder, settings_for(**changes), about, progress or quiet()
    )


def kept_of(folder):
    rows = read_split(folder, "cot")
    source = [(row.example_id.split("#")[0], row.meta["cot_source"]["attempt"]) for row in rows]
    return [(*where, row.cot) for where, row in zip(source, rows, strict=True)]


def test_right_answers_are_kept_and_the_others_counted(engine, questions, asked, tmp_path):
    progress = quiet()
    folder = run(engine, questions, tmp_path / "1_distillation", progress)
    assert sorted(itertools.chain(*asked)) == sorted([*SAID, *SAID])  # two rounds
    assert sorted(kept_of(folder)) == KEPT
    facts = check_dataset(folder)["recipe"]["distillation"]
    numbers = ("questions", "questions_answered", "rollouts", "right", "kept", "kept_different")
    assert [facts[name] for name in numbers] == [4, 2, 12, 4, 4, 3]
    assert facts["right_share"] == pytest.approx(4 / 12)
    assert facts["rejected"] == {
        "box_in_thought": 1, "cut_off": 1, "no_box": 1, "no_think": 1, "prompt_too_long": 4,
        "wrong_answer": 4,
    }  # fmt: skip
    said = progress.console.file.getvalue()
    assert "12 answers to 4 questions, 4 right (33.3 %)" in said and "'wrong_answer': 4" in said
    lines = (tmp_path / "1_distillation" / "answers.jsonl").read_text().splitlines()[1:]
    texts = [json.loads(line).get("text") for line in lines]
    assert len(lines) == 16 and texts.count(WRONG) == 4  # a look at what went wrong


def test_a_cap_keeps_the_first_right_answers(engine, questions, asked, tmp_path):
    folder = run(engine, questions, tmp_path / "s", kept_per_question=1)
    assert sorted(kept_of(folder)) == [KEPT[0], KEPT[3]]


def test_sft_sees_the_answer_but_not_the_policy(engine, questions, asked, tmp_path):
    row = read_split(run(engine, questions, tmp_path / "s"), "cot")[0]
    processor = engine.processor
    encoded = encode_sft_row(row, processor, stage="distillation")
    target = processor.tokenizer.decode(encoded.tokens[encoded.loss_mask])
    assert target.startswith(completion_text(row.cot, "Case 3")) and TREE.name not in target
    prompt = processor.tokenizer.decode(encoded.tokens[~encoded.loss_mask])
    assert row.policy_text.splitlines()[-1] not in prompt and row.query in prompt
    plain = dataclasses.replace(row, policy_text="")
    expected = encode_example(
        plain, processor, policy_in_prompt=False, with_cot=True, loss_on="completion"
    )
    np.testing.assert_array_equal(encoded.tokens, expected.tokens)
    np.testing.assert_array_equal(encoded.loss_mask, expected.loss_mask)


def test_its_own_words_are_imitated_not_the_gold_ones(engine, asked, tmp_path, monkeypatch):
    """An answer within the tolerance follows from the thought before it; the gold one may not."""
    monkeypatch.setitem(SAID, "q0", [completion_text("about three", "2.9")] * 4)
    form = {"form": "number", "tolerance": 0.2}
    row = make_question(0, example_id="q0", answer="3.0", cot="", meta={"answer_form": form})
    write_dataset(tmp_path / "in", {"train": [row]}, {})
    rows = read_split(run(engine, (tmp_path / "in", "train"), tmp_path / "s", rollouts=2), "cot")
    assert [(row.answer, row.meta["gold_answer"]) for row in rows] == [("2.9", "3.0")] * 2


def test_a_killed_run_goes_on_and_makes_the_same_shards(
    engine, questions, asked, tmp_path, monkeypatch
):
    whole = run(engine, questions, tmp_path / "whole")
    batches = list(asked)
    asked.clear()
    note = Journal.note

    def dies(self, *arguments, **kept):
        if len(self.entries) == 7:  # within the second batch
            raise KeyboardInterrupt
        note(self, *arguments, **kept)

    monkeypatch.setattr(Journal, "note", dies)
    with pytest.raises(KeyboardInterrupt):
        run(engine, questions, tmp_path / "cut")
    assert asked == batches[:2] and not (tmp_path / "cut" / "data").exists()
    monkeypatch.setattr(Journal, "note", note)
    asked.clear()
    again = run(engine, questions, tmp_path / "cut")
    assert asked == batches[1:]
    assert read_manifest(again)["splits"] == read_manifest(whole)["splits"]  # sha256 of the shards
    asked.clear()
    progress = quiet()
    assert run(engine, questions, tmp_path / "cut", progress) == again
    assert not asked and "sampled before" in progress.console.file.getvalue()


@pytest.mark.parametrize("finished", [True, False])
def test_answers_of_another_actor_or_of_other_settings_are_not_used(
    engine, questions, asked, tmp_path, finished
):
    run(engine, questions, tmp_path / "s")
    if not finished:
        (tmp_path / "s" / "data").rename(tmp_path / "away")
    message = "another actor or other settings" if finished else "replies to other questions"
    for changes in ({"about": {"actor_sha256": "b"}}, {"seed": 6}, {"temperature": 0.9}):
        with pytest.raises(ValueError, match=message):
            run(engine, questions, tmp_path / "s", **changes)
    run(engine, questions, tmp_path / "s", sample_prompts=4)  # of speed only


def test_nothing_right_is_an_error_that_says_why(engine, questions, asked, tmp_path, monkeypatch):
    for name in SAID:
        monkeypatch.setitem(SAID, name, [WRONG] * 4)
    with pytest.raises(ValueError, match=r"none of 12 answers to 4 questions was right.*wrong_ans"):
        run(engine, questions, tmp_path / "s")
    assert not (tmp_path / "s" / "data").exists()


def test_a_broken_grader_stops_it_and_notes_nothing(engine, questions, asked, tmp_path):
    broken = [
        dataclasses.replace(example, meta={"answer_form": {"form": "nonsense"}})
        for example in read_split(*questions)
    ]
    write_dataset(tmp_path / "broken", {"train": broken}, {})
    with pytest.raises(RuntimeError, match=r"distillation\.max_failed_grades(.|\n)*nonsense"):
        run(engine, (tmp_path / "broken", "train"), tmp_path / "s")
    assert len((tmp_path / "s" / "answers.jsonl").read_text().splitlines()) == 1


def test_no_questions_is_an_error(engine, asked, tmp_path):
    write_dataset(tmp_path / "empty", {"train": [], "test": [make_question(1)]}, {})
    with pytest.raises(ValueError, match="no questions in split 'train'"):
        run(engine, (tmp_path / "empty", "train"), tmp_path / "s")


@given(
    policies=st.lists(st.sampled_from("abc"), min_size=1, max_size=12),
    samples=st.integers(1, 4),
    times=st.integers(1, 30),
    batch=st.integers(1, 5),
)
def test_the_rollouts_are_spent_to_the_last_and_evenly(policies, samples, times, batch):
    settings = settings_for(rollouts=samples * times, samples=samples, sample_prompts=batch)
    plan = list(plan_rounds(policies, settings))
    places = [place for _, part in plan for place in part]
    assert len(places) == times
    counts = np.bincount(places, minlength=len(policies))
    assert counts.max() - counts.min() <= 1
    for number, part in plan:
        assert len(part) <= batch and len({policies[place] for place in part}) == 1
        asked_then = [place for other, p in plan if other == number for place in p]
        assert len(set(asked_then)) == len(asked_then)
    assert plan == list(plan_rounds(policies, settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": 15}, "15 is not a multiple of samples 2"),
        ({"samples": 0}, "must be >= 1"),
        ({"temperature": 0.0}, "samples must be 1"),
        ({"min_accuracy": 0.0}, "min_accuracy"),
        ({"kept_per_question": -1}, "kept_per_question"),
        ({"max_failed_grades": 2.0}, "is a share"),
    ],
)
def test_wrong_settings_are_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        settings_for(**changes)


def test_samples_depend_on_seed_round_and_question_only(engine, questions, tmp_path, monkeypatch):
    """From a model: batches of one and of three questions say the same, another seed does not."""
    with jax.set_mesh(engine.mesh):
        weights = engine.load(tiny_params(engine.config))
        examples = read_split(*questions)[:3]

        def answers(name, size, seed=5, number=1):
            settings = settings_for(sample_prompts=3, max_new_tokens=6, seed=seed)
            journal = Journal(tmp_path / name, {})
            for start in range(0, 3, size):
                part = examples[start : start + size]
                distillation.answer_questions(engine, weights, part, number, settings, journal)
            lines = (tmp_path / name).read_text().splitlines()[1:]
            return {(e["id"], e["attempt"]): e["text"] for e in map(json.loads, lines)}

        three = answers("three", 3)
        assert sorted(three) == [(e.example_id, a) for e in examples for a in (2, 3)]
        assert answers("one", 1) == three
        assert answers("other", 3, seed=6) != three
        again = answers("round", 3, number=0)
        assert sorted(a for _, a in again) == [0, 0, 0, 1, 1, 1]
        assert list(again.values()) != list(three.values())
