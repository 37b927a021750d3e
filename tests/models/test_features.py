"""The layers that a feature loss matches (methods 2 and 7), and the states that it reads, against plain transformers."""

from contextlib import nullcontext

import pytest
import torch
from small_models import batch, encoder, families, plain, tiny
from transformers import AutoModelForSequenceClassification

from engine.errors import UserError
from engine.losses.domain_head import DomainProjection
from engine.models import features
from engine.models.features import (
    EXTRAS,
    InnerStates,
    all_layers,
    attach,
    detach,
    layers_to_match,
    projection,
)
from engine.run.matching import Matching

# Of states and scores of size 1 to 10: fp32 sums in another order, float64 likewise; bf16 has 8 bits and a dozen roundings.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
EVERYTHING = InnerStates(hidden=(0, 1, 2), attention=(0, 1), domain="feature")
HEADS, H = 2, 8
HIDDEN = {"extras.hidden.weight", "extras.hidden.bias"}
DOMAIN = {"extras.domain.layer.weight", "extras.domain.layer.bias"}


@pytest.mark.parametrize("how", ["skip", "last"])
def test_any_two_depths(how):
    """One inner layer of the teacher for each of the student's, in order; the embedding's output, which is hidden state 0, and
    the last left out. Published are 2, 4, 6, 8, 10 of 12 layers for 6, or the last but one; `skip` rounds down."""
    assert layers_to_match(6, 12, how)[1] == ([2, 4, 6, 8, 10] if how == "skip" else [7, 8, 9, 10, 11])
    assert layers_to_match(4, 6, how)[1] == ([1, 3, 4] if how == "skip" else [3, 4, 5])
    for student in range(2, 13):
        for teacher in range(student, 25):
            inner, matched = layers_to_match(student, teacher, how)
            assert inner == list(range(1, student)) and (teacher > student or matched == inner)
            assert len(matched) == len(inner) and matched == sorted(set(matched))
            assert matched[0] >= 1 and matched[-1] <= teacher - 1


