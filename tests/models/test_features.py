"""The layers that a feature loss matches (methods 2 and 7), and the states that it reads, against plain transformers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import FAMILIES, PAD, batch, encoder, plain, tiny
from transformers import AutoModelForSequenceClassification

from engine.errors import UserError
from engine.losses.domain_head import DomainProjection
from engine.losses.objectives import Objective
from engine.models.features import (
    EXTRAS,
    InnerStates,
    all_layers,
    attach,
    detach,
    layers_to_match,
    mean_state,
    over_real,
    over_real_pairs,
    projection,
)
from engine.models.learner import Learner
from engine.models.network import Encoder
from engine.run.matching import Matching

# Of states and scores of size 1 to 10: fp32 sums in another order, float64 likewise; bf16 has 8 bits and a dozen roundings.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
EVERYTHING = InnerStates(hidden=(0, 1, 2), attention=(0, 1), domain="feature")
families = pytest.mark.parametrize("family", FAMILIES)
HEADS, H = 2, 8


def test_published_maps():
    """6 layers from 12: hidden state 0 is the embedding's output, so that layer n (1-based) is state n."""
    assert layers_to_match(6, 12, "skip") == ([1, 2, 3, 4, 5], [2, 4, 6, 8, 10])
    assert layers_to_match(6, 12, "last") == ([1, 2, 3, 4, 5], [7, 8, 9, 10, 11])


@pytest.mark.parametrize("how", ["skip", "last"])
@pytest.mark.parametrize("student", range(2, 13))
def test_any_two_depths(student, how):
    """One inner layer of the teacher for each of the student's, in order; the embedding's output and the last left out."""
    for teacher in range(student, 25):
        inner, matched = layers_to_match(student, teacher, how)
        assert inner == list(range(1, student))
        assert len(matched) == len(inner) and matched == sorted(set(matched))
        assert matched[0] >= 1 and matched[-1] <= teacher - 1
        if teacher == student:
            assert matched == inner


def test_skip_rounds_down():
    assert layers_to_match(4, 6, "skip") == ([1, 2, 3], [1, 3, 4])


@pytest.mark.parametrize(("student", "teacher"), [(1, 12), (0, 1), (6, 5)])
def test_depths_that_cannot_be_matched(student, teacher):
    with pytest.raises(UserError, match=f"student has {student} layers and a teacher {teacher}.*--feature-loss none"):
        layers_to_match(student, teacher, "skip")


@pytest.mark.parametrize("how", ["skip", "last"])
@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (2, 4), (3, 4), (4, 4), (6, 12), (4, 12)])
def test_tinybert_matches_every_layer(student, teacher, how):
    """Embeddings with embeddings, the last layer with the last; hidden state i is what attention layer i - 1 ends in."""
    own, theirs = all_layers(student, teacher, how)
    assert own.hidden == tuple(range(student + 1)) and own.attention == tuple(range(student))
    assert theirs.hidden[0] == 0 and theirs.hidden[-1] == teacher and len(theirs.hidden) == student + 1
    assert theirs.attention == tuple(i - 1 for i in theirs.hidden[1:])
    for i, t in zip(own.hidden[1:], theirs.hidden[1:], strict=True):
        assert t == (i * teacher // student if how == "skip" else teacher - student + i)


def test_a_teacher_with_too_few_layers():
    with pytest.raises(UserError, match="student, which has 4, but a teacher has 2.*--feature-loss none"):
        all_layers(4, 2, "skip")


# States


def domains_of(given, count=3):
    given.columns["domain"] = torch.arange(len(given.labels)) % count
    return given


def padded(given, family, more):
    """The same examples, `more` tokens of padding behind each."""
    inputs = given.inputs["own"]
    ends = {"input_ids": PAD[family], "attention_mask": 0, "token_type_ids": 0}
    wider = {name: F.pad(t, (0, more), value=ends[name]) for name, t in inputs.items()}
    return type(given)(given.labels, {"own": wider, "another": {}}, columns=dict(given.columns))


def lengths(given):
    return given.inputs["own"]["attention_mask"].sum(1).tolist()


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@families
def test_states_are_those_of_plain_transformers(family, dtype, higher):
    """Example by example, at its real tokens: hidden states over sqrt(n H), scores before the softmax over n sqrt(heads)."""
    network, given = encoder(family), domains_of(batch(family))
    network.module.to(dtype)
    with network.giving(EVERYTHING):
        got = network(given, higher=higher)
    module = tiny(family, "eager").to(dtype)
    module.config.output_hidden_states = module.config.output_attentions = True
    expected = plain(module, given, family)
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(got.logits, expected.logits, **close)
    assert got.features.shape == (4, 3, 9, H) and got.attention.shape == (4, 2, HEADS, 9, 9)
    for b, n in enumerate(lengths(given)):
        for i, state in enumerate(expected.hidden_states):
            torch.testing.assert_close(got.features[b, i, :n] * (n * H) ** 0.5, state[b, :n], **close)
        for i, weights in enumerate(expected.attentions):
            scores = got.attention[b, i, :, :n, :n] * n * HEADS**0.5
            torch.testing.assert_close(scores.softmax(-1), weights[b, :, :n, :n], **close)
            assert scores.std() > 10 * TOLERANCE[dtype] or n == 1
        assert not got.features[b, :, n:].any()
        assert not got.attention[b, :, :, n:].any() and not got.attention[b, :, :, :, n:].any()
        torch.testing.assert_close(got.domain[b], expected.hidden_states[-1][b, :n].mean(0), **close)


@families
def test_layers_in_their_order_and_no_others(family):
    network, given = encoder(family), batch(family)
    with torch.no_grad():
        with network.giving(InnerStates(hidden=(0, 1, 2), attention=(0, 1))):
            every = network(given)
        with network.giving(InnerStates(hidden=(2,), attention=(1,))):
            one = network(given)
    assert torch.equal(one.features[:, 0], every.features[:, 2])
    assert torch.equal(one.attention[:, 0], every.attention[:, 1])
    assert not torch.equal(every.attention[:, 0], every.attention[:, 1])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), heads=st.integers(1, 3), layers=st.integers(1, 3))
