"""Which domains students and teachers learn from, and what is refused."""

import dataclasses
from collections import Counter
from itertools import pairwise

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import Config
from engine.data.splits import Splits, Task
from engine.errors import UserError
from engine.models.load import ModelSource
from engine.run.domains import DomainPlan, plan

NAMES = ("art", "law", "zoo")
SOURCE = ModelSource("bert", "bert", "embedded", "bert")
EVERY = frozenset(range(3))


def task(names=NAMES, kind="classification"):
    return Task(kind, ("no", "yes") if kind == "classification" else (), False, names, None)


def planned(names=NAMES, kind="classification", **changes):
    """As settings stand when a plan is made: defaults of the method filled in."""
    given = {"domain_column": "kind", "method": "kd", "prepare_method": "finetune"} | changes
    if given["method"] == "metakd" and "prepare_method" not in changes:
        given["prepare_method"] = "meta"
    return plan(Config.from_flat(given), task(names, kind))


def rows(domains, labels):
    texts = [f"text {i}" for i in range(len(domains))]
    return Dataset.from_dict({"text": texts, "label": labels, "domain": domains})


def splits(trains, held_out=None, names=NAMES):
    held_out = held_out or rows([0, 1, 2], [0, 1, 0])
    return Splits(task(names), trains, held_out, held_out, held_out, "local", [])


# Plans


def test_without_domains_there_is_one_plan():
    found = plan(Config.from_flat({"method": "kd", "prepare_method": "finetune"}), task(()))
    whole = splits([rows([0, 1], [0, 1])], names=())
    assert found.student == found.everything == found.of_teacher(SOURCE) == frozenset()
    assert found.only(whole, found.student) is whole and found.scarce(whole) is whole
    assert found.sources([SOURCE]) == [SOURCE]


WHO = [("all", "all", EVERY, EVERY), ("law", "all", {1}, EVERY), ("law", "target", {1}, {1}), ("zoo", "others", {2}, {0, 1}),
       ("all", "target", EVERY, EVERY)]  # fmt: skip


@pytest.mark.parametrize(("target", "teachers", "student", "taught"), WHO)
def test_who_learns_from_what(target, teachers, student, taught):
    found = planned(target_domain=target, teacher_domains=teachers)
    assert (found.student, found.of_teacher(SOURCE)) == (student, taught)
    assert found.everything == EVERY and found.sources([SOURCE]) == [SOURCE]


def test_a_teacher_for_each_domain():
    found = planned(target_domain="law", teacher_domains="each")
    second = dataclasses.replace(SOURCE, name="other")
    sources = found.sources([SOURCE, second])
    assert [s.name for s in sources] == [f"{n}-{d}" for n in ("bert", "other") for d in NAMES]
    assert [found.of_teacher(s) for s in sources] == [{0}, {1}, {2}] * 2
    assert all(dataclasses.replace(s, name=SOURCE.name, domain=None) == SOURCE for s in sources)


def test_names_that_fit_a_file_stay_apart():
    """Two teachers of one name would share a folder and a checkpoint."""
    found = planned(("a b", "a/b", "书", "../c"), teacher_domains="each").sources([SOURCE])
    assert [s.name for s in found] == ["bert-a-b-0", "bert-a-b-1", "bert--", "bert-..-c"]


# Examples


def test_only_some_domains():
    trains = [rows([0, 1, 2, 1], [0, 1, 0, 0]), rows([1, 1, 0], [1, 0, 1])]
    held_out = rows([2, 1, 0], [0, 1, 1])
    found, whole = planned(target_domain="law"), splits(trains, held_out)
    assert found.only(whole, EVERY) is whole
    part = found.only(whole, frozenset([1]))
    assert [t["text"][:] for t in part.train] == [["text 1", "text 3"], ["text 0", "text 1"]]
    assert part.quiz["text"][:] == part.validation["text"][:] == part.test["text"][:] == ["text 1"]
    assert set(found.only(whole, frozenset([0, 2])).train[0]["domain"]) == {0, 2}


@pytest.mark.parametrize("name", ["quiz", "validation", "test", "training"])
def test_a_set_without_the_domain(name):
    whole = splits([rows([0, 1, 2], [0, 1, 0])])
    bare = rows([0, 0], [0, 1])
    whole = dataclasses.replace(whole, **({"train": [*whole.train, bare]} if name == "training" else {name: bare}))
    with pytest.raises(UserError, match=f"The {name} set has no example of the domain law, zoo; give more rows"):
        planned().only(whole, frozenset([1, 2]))


def scarce(domains, labels, fraction):
    found = DomainPlan(NAMES, 1, "all", fraction)
    return found.scarce(splits([rows(domains, labels)])).train[0]


