"""What is known to be wrong in the public code of MetaDistil, ReptileDistil and Meta-KD (methods 3, 5, 6): it is not so here.

Each by what can be seen from outside. Others are held by the tests of what they are about: schedules and inner rates
(test_methods, test_reptile, test_network), layers that nothing stands for (test_reptile), padding and batches (test_batches,
test_features), weights by example (test_objectives, test_metakd), disjoint sets (test_data_splits), rounds that are all alike
(test_methods).
"""

import copy
import gc
from collections import Counter

import pytest
import torch
from graph_training import METHODS_AND_SETTINGS, Training, draws
from run_helpers import sentences, succeed, summary, table, weights
from transformers import PreTrainedTokenizerFast

from engine.run import trainer
from engine.run.evaluation import predict

LEARNING = ["metadistil", "lgtm", "reptile"]


def watched(method):
    """A training, and its student and two teachers."""
    training = Training(method, mode="off", **METHODS_AND_SETTINGS[method][1])
    return training, training.state.networks()


@pytest.mark.parametrize("method", LEARNING)
def test_nothing_is_copied_deep_or_collected(method, monkeypatch):
    """MetaDistil's code copies the student and its moments in every round; here weights and moments stay where they lie."""
    training, models = watched(method)
    training.run(1)  # the first step makes the moments

    def places():
        found = [p.data_ptr() for n in models for p in n.module.parameters()]
        for learner in training.state.learners():
            moments = learner.optimizer.state_dict()["state"].values()
            found += [t.data_ptr() for m in moments for name, t in m.items() if name != "step"]
        return found

    before = places()

    def refuse(*_):
        raise AssertionError("a step must not do this")

    for module, name in ((copy, "deepcopy"), (gc, "collect"), (torch.cuda, "empty_cache")):
        monkeypatch.setattr(module, name, refuse)
    training.run(2)
    assert places() == before


@pytest.mark.parametrize("method", ["kd", *LEARNING])
def test_teachers_read_the_batch_as_it_is_and_without_dropout(method):
    """MetaDistil's code gives teachers other token types than in their preparation; Meta-KD's never puts them in eval mode."""
    training, (_, *teachers) = watched(method)
    seen = []
    for teacher in teachers:
        teacher.module.train().register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((module.training, kwargs)), with_kwargs=True
        )
    training.run(1)
    ((batch,), _) = draws()[0]
    assert len(seen) >= 2 and not any(mode for mode, _ in seen)
    for _, given in seen:
        assert given.keys() == batch.inputs["words"].keys() and torch.equal(
            given["input_ids"], batch.inputs["words"]["input_ids"]
        )


def test_the_best_weights_are_kept_and_texts_tokenised_once(tmp_path, monkeypatch):
    """There the last weights are kept, and the development set is tokenised again in every evaluation. The second of four
    validations says the most here."""
    told, seen, tokenised, call = iter([0.4, 0.9, 0.5, 0.6]), [], Counter(), PreTrainedTokenizerFast.__call__

    def predicted(network, split, device):
        seen.append({n: p.detach().clone() for n, p in network.module.state_dict().items()})
        return predict(network, split, device)

    def counted(self, text, *arguments, **settings):
        tokenised.update(text)
        return call(self, text, *arguments, **settings)

    monkeypatch.setattr(trainer, "score", lambda logits, labels, task: {"accuracy": next(told)})
    monkeypatch.setattr(trainer, "predict", predicted)
    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    data = table(tmp_path / "d.tsv", texts := sentences(120))
    run = succeed(data, tmp_path / "run", method="finetune", max_steps=4, eval_steps=1, cache_dir=tmp_path / "cache")
    kept = weights(run / "student")
    assert len(seen) == 4 and summary(run)["student"]["best_step"] == 2
    assert all(torch.equal(kept[name], seen[1][name]) for name in kept)
    assert not all(torch.equal(kept[name], seen[3][name]) for name in kept)
    assert max(tokenised.values()) == 1 and set(tokenised) <= {text for text, _ in texts} and len(tokenised) > 80