def test_squares_sum_to_means_over_real_tokens(lengths, heads, layers):
    """Whatever stands in the padding, also very large numbers."""
    generator = torch.Generator().manual_seed(sum(lengths))
    length = max(lengths) + 1
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    states = torch.randn(len(lengths), layers, length, 5, generator=generator, dtype=torch.float64)
    scores = torch.randn(len(lengths), layers, heads, length, length, generator=generator, dtype=torch.float64)
    hole = mask[:, None, :, None] == 0
    states = torch.where(hole, 1e6, states)
    scores = torch.where(hole[:, :, None] | hole.transpose(2, 3)[:, :, None], -1e6, scores)
    for b, n in enumerate(lengths):
        for i in range(layers):
            got = over_real(states, mask)[b, i].square().sum()
            torch.testing.assert_close(got, states[b, i, :n].square().mean(), rtol=1e-12, atol=0)
            got = over_real_pairs(scores, mask)[b, i].square().sum()
            torch.testing.assert_close(got, scores[b, i, :, :n, :n].square().mean(), rtol=1e-12, atol=0)
        torch.testing.assert_close(mean_state(states[:, 0], mask)[b], states[b, 0, :n].mean(0), rtol=1e-12, atol=1e-15)


@families
def test_padding_is_in_no_mean(family):
    """The same examples padded wider: the same mean states and the same loss. Published code has padding in its means."""
    given = domains_of(batch(family))
    wider = padded(given, family, 7)
    losses, means = [], []
    for each in (given, wider):
        student, teacher = encoder(family), encoder(family)
        with torch.no_grad():
            for p in teacher.module.parameters():
                p.add_(0.1)
        attach(student.module, "hidden", projection(H, H, 0))
        with torch.no_grad():
            student.module.extras["hidden"].bias.fill_(0.5)  # which must not make states of padding
        outputs = []
        for network in (student, teacher):
            with network.giving(EVERYTHING):
                outputs.append(network(each))
        objective = Objective(feature_loss="tinybert", beta=1.0, on_logits=False)
        losses.append(objective.distil(outputs[0], outputs[1:], each.labels))
        means.append(outputs[1].domain)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)  # float32; with padding in it 20 % off and more
    torch.testing.assert_close(means[0], means[1], rtol=0, atol=TOLERANCE[torch.float32])


