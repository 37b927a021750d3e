"""What names stand for, where models come from, and how they are read."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.data.splits import Task
from engine.embedded import build
from engine.errors import UserError
from engine.hub import Hub
from engine.models import load as models
from engine.models.load import ModelSource, load_model, resolve_models

TEXTS = ["the plot was superb", "the soup is awful", "a camera that never fails"]
TASK = Task("classification", ("negative", "positive"), False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A local Hugging Face directory with a trained head for two labels."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    module, tokenizer = build("bert", TEXTS, 2, 0)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """No hub, and an empty hub cache: any attempt to ask is an error."""
    monkeypatch.setattr(models, "_cached", lambda repo: None)
    monkeypatch.setattr(models, "_download", lambda repo: pytest.fail("asked the network"))


def load(folder: Path, task=TASK, seed=0):
    return load_model(ModelSource(str(folder), folder.name, "local", str(folder)), task, lambda: TEXTS, seed)


def test_names_and_samples(no_network, directory, tmp_path):
    """Directories of one name stay apart."""
    other = shutil.copytree(directory, tmp_path / "tiny-bert")
    given = ["bert", "bert2", "roberta", "bert", str(directory), str(directory), str(other)]
    found = resolve_models(given, Hub("embedded"))
    assert [(s.name, s.sample) for s in found] == [
        ("bert", 0), ("bert2", 1), ("roberta", 0), ("bert3", 2), ("tiny-bert", 0), ("tiny-bert-2", 1), ("tiny-bert.2", 0),
    ]  # fmt: skip
    assert [s.kind for s in found] == ["embedded"] * 4 + ["local"] * 3


@pytest.mark.parametrize(
    "name", ["brt", "bert0", "./nowhere", "/nowhere/at/all", "bert-base-uncased", "~nobody/x", "a/b/c"]
)
def test_unknown_names_are_refused_without_asking(no_network, name):
    with pytest.raises(UserError, match="Unknown model"):
        resolve_models([name], Hub("auto"))


def test_a_hub_id_has_no_embedded_stand_in(no_network, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        resolve_models(["user/name"], Hub("auto"))
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        resolve_models(["bert"], Hub("hub"))
    assert resolve_models(["bert"], Hub("auto"))[0].kind == "embedded"


def test_a_model_in_the_hub_cache_needs_no_hub(monkeypatch, directory, tmp_path):
    from huggingface_hub import constants

    repository = tmp_path / "models--google-bert--bert-base-uncased"
    snapshot = shutil.copytree(directory, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (source,) = resolve_models(["bert"], Hub("hub"))
    assert (source.kind, source.name, Path(source.place)) == ("hub", "bert", snapshot)
    assert source.describe() == "google-bert/bert-base-uncased"
    assert load_model(source, TASK, lambda: TEXTS, 0).trained_head


def test_download_takes_the_bots_conversion_where_there_is_no_safetensors(monkeypatch):
    class Api:
        def list_repo_files(self, repo):
            return ["config.json", "pytorch_model.bin"]

        def get_repo_discussions(self, repo, author, discussion_type):
            assert (author, discussion_type) == ("SFconvertbot", "pull_request")
            return [SimpleNamespace(title="Adding `safetensors` variant of this model", author=author, num=7)]

    asked = {}
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **options: asked.update(options) or "there")
    assert models._download("user/name") == Path("there")
    assert asked["revision"] == "refs/pr/7"
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])
    monkeypatch.setattr(Api, "get_repo_discussions", lambda *_, **__: [])
    with pytest.raises(UserError, match="no safetensors weights"):
        models._download("user/name")


def test_a_new_head_where_the_trained_one_has_another_size(directory):
    """It depends on the seed alone, and leaves the random state."""
    assert load(directory).trained_head
    before = torch.get_rng_state()
    found = [load(directory, Task("classification", ("a", "b", "c"), False), seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    heads = [each.module.classifier.weight for each in found]
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert not any(each.trained_head for each in found)
    config = found[0].module.config
    assert config.num_labels == 3 and config.id2label == {0: "a", 1: "b", 2: "c"}


def test_labels_in_another_order_are_refused(directory, tmp_path):
    folder = shutil.copytree(directory, tmp_path / "turned")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "Positive", "1": "Negative"}, "label2id": {"Positive": 0, "Negative": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="orders the labels"):
        load(folder)


def test_weights_in_half_precision_are_read_as_float32(directory, tmp_path):
    folder = shutil.copytree(directory, tmp_path / "half")
    load(directory).module.half().save_pretrained(folder)
    assert {p.dtype for p in load(folder).module.parameters()} == {torch.float32}
