"""Predicted memory against what torch's CPU allocator counts in the same steps, and what a search makes of predictions."""

import gc
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import BertConfig, DistilBertConfig

from engine.config import Config
from engine.data.labels import Task
from engine.errors import UserError
from engine.hub import Hub
from engine.models.load import ModelSource
from engine.params.optim import FlatAdamW
from engine.profiling.allocated import allocated
from engine.profiling.blueprints import PUBLISHED, Blueprint, blueprints
from engine.profiling.estimate import Estimate, Found, Setting, cheapest, estimate, search, settings, wider
from engine.profiling.pretend import pretending
from engine.profiling.rehearsal import Rehearsal

TASK = Task("classification", ("0", "1"), False)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TOLERANCE = 0.1  # found: 0.002, and 0.05 where autograd adds real gradients in place and fake ones not
MIB = 2**20


def model(name: str, layers: int, width: int = 64, heads: int = 4, words: int = 2_100, kind=BertConfig) -> Blueprint:
    if kind is DistilBertConfig:
        sizes = {"dim": width, "hidden_dim": 4 * width, "n_layers": layers, "n_heads": heads}
    else:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers,
                 "num_attention_heads": heads}  # fmt: skip
    config = kind(vocab_size=words, num_labels=2, **sizes)
    return Blueprint(ModelSource(name, name, "local", name), config, trained_head=True)


def configured(batch: int, length: int, **settings) -> Config:
    given = {"batch_size": batch, "max_length": length, "train_size": 1_000, "device": "cpu"}
    return Config.from_flat(Config().to_flat() | given | settings)


def measured(config: Config, student: Blueprint, teachers: list[Blueprint]) -> int:
    """Most bytes that torch's allocator had given out at once while models were made and trained."""
    gc.collect()  # what was made before is not to be freed while it counts
    return allocated(lambda: Rehearsal(config, TASK, student, teachers, CPU, follow=False).run())


def compare(batch: int, length: int, student: Blueprint, teachers: list[Blueprint], **given) -> Estimate:
    config = configured(batch, length, **given)
    predicted = estimate(config, TASK, student, teachers, CPU)
    assert sum(predicted.categories.values()) == predicted.tensors
    found = measured(config, student, teachers)
    print(f"{batch}x{length} {len(teachers)} {given}: {predicted.tensors / MIB:.1f} of {found / MIB:.1f} MiB")
    assert abs(predicted.tensors / found - 1) < TOLERANCE, (predicted.tensors, found)
    return predicted


STRATEGIES = ("exact", "double_backward", "finite_difference", "first_order")
EVERY = [{"precision": p, "meta_grad": s, "checkpointing": c}
         for p, s, c in product(("fp32", "bf16"), STRATEGIES, ("none", "both"))]  # fmt: skip
EVERY += [{"precision": p, "method": m} for p in ("fp32", "bf16") for m in ("kd", "finetune", "lgtm", "reptile")]
MORE = [
    {"micro_batch_size": 3},
    {"pilot_steps": 2, "pilot_optimizer": "adamw", "quiz_batches": 2},
    {"teacher_params": "last-1", "precision": "bf16"},
    {"optimizer": "torch", "independent_masks": True},
    {"teacher_weights": "learned", "method": "lgtm"},
    {"method": "kd", "feature_loss": "tinybert"},
    {"method": "kd", "feature_loss": "patient", "cache_teacher_logits": True},
    {"method": "kd", "retrain_teachers": True, "student_warmup_epochs": 1},
    {"meta_grad": "finite_difference", "checkpointing": "student"},
    {"method": "reptile", "checkpointing": "student"},
]


def named(given: dict) -> str:
    return " ".join(map(str, given.values()))


def test_predicted_as_measured():
    """Of the exact gradient in bf16, with checkpoints, in test_what_stays_is_counted_exactly."""
    compare(4, 16, model("s", 1), [model("t", 1)], meta_grad="double_backward")


@pytest.mark.slow
@pytest.mark.parametrize("given", EVERY + MORE, ids=named)
def test_predicted_as_measured_everywhere(given):
    compare(8, 32, model("s", 2, kind=DistilBertConfig), [model("a", 4), model("b", 3)], **given)


LARGE = [EVERY[0], EVERY[1], EVERY[2], EVERY[9], {"precision": "fp32", "method": "kd"}]  # exact both ways, and others
MINILM = [(16, 64, 1, given) for given in EVERY] + [(32, 128, 2, given) for given in LARGE]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "length", "teachers", "given"), MINILM, ids=lambda v: named(v) if isinstance(v, dict) else None
)
def test_predicted_as_measured_at_the_size_of_minilm(batch, length, teachers, given):
    size = {"width": 384, "heads": 12, "words": 30_522}
    compare(batch, length, model("s", 3, **size), [model(f"t{k}", 6, **size) for k in range(teachers)], **given)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["metadistil", "kd"])