@families
def test_gradients_flow_to_every_layer(family):
    """Of the embeddings and of every layer, and each part of the loss by itself; the classifier gets none."""
    given = domains_of(batch(family))
    expected = {
        "hidden": InnerStates(hidden=(0, 1, 2)), "attention": InnerStates(attention=(0, 1)),
        "domain": InnerStates(domain="feature"),
    }  # fmt: skip
    for name, inner in expected.items():
        network = encoder(family)
        attach(network.module, "hidden", projection(H, 6, 0))
        attach(network.module, "domain", DomainProjection(projection(H, 6, 1)))
        with network.giving(inner):
            out = network(given)
        sum(t.square().sum() for t in out.given()[1:]).backward()
        moved = {n for n, p in network.module.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
        assert not any("classifier" in n for n in moved)
        layers = {n for n in network.trainable() if ".layer." in n and "extras" not in n and n.endswith("weight")}
        last = {n for n in layers if ".layer.1." in n}
        assert {n for n in layers - last if "key" in n or "query" in n or "k_lin" in n or "q_lin" in n} <= moved
        if name == "attention":  # what the last layer makes of its scores is nobody's matter
            assert {n for n in last if any(w in n for w in ("query", "key", "q_lin", "k_lin"))} <= moved
        else:
            assert layers <= moved
        wanted = {"hidden": {"extras.hidden.weight", "extras.hidden.bias"}, "attention": set(),
                  "domain": {"extras.domain.layer.weight", "extras.domain.layer.bias"}}  # fmt: skip
        assert {n for n in moved if n.startswith("extras")} == wanted[name]


@families
def test_bf16_states_come_near_float32(family):
    found = []
    for precision in ("fp32", "bf16"):
        network = encoder(family, precision)
        attach(network.module, "hidden", projection(H, 6, 0))
        with network.giving(EVERYTHING):
            found.append(network(domains_of(batch(family))).given())
    for full, low in zip(*found, strict=True):
        assert low.dtype == torch.float32
        assert 0 < (full - low).norm() < 0.03 * full.norm()  # 8 bits, a dozen roundings


def test_giving_is_put_back():
    network, given = encoder("bert"), batch("bert")
    before = network(given)
    with pytest.raises(ZeroDivisionError), network.giving(InnerStates(hidden=(0,))):
        with network.giving(InnerStates(first=(1,))):
            assert network(given).features.shape == (4, 1, H)
        assert network(given).features.shape == (4, 1, 9, H)
        raise ZeroDivisionError
    assert network.inner == InnerStates() and "forward" not in network.module.__dict__
    assert torch.equal(network(given).logits, before.logits) and network(given).features is None
    assert network.module.config._attn_implementation == "sdpa"


def test_an_error_in_a_forward_leaves_no_trace():
    network, given = encoder("bert"), batch("bert")
    network.module.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with network.giving(InnerStates(attention=(0,))), pytest.raises(ZeroDivisionError):
        network(given)
    assert "forward" not in network.module.__dict__ and network.module.config._attn_implementation == "sdpa"
    from engine.models import features

    assert features._found is None and not features._wanted


# Layers that a loss brings with it


def test_a_projection():
    """The identity where that is possible; else random, of the width's scale, by its seed alone."""
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(projection(16, 16, 0)(x), x)
    one, same, other = (projection(16, 40, seed) for seed in (1, 1, 2))
    assert torch.equal(one.weight, same.weight) and not torch.equal(one.weight, other.weight)
    assert one(x).std().item() == pytest.approx(1, rel=0.1) and not one.bias.any()


def test_extras_come_and_go():
    """Trained, listed and saved with the model while they last; its own weights stay bit for bit, and their names."""
    network = encoder("bert")
    before = {n: t.clone() for n, t in network.module.state_dict().items()}
    assert len(network.flat.parameters) == len(before)
    attach(network.module, "hidden", projection(H, 6, 0))
    attach(network.module, "domain", DomainProjection(projection(H, 6, 1)))
    names = {"extras.hidden.weight", "extras.hidden.bias", "extras.domain.layer.weight", "extras.domain.layer.bias"}
    assert network.module.state_dict().keys() - before.keys() == names == network.trainable().keys() - before.keys()
    assert names <= network.flatten().parameters.keys()
    detach(network.module)
    detach(network.module)  # also where there are none
    after = network.module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert not hasattr(network.module, EXTRAS)


@pytest.mark.parametrize("fails", [False, True])
def test_a_student_is_exported_without_its_projection(fails, tmp_path):
    """Trained in the body of `between`; after it a plain model, also after an error."""
    student, teacher = encoder("bert"), encoder("bert")
    teacher.module.config.hidden_size = 6  # of which it is only asked
    own, theirs = all_layers(2, 2, "skip")
    given, matching = domains_of(batch("bert")), Matching(own, [theirs], 0)
    try:
        with matching.between(student, [teacher]):
            learner = Learner.adamw(student, lr=0.1, steps=2, warmup_ratio=0.0, weight_decay=0.0, max_grad_norm=1.0)
            before = student.module.extras["hidden"].weight.clone()
            outputs, lookups = learner.forward(given)
            assert outputs.features.shape == (4, 3, 9, 6)
            learner.backward([outputs.features.square().sum()], None, lookups)
            learner.update()
            assert not torch.equal(student.module.extras["hidden"].weight, before)
            assert teacher.inner == theirs
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        assert fails
    assert student.inner == teacher.inner == InnerStates()
    assert student.module.state_dict().keys() == tiny("bert").state_dict().keys()
    student.module.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(loaded, given, "bert").logits, student(given).logits, rtol=0, atol=1e-5)


def test_bf16_goes_on_after_the_extras_went():
    """The flat parameters of a new learner have the model's own names again."""
    student, given = encoder("bert", "bf16"), batch("bert")
    with Matching(InnerStates(hidden=(0,)), [InnerStates(hidden=(0,))], 0).between(student, [encoder("bert")]):
        student.flatten()
        student(given)
    student.flatten()
    assert isinstance(student, Encoder) and student(given).logits.isfinite().all()