@pytest.mark.parametrize("how", ["skip", "last"])
@pytest.mark.parametrize(("student", "teacher"), [(1, 1), (2, 4), (3, 4), (4, 12)])
def test_tinybert_matches_every_layer(student, teacher, how):
    """Embeddings with embeddings, the last layer with the last; hidden state i is what attention layer i - 1 ends in."""
    own, theirs = all_layers(student, teacher, how)
    assert own.hidden == tuple(range(student + 1)) and own.attention == tuple(range(student))
    assert theirs.hidden[0] == 0 and theirs.attention == tuple(i - 1 for i in theirs.hidden[1:])
    for i, t in zip(own.hidden[1:], theirs.hidden[1:], strict=True):
        assert t == (i * teacher // student if how == "skip" else teacher - student + i)


@pytest.mark.parametrize(
    ("match", "student", "teacher", "said"),
    [
        (layers_to_match, 1, 12, "student has 1 layers and a teacher 12"),
        (layers_to_match, 6, 5, "student has 6 layers and a teacher 5"),
        (all_layers, 4, 2, "student, which has 4, but a teacher has 2"),
    ],
)
def test_depths_that_cannot_be_matched(match, student, teacher, said):
    with pytest.raises(UserError, match=f"{said}.*--feature-loss none"):
        match(student, teacher, "skip")


# States


def domains_of(given, count=3):
    given.columns["domain"] = torch.arange(len(given.labels)) % count
    return given


@pytest.mark.parametrize(
    ("higher", "inner"),
    [
        (False, EVERYTHING),
        (True, EVERYTHING),
        (False, InnerStates(hidden=(2,), attention=(1,), domain="feature")),
        (False, InnerStates(token=(2, 1), attention=(1,), domain="feature")),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@families
def test_states_are_those_of_plain_transformers(family, dtype, higher, inner):
    """Example by example, at its real tokens: projected hidden states over sqrt(n H), scores before the softmax over
    n sqrt(heads), so that sums of squares are means. Published code has padding in its means, as it is here in none, also
    where a projection adds to it."""
    network, given = encoder(family), domains_of(batch(family))
    attach(network.module, "hidden", projection(H, H, 0))
    with torch.no_grad():
        network.module.extras["hidden"].bias.fill_(0.5)
    network.module.to(dtype)
    with network.giving(inner):
        got = network(given, higher=higher)
    module = tiny(family, "eager").to(dtype)
    expected = plain(module, given, family, output_hidden_states=True, output_attentions=True)
    close = {"rtol": 0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(got.logits, expected.logits, **close)
    if inner.token:
        first = torch.stack([expected.hidden_states[k][:, 0] + 0.5 for k in inner.token], 1)
        torch.testing.assert_close(got.features, first, **close)
    assert inner.token or got.features.shape == (4, len(inner.hidden), 9, H)
    assert got.attention.shape == (4, len(inner.attention), HEADS, 9, 9)
    for b, n in enumerate(given.inputs["own"]["attention_mask"].sum(1).tolist()):
        for i, layer in enumerate(inner.hidden):
            state = expected.hidden_states[layer][b, :n] + 0.5
            torch.testing.assert_close(got.features[b, i, :n] * (n * H) ** 0.5, state, **close)
        for i, layer in enumerate(inner.attention):
            scores = got.attention[b, i, :, :n, :n] * n * HEADS**0.5
            torch.testing.assert_close(scores.softmax(-1), expected.attentions[layer][b, :, :n, :n], **close)
            assert scores.std() > 10 * TOLERANCE[dtype] or n == 1
        assert inner.token or not got.features[b, :, n:].any()
        assert not got.attention[b, :, :, n:].any() and not got.attention[b, :, :, :, n:].any()
        torch.testing.assert_close(got.domain[b], expected.hidden_states[-1][b, :n].mean(0), **close)


@pytest.mark.parametrize("part", ["hidden", "attention", "domain"])
@families
def test_gradients_flow_to_every_layer(family, part):
    """Of each part of the loss by itself; the classifier gets none."""
    network, wanted = encoder(family), {"hidden": (0, 1, 2), "attention": (0, 1), "domain": "feature"}
    attach(network.module, "hidden", projection(H, 6, 0))
    attach(network.module, "domain", DomainProjection(projection(H, 6, 1)))
    with network.giving(InnerStates(**{part: wanted[part]})):
        out = network(domains_of(batch(family)))
    sum(t.square().sum() for t in out.given()[1:]).backward()
    moved = {n for n, p in network.module.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
    assert not any("classifier" in n for n in moved)
    expected = {n for n in network.trainable() if ".layer." in n and "extras" not in n and n.endswith("weight")}
    if part == "attention":  # what the last layer makes of its scores is nobody's matter
        expected = {n for n in expected if ".layer.0." in n or any(w in n for w in ("query", "key", "q_lin", "k_lin"))}
    assert expected <= moved
    extras = {"hidden": HIDDEN, "attention": set(), "domain": DOMAIN}[part]
    assert {n for n in moved if n.startswith("extras")} == extras


@families
def test_bf16_states_come_near_float32(family):
    found = []
    for precision in ("fp32", "bf16"):
        network = encoder(family, precision)
        attach(network.module, "hidden", projection(H, 6, 0))
        network.flatten()
        with network.giving(EVERYTHING):
            found.append(network(domains_of(batch(family))).given())
    for full, low in zip(*found, strict=True):
        assert low.dtype == torch.float32
        assert 0 < (full - low).norm() < 0.03 * full.norm()  # 8 bits, a dozen roundings


def test_giving_is_put_back():
    """Also after an error in the forward, which leaves no trace."""
    network, given = encoder("bert"), batch("bert")
    before = network(given)
    broken = network.module.classifier.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), network.giving(InnerStates(attention=(0,))):
        network(given)
    broken.remove()
    assert "forward" not in network.module.__dict__ and features._found is None and not features._wanted
    with network.giving(InnerStates(hidden=(0,))):
        with network.giving(InnerStates(token=(1,))):
            assert network(given).features.shape == (4, 1, H)
        assert network(given).features.shape == (4, 1, 9, H)
    assert network.inner == InnerStates() and "forward" not in network.module.__dict__
    assert torch.equal(network(given).logits, before.logits) and network(given).features is None
    assert network.module.config._attn_implementation == "sdpa"


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
    network = encoder("bert", "bf16")
    before = {n: t.clone() for n, t in network.module.state_dict().items()}
    assert len(network.flat.parameters) == len(before)
    attach(network.module, "hidden", projection(H, 6, 0))
    attach(network.module, "domain", DomainProjection(projection(H, 6, 1)))
    assert network.module.state_dict().keys() - before.keys() == HIDDEN | DOMAIN
    assert network.flatten().parameters.keys() - before.keys() == HIDDEN | DOMAIN
    assert network(batch("bert")).logits.isfinite().all()
    detach(network.module)
    detach(network.module)  # also where there are none
    after = network.module.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())
    assert not hasattr(network.module, EXTRAS)
    network.flatten()  # the flat parameters of a new learner have the model's own names again, for its copies in bf16 too
    assert network(batch("bert")).logits.isfinite().all()


@pytest.mark.parametrize("fails", [False, True])
def test_a_student_is_exported_without_its_projection(fails, tmp_path):
    """After the body of `between`, in which tests/run/test_matching.py sees it learn, a plain model; also after an error."""
    student, teacher = encoder("bert"), encoder("bert")
    teacher.module.config.hidden_size = 6  # of which it is only asked
    own, theirs = all_layers(2, 2, "skip")
    given = domains_of(batch("bert"))
    with (
        pytest.raises(ZeroDivisionError) if fails else nullcontext(),
        Matching(own, [theirs], 0).between(student, [teacher]),
    ):
        assert student(given).features.shape == (4, 3, 9, 6) and teacher.inner == theirs
        if fails:
            raise ZeroDivisionError
    assert student.inner == teacher.inner == InnerStates()
    student.module.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == student.module.state_dict().keys() == tiny("bert").state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(plain(loaded, given, "bert").logits, student(given).logits, rtol=0, atol=1e-5)