def test_miniatures_with_their_preparation(method):
    config = configured(32, 128, method=method, teachers="bert,roberta", source="embedded")
    student, teachers = blueprints(config, TASK, Hub("embedded"))
    predicted = estimate(config, TASK, student, teachers, CPU)
    assert list(predicted.phases) == ["prepare bert", "prepare roberta", method]
    assert abs(predicted.tensors / measured(config, student, teachers) - 1) < TOLERANCE


# --- what a prediction is made of


@pytest.fixture(scope="module")
def exact():
    """Of a usual run, on a GPU."""
    return estimate(configured(32, 64), TASK, model("s", 3), [model("t", 1)], CUDA)


def test_what_stays_is_counted_exactly(exact):
    """Weights, moments, gradients and the snapshot, in bytes a weight; of the teachers nothing but weights in kd."""
    student, teacher = model("s", 1), model("t", 1)
    with pretending(CPU):
        s, t = (sum(p.numel() for p in each.build().parameters()) for each in (student, teacher))
        deep = sum(p.numel() for p in model("s", 3).build().parameters())
    small = compare(4, 16, student, [teacher], precision="bf16", checkpointing="both")
    # by rows on the CPU: of the words' table no more than the batch's 4 x 16
    taken = s - 2_100 * 64 + 4 * 16 * 64
    for found, all_weights, size, snapshot in ((exact, deep + t, 4, deep), (small, s + t, 4 + 2, taken)):
        expected = {"weights": size * all_weights, "optimizer": 8 * all_weights, "snapshots": 4 * snapshot}
        assert {name: found.categories[name] for name in expected} == pytest.approx(expected, rel=0.01)
        assert 4 * all_weights * 0.99 < found.categories["gradients"]
    frozen = estimate(configured(4, 16, method="kd"), TASK, student, [teacher], CPU).categories
    expected = {"weights": 4 * (s + t), "optimizer": 8 * s, "snapshots": 0, "second order": 0}
    assert {name: frozen[name] for name in expected} == pytest.approx(expected, rel=0.01)


def test_an_optimizer_step_on_cuda_takes_nothing():
    """engine.params.native writes in place there; where a batch is small, its plain form would be the peak."""
    found = estimate(configured(1, 8, method="finetune"), TASK, model("s", 1), [], CUDA)
    assert found.categories["other"] < 0.05 * found.tensors


def test_a_stage_begins_without_the_optimizer_of_the_one_before(monkeypatch):
    """It holds two numbers for every weight; nothing keeps it, not even a cycle that a collection would have to find."""
    teachers = [replace(model(name, 1), trained_head=False) for name in ("a", "b")]
    teachers[1].config.num_hidden_layers = 2  # alike ones would be prepared once
    config, alive, fit = configured(2, 8, method="kd", student_warmup_epochs=1), [], Rehearsal.fit

    def counted(self, phase):
        alive.append((phase.name, sum(type(o) is FlatAdamW for o in gc.get_objects())))
        return fit(self, phase)

    monkeypatch.setattr(Rehearsal, "fit", counted)
    gc.collect()
    gc.disable()
    try:
        Rehearsal(config, TASK, model("s", 1), teachers, CPU).run()
    finally:
        gc.enable()
    assert alive == [("prepare a", 1), ("prepare b", 1), ("warm up", 1), ("kd", 1)]


@pytest.mark.slow
def test_strategies_need_what_they_are_known_for(exact):
    double, kept = (
        estimate(configured(32, 64, **given), TASK, model("s", 3), [model("t", 1)], CUDA)
        for given in ({"meta_grad": "double_backward"}, {"checkpointing": "both", "snapshot_store": "pinned"})
    )
    assert double.categories["second order"] > 1.5 * exact.categories["second order"]  # found: 2.1
    assert double.tensors > exact.tensors > kept.tensors
    assert kept.categories["activations"] < 0.5 * exact.categories["activations"]  # found: 0.15
    assert kept.flops > exact.flops
    assert exact.categories["snapshots"] > 0 == kept.categories["snapshots"], "pinned snapshots are on the host"


def test_nothing_real_is_made_and_nothing_is_left_changed():
    config, found = configured(64, 128, method="finetune"), []
    before, state, patched = config.to_flat(), torch.get_rng_state(), torch.cuda.get_rng_state
    large = model("large", 1, 2048, 16, 30_522)
    assert allocated(lambda: found.append(estimate(config, TASK, large, [], CUDA))) < 64 * MIB
    assert found[0].tensors > 2**30
    assert config.to_flat() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.cuda.get_rng_state is patched
    assert type(torch.zeros(1)) is torch.Tensor


