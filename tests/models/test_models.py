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
from engine.models.load import ModelSource, content_hash, keep_layers, load_model, resolve_models

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
def no_network(monkeypatch, tmp_path):
    """No hub, and an empty hub cache: any attempt to ask is an error."""
    monkeypatch.setattr(models, "_cached", lambda repo: None)
    monkeypatch.setattr(models, "_download", lambda repo: pytest.fail("asked the network"))


def local(folder: Path) -> ModelSource:
    return ModelSource(str(folder), folder.name, "local", str(folder))


def test_names_and_samples(no_network, directory):
    given = ["bert", "bert2", "roberta", "bert", str(directory), str(directory)]
    found = resolve_models(given, Hub("embedded"))
    assert [(s.name, s.sample) for s in found] == [
        ("bert", 0), ("bert2", 1), ("roberta", 0), ("bert3", 2), ("tiny-bert", 0), ("tiny-bert-2", 1),
    ]  # fmt: skip
    assert [s.kind for s in found] == ["embedded"] * 4 + ["local"] * 2


def test_directories_of_one_name_stay_apart(no_network, directory, tmp_path):
    other = shutil.copytree(directory, tmp_path / "tiny-bert")
    found = resolve_models([str(directory), str(other)], Hub("auto"))
    assert [(s.name, s.sample) for s in found] == [("tiny-bert", 0), ("tiny-bert.2", 0)]


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
    snapshot = repository / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    for file in directory.iterdir():
        shutil.copy(file, snapshot / file.name)
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


def test_a_trained_head_is_recognised_by_its_size(directory):
    assert load_model(local(directory), TASK, lambda: TEXTS, 0).trained_head
    three = Task("classification", ("a", "b", "c"), False)
    loaded = load_model(local(directory), three, lambda: TEXTS, 0)
    assert not loaded.trained_head and loaded.module.config.num_labels == 3
    assert loaded.module.config.id2label == {0: "a", 1: "b", 2: "c"}


def test_a_new_head_depends_on_the_seed_alone_and_leaves_the_random_state(directory):
    three = Task("classification", ("a", "b", "c"), False)
    before = torch.get_rng_state()
    heads = [load_model(local(directory), three, lambda: TEXTS, seed).module.classifier.weight for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


def test_labels_in_another_order_are_refused(directory, tmp_path):
    folder = shutil.copytree(directory, tmp_path / "turned")
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": "Positive", "1": "Negative"}, "label2id": {"Positive": 0, "Negative": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="orders the labels"):
        load_model(local(folder), TASK, lambda: TEXTS, 0)


def test_weights_in_half_precision_are_read_as_float32(directory, tmp_path):
    module, tokenizer = build("bert", TEXTS, 2, 0)
    module.half().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(local(tmp_path), TASK, lambda: TEXTS, 0)
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}


@pytest.mark.parametrize("alias", ["bert", "roberta", "distilbert"])
def test_keep_layers(alias):
    module, tokenizer = build(alias, TEXTS, 2, 0)
    depth = module.config.num_hidden_layers
    before = content_hash(module)
    marked = [p for n, p in module.named_parameters() if f".{depth - 1}." in n and n.endswith("weight")][0]
    keep_layers(module, [depth - 1])
    assert module.config.num_hidden_layers == 1 and content_hash(module) != before
    kept = [p for n, p in module.named_parameters() if ".0." in n and n.endswith("weight")][0]
    assert torch.equal(kept, marked)
    module(**tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False))
    for wrong in ([], [1], [-1], [0, 0]):
        with pytest.raises(UserError, match="--student-layers"):
            keep_layers(module, wrong)
