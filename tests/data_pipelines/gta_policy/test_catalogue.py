"""The rules against the paper's sentences, the document against the rules, overrides."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipelines.gta_policy.catalogue import (
    FIELD_KINDS,
    PAPER_RULES,
    TOOLS,
    Condition,
    Profile,
    Thresholds,
    answer_form,
    call_json,
    find_argument_problems,
    general_rules,
    make_rule_book,
    override_rule_book,
    policy_text,
)

EDGES = (0, 249, 250, 251, 499, 500, 501, 749, 750, 751, 1000)
PROFILES = [Profile(age, c, a) for age in (5, 20, 21, 59, 60, 90) for c in EDGES for a in "ABCD"]


def paper_version(tool, user):
    """The calling rules of the paper, written down a second time as plain code."""
    age, credits, account = user.age, user.credits, user.account_type
    rich = credits > 500
    match tool:
        case "ImageDescription":
            return {"A": 5, "B": 4 if rich else 3, "C": 4 if rich else 3}.get(
                account, 2 if rich else 1
            )
        case "OCR" if credits <= 250:
            return 5
        case "OCR" if credits <= 750:
            return 4 if account in "AB" else 3
        case "OCR":
            return 2 if age < 21 else 1
        case "GoogleSearch":
            return 1 if age < 21 else 2 if credits < 500 else 3
        case "TextToImage":
            return 1 if account != "D" else 2 if rich else 3
        case "RegionAttributeDescription":
            return 2 if account in "AB" else 1
        case "CountGivenObject":
            return 1 if credits < 250 else 2 if credits < 500 else 3 if credits < 750 else 4
        case "ImageStylization":
            return 1 if age < 21 else 2 if age < 60 else 3
    return 0


@pytest.mark.parametrize("tool", TOOLS)
def test_versions_are_the_papers(tool):
    for user in PROFILES:
        version = paper_version(tool, user)
        wanted = f"{tool}_v{version}" if version else tool
        assert PAPER_RULES.versioned_name(tool, user) == wanted, user


@pytest.mark.parametrize("book", [PAPER_RULES, *map(override_rule_book, range(20))])
def test_exactly_one_rule_fits_every_user(book):
    for tool in TOOLS.values():
        for user in PROFILES:
            fitting = [r for r in book.rules if r.tool == tool.name and r.holds(user)]
            assert len(fitting) == (1 if tool.versions else 0), (tool.name, user)


def test_tools_and_arguments_are_the_papers():
    assert {name: tool.versions for name, tool in TOOLS.items() if tool.versions} == {
        "OCR": 5, "CountGivenObject": 4, "ImageDescription": 5, "GoogleSearch": 3,
        "RegionAttributeDescription": 2, "TextToImage": 3, "ImageStylization": 3,
    }  # fmt: skip
    assert len(TOOLS) == 14
    assert [a.name for a in TOOLS["AddText"].arguments] == ["image", "text", "position", "color"]
    assert answer_form("x")["defaults"] == {
        "GoogleSearch": {"k": 10},
        "TextToBbox": {"top1": True},
        "DrawBox": {"annotation": None},
        "AddText": {"color": "red"},
    }
    assert {a.name for tool in TOOLS.values() for a in tool.arguments} == set(FIELD_KINDS)


def read_policy(document):
    """tool -> [(test of a user, version)], from the document's words alone."""
    found = {}
    for conditions, tool, version in re.findall(r"Rule \d+: if (.*), call (\w+)_v(\d)\.", document):
        code = re.sub(
            r"account_type is ([A-D, or]+?)(?= and |$)",
            lambda m: f"account_type in {re.findall('[A-D]', m[1])}",
            conditions,
        )
        assert re.fullmatch(r"[\w\s<>=\[\]',]+", code)
        found.setdefault(tool, []).append((compile(code, "rule", "eval"), int(version)))
    return found


@pytest.mark.parametrize("book", [PAPER_RULES, override_rule_book(0), override_rule_book(7)])
def test_the_document_says_what_the_rules_do(book):
    read = read_policy(policy_text(book))
    assert sum(map(len, read.values())) == 25
    for user in PROFILES:
        names = {"age": user.age, "credits": user.credits, "account_type": user.account_type}
        for tool, rules in read.items():
            (version,) = [v for code, v in rules if eval(code, {}, names)]
            assert book.versioned_name(tool, user) == f"{tool}_v{version}"


def test_the_document_describes_every_tool_it_names():
    document = policy_text(PAPER_RULES)
    for tool in TOOLS.values():
        for name in [f"{tool.name}_v{i}" for i in range(1, tool.versions + 1)] or [tool.name]:
            assert re.search(rf"^- .*\b{name}\b.*\(", document, re.M), name
    numbers = [int(n) for n in re.findall(r"^Rule (\d+):", document, re.M)]
    assert numbers == list(range(1, 31))
    assert all(f"Rule {n}: {text}" in document for n, text in general_rules(PAPER_RULES).values())


@given(st.integers(0, 10_000))
def test_an_override_changes_every_rule(seed):
    book = override_rule_book(seed)
    assert book == override_rule_book(seed)
    for ours, theirs in zip(PAPER_RULES.rules, book.rules, strict=True):
        assert (ours.tool, ours.number) == (theirs.tool, theirs.number)
        assert ours.version != theirs.version
    assert policy_text(book).splitlines()[0] == policy_text(PAPER_RULES).splitlines()[0]


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match=r"OCR has versions 1\.\.5"):
        make_rule_book(versions={"OCR": (1, 2, 3, 4, 4)})
    with pytest.raises(ValueError, match="thresholds must rise"):
        Thresholds(low=600)
    with pytest.raises(ValueError, match="no profile"):
        Profile(30, 10, "E")


def test_conditions_read_as_the_paper_writes_them():
    assert str(Condition("credits", above=250, up_to=750)) == "250 < credits <= 750"
    assert str(Condition("age", at_least=21, below=60)) == "21 <= age < 60"
    assert str(Condition("age", at_least=60)) == "age >= 60"
    assert str(Condition("account_type", among=("A", "B", "C"))) == "account_type is A, B or C"


def test_problems_of_arguments_are_named():
    assert find_argument_problems("OCR", {"image": "a.jpg"}) == []
    assert find_argument_problems("OCR", {"picture": "a.jpg"}) == [
        "OCR has no argument 'picture'",
        "OCR needs the argument 'image'",
    ]
    assert find_argument_problems("GoogleSearch", {"query": "x", "k": True}) == [
        "GoogleSearch.k is int, got True"
    ]
    assert find_argument_problems("DrawBox", {"image": "a", "bbox": "b", "annotation": None}) == []


def test_calls_are_json_with_letters_as_they_are():
    text = call_json("OCR_v1", {"image": "Brontë.jpg"})
    assert text == '{"name": "OCR_v1", "arguments": {"image": "Brontë.jpg"}}'
    assert json.loads(text)["arguments"] == {"image": "Brontë.jpg"}