def test_dropout_on_cuda_keeps_a_byte_an_element():
    for device, mask in ((CUDA, 1), (CPU, 4)):
        with pretending(device):
            x = torch.zeros(4096, device=device, requires_grad=True)
            y = torch.nn.functional.dropout(x, 0.1, True)
            saved = [getattr(y.grad_fn, name, None) for name in ("_saved_result1", "_saved_other")]
            assert {t.element_size() for t in saved if isinstance(t, FakeTensor)} == {mask}, device


@pytest.mark.parametrize(("alias", "parameters"), [
    ("bert", 109_483_778), ("roberta", 124_647_170), ("distilbert", 66_955_010), ("tinybert", 14_350_874),
])  # fmt: skip
def test_published_sizes(alias, parameters):
    config = configured(8, 32, student=alias, teachers=alias)
    hub = Hub("auto")
    hub.reachable = lambda: False
    hub.why = "this is a test"
    student, (teacher,) = blueprints(config, TASK, hub)
    with pretending(CPU):
        assert sum(p.numel() for p in student.build().parameters()) == parameters
    assert "as published" in teacher.note
    assert not teacher.trained_head
    assert PUBLISHED[alias].num_labels == 2


@pytest.mark.parametrize(("given", "flag"), [
    ({"method": "metakd"}, "--method metakd"),
    ({"compile": True}, "--compile"),
    ({"prepare_method": "meta"}, "--prepare-method meta"),
    ({"teacher_domains": "each"}, "--teacher-domains each"),
    ({"checkpointing": "selective"}, "--checkpointing selective"),
    ({"cache_teacher_logits": True}, "--cache-teacher-logits"),
], ids=str)  # fmt: skip
def test_what_is_not_estimated_is_refused(given, flag):
    with pytest.raises(UserError, match=flag):
        estimate(configured(8, 32, **given), TASK, model("s", 2), [model("t", 2)], CPU)


# --- the search


def entry(total: int, flops: float = 1.0, **changes) -> Found:
    setting = replace(Setting.of(configured(32, 128)), **changes)
    return Found(setting, Estimate("cuda", "metadistil", total, {"context": 1}, {}, "pilot", {}, {}, flops, []))


def test_the_cheapest_that_fits():
    fast = entry(99, 2.0)
    slow, big = entry(50, 3.0, checkpointing="both"), entry(100, 1.0, batch_size=64)
    biased, parts = entry(10, 0.1, meta_grad="first_order"), entry(40, 2.0, micro_batch_size=8)
    pinned = entry(98, 2.0, snapshot_store="pinned")
    found = [biased, big, slow, parts, pinned, fast]
    assert cheapest(found, 100) is fast, "the reserve counts: 100 + 1 do not fit"
    assert cheapest([biased, parts, pinned], 100) is pinned, "copies cost less than parts"
    assert cheapest(found, 60) is parts
    assert cheapest([biased], 100) is biased
    assert cheapest(found, 5) is None
    assert cheapest([entry(1, 2.0), batch := entry(1, 3.0, batch_size=64)], 100) is batch, "operations an example"


def test_a_search_goes_on_until_something_fits():
    base = Setting.of(configured(32, 128))
    asked, kept = [base, replace(base, meta_grad="double_backward")], replace(base, checkpointing="both")
    halves, quarters = replace(base, micro_batch_size=16), replace(base, micro_batch_size=8)
    groups, seen = [[base, kept], [halves], [quarters]], []

    def of(setting: Setting) -> Estimate:
        seen.append(setting)
        return entry(setting.micro_batch_size or 100).estimate

    found = search(of, asked, 20, groups)
    assert [each.setting for each in found] == seen == [*asked, kept, halves]
    assert len(search(of, asked, 200, groups)) == len(search(of, asked, None, groups)) == 2


def test_combinations_and_what_may_be_changed():
    config = configured(32, 128)
    found = settings(config, meta_grad=["exact", "double_backward"], batch_size=[8, 16])
    assert [(s.meta_grad, s.batch_size) for s in found] == [
        ("exact", 8), ("exact", 16), ("double_backward", 8), ("double_backward", 16)]  # fmt: skip
    assert found[0].changes(config) == {"batch_size": 8}
    assert Setting.of(found[3].applied(config)) == found[3]
    groups = list(wider(config, CUDA, {"checkpointing": ["student"], "batch_size": [8]}))
    assert {s.checkpointing for group in groups for s in group} == {"student"}
    assert {s.batch_size for group in groups for s in group} == {8}
    assert {s.micro_batch_size for group in groups for s in group} == {None, 4, 2, 1}
    assert {s.precision for s in groups[-1]} == {"bf16"}
    assert {s.precision for group in groups[:-1] for s in group} == {"fp32"}
    plain = list(wider(configured(32, 128, method="kd"), CUDA, {}))
    assert {(s.checkpointing, s.snapshot_store) for group in plain for s in group} == {("none", "device")}