@settings(max_examples=10, deadline=None)
@given(
    examples=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60),
    fractions=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=4),
)
def test_a_part_of_the_target(examples, fractions):
    """In proportion to the classes and at least one of each; a larger part holds the smaller; the others whole."""
    domains, labels = zip(*examples, strict=True)
    before = Counter(examples)
    found = [scarce(domains, labels, f) for f in sorted(fractions)]
    for fraction, part in zip(sorted(fractions), found, strict=True):
        after = Counter(zip(part["domain"], part["label"], strict=True))
        assert part["text"][:] == sorted(part["text"][:], key=lambda t: int(t.split()[1]))  # the order stays
        for (k, m), n in before.items():
            kept = after[k, m]
            assert kept == n if k != 1 else max(1, fraction * n - 1e-3) <= kept < fraction * n + 1
    for small, large in pairwise(found):
        assert set(small["text"]) <= set(large["text"])


def test_sizes_of_a_part():
    """A part is no example more for a product that is not exact: 0.07 * 100 is a little above 7."""
    assert [len(scarce([1] * 100, [0] * 100, fraction)) for fraction in (0.07, 0.001, 0.29)] == [7, 1, 29]
    assert len(scarce([1] * 40, [i / 8 for i in range(40)], 0.25)) == 10  # a regression


def test_every_sample_is_cut():
    trains = [rows([1] * 10, [0, 1] * 5), rows([1] * 20, [0, 1] * 10)]
    found = planned(target_domain="law", target_fraction=0.2).scarce(splits(trains))
    assert [len(t) for t in found.train] == [2, 4] and len(found.validation) == 3


# Refusals

REFUSED = [
    ({"target_domain": "sea"}, "--target-domain is 'sea'", "art, law, zoo", "or all"),
    ({"target_fraction": 0.5}, "--target-fraction 0.5", "name that domain with --target-domain"),
    ({"teacher_domains": "others"}, "--teacher-domains others", "name that domain with --target-domain"),
    ({"domain_column": None, "target_domain": "law"}, "--target-domain law", "--domain-column"),
    ({"domain_column": None, "target_fraction": 0.5}, "--target-fraction 0.5", "--domain-column"),
    ({"domain_column": None, "teacher_domains": "each"}, "--teacher-domains each", "--domain-column"),
    ({"domain_column": None, "method": "metakd"}, "--method metakd", "--domain-column"),
    ({"domain_column": None, "prepare_method": "multitask"}, "--prepare-method multitask", "--domain-column"),
    ({"domain_column": None, "prepare_method": "meta"}, "--prepare-method meta", "--domain-column"),
    ({"names": ("art",), "method": "metakd"}, "--method metakd learns from several domains", "--method kd"),
    ({"names": ("art",), "prepare_method": "meta"}, "--prepare-method meta", "--prepare-method finetune"),
    ({"names": ("art",), "teacher_domains": "each"}, "--teacher-domains each", "only 'art'", "leave it out"),
    ({"names": ("art",), "teacher_domains": "others", "target_domain": "art"}, "--teacher-domains others", "only 'art'"),
    ({"method": "metakd", "kind": "regression"}, "--method metakd", "a regression", "--method kd"),
    ({"method": "metakd", "teacher_domains": "each"}, "--method metakd", "of --teacher-domains each has only one"),
    ({"method": "metakd", "teacher_domains": "target", "target_domain": "law"}, "of --teacher-domains target has only one"),
    ({"names": ("art", "law"), "method": "metakd", "teacher_domains": "others", "target_domain": "law"}, "has only one"),
    ({"prepare_method": "multitask", "teacher_domains": "others", "target_domain": "law"}, "--prepare-method multitask",
     "never saw", "--teacher-domains all"),
    ({"method": "metakd", "prepare_method": "multitask"}, "--prepare-method multitask makes none", "--method kd"),
]  # fmt: skip


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: " ".join(f"{k}={v}" for k, v in case[0].items()))
def test_refusals(case):
    changes, *parts = case
    with pytest.raises(UserError) as caught:
        planned(**changes)
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message and len(message) < 300
    assert all(part in message for part in parts), message


ALLOWED = [
    {"method": "metakd", "teacher_domains": "others", "target_domain": "law"},
    {"method": "metakd", "teacher_domains": "target"},
    {"prepare_method": "multitask", "target_domain": "law"},
    {"names": ("art",)},
    {"kind": "regression", "teacher_domains": "each"},
]


@pytest.mark.parametrize("changes", ALLOWED, ids=str)
def test_what_is_allowed(changes):
    assert planned(**changes).everything
