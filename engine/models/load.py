"""Which model a name stands for, where its weights come from, and how it is loaded.

Weights are read from safetensors only and code that comes with a model is never run. A local directory is read without
touching the network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PretrainedConfig
from transformers import logging as transformers_logging

from engine.data.splits import Task
from engine.errors import UserError
from engine.hub import Hub
from engine.models import families

ALIASES = {
    "bert": "google-bert/bert-base-uncased",
    "roberta": "FacebookAI/roberta-base",
    "distilbert": "distilbert/distilbert-base-uncased",
    "tinybert": "huawei-noah/TinyBERT_General_4L_312D",
}
HUB_FILES = [
    "config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "tokenizer*", "vocab*",
    "merges.txt", "special_tokens_map.json", "*.model",
]  # fmt: skip

LONG = 1 << 30  # tokens, where a model says of no limit
TOKENIZER_FILES = ["tokenizer.json", "vocab*", "*.model"]

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@dataclass(frozen=True)
class ModelSource:
    """One model as the user named it: `given`, resolved to a name for files and tables and to a place to load from."""

    given: str
    name: str
    kind: str  # "local", "hub" or "embedded"
    place: str  # directory, or the alias of an embedded model
    sample: int = 0  # which disjoint training sample fine-tunes it
    domain: int | None = None  # the only domain that it learns from, where it is one teacher of several

    def describe(self) -> str:
        return {"local": self.place, "hub": ALIASES.get(_alias(self.given)[0], self.given),
                "embedded": f"embedded miniature of {ALIASES.get(self.place)}"}[self.kind]  # fmt: skip


@dataclass
class Loaded:
    """A model in float32 on the CPU with its tokenizer, and whether its classification head came trained."""

    module: nn.Module
    tokenizer: object
    trained_head: bool
    max_length: int  # tokens it can read
    note: str | None = None  # what of its configuration was changed


def resolve_models(given: list[str], hub: Hub) -> list[ModelSource]:
    """Sources of the models named in `given`, in order; a source named again takes the next disjoint sample.

    Raises UserError for a name that is neither an alias, a hub id nor a local directory, or that cannot be had.
    """
    sources: list[ModelSource] = []
    for item in given:
        alias, sample = _alias(item)
        kind, place = _locate(item, alias, hub)
        while any((s.kind, s.place, s.sample) == (kind, place, sample) for s in sources):
            sample += 1
        base = alias or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(place if kind == "local" else item).name) or "model"
        name = base if sample == 0 else f"{base}{'' if alias else '-'}{sample + 1}"
        taken = {s.name for s in sources}
        if name in taken:  # two directories whose last part is the same
            name = next(f"{name}.{n}" for n in range(2, len(sources) + 3) if f"{name}.{n}" not in taken)
        sources.append(ModelSource(item, name, kind, place, sample))
    return sources


def load_model(
    source: ModelSource, task: Task, texts: Callable[[], list[str]], seed: int, keep_head: bool = True
) -> Loaded:
    """The model of `source` for `task`; `seed` fixes the weights that are not in its files (a new head).

    Without `keep_head` a trained head counts as untrained. `texts` gives the training texts, which an embedded model's tokenizer is trained on. The global random state is left
    alone. Raises UserError for files that cannot be read.
    """
    if source.kind == "embedded":
        from engine.embedded import build

        problem = "regression" if task.kind == "regression" else "single_label_classification"
        module, tokenizer = build(source.place, texts(), task.num_labels, seed, problem)
        trained = False
    else:
        module, tokenizer, trained = _read(Path(source.place), task, seed, keep_head)
    _name_labels(module, task)
    longest = min(families.longest(module) or LONG, tokenizer.model_max_length)
    return Loaded(module, tokenizer, trained, longest, _find_padding(module, tokenizer))


def configuration_of(given: str, hub: Hub) -> tuple[str | None, int, PretrainedConfig | None]:
    """(alias, sample, configuration) of a named model, without its weights; the configuration is None for an alias whose own
    cannot be had. Raises UserError as `resolve_models` does."""
    alias, sample = _alias(given)
    path, repo = Path(given).expanduser(), ALIASES.get(alias, given)
    try:
        if given.strip() and path.is_dir():
            return alias, sample, AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        if alias is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", given):
            raise _unknown(given)
        if hub.source != "embedded":
            if (folder := _cached(repo)) is not None:
                return alias, sample, AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            if hub.reachable():
                return alias, sample, AutoConfig.from_pretrained(repo, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise UserError(f"Cannot read the configuration of model {given!r} ({_first_line(e)}); give a Hugging Face directory "
                        "or a hub id of a model that transformers knows.") from e  # fmt: skip
    if alias is None:
        why = "--source embedded was given" if hub.source == "embedded" else f"the hub cannot be reached ({hub.why})"
        raise UserError(
            f"Model {given!r} cannot be loaded: {why}; give a local directory or one of {', '.join(ALIASES)}."
        )
    return alias, sample, None


def content_hash(module: nn.Module) -> str:
    """sha256 over the configuration and every weight: two models with one hash compute the same."""
    digest = hashlib.sha256(json.dumps(module.config.to_diff_dict(), sort_keys=True, default=str).encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        # sync: before a training
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _alias(item: str) -> tuple[str | None, int]:
    """("bert", 1) for bert2, (None, 0) for what is not an alias."""
    match = re.fullmatch(rf"({'|'.join(ALIASES)})([1-9]\d?)?", item)
    return (match[1], int(match[2] or 1) - 1) if match else (None, 0)


def _locate(item: str, alias: str | None, hub: Hub) -> tuple[str, str]:
    """(kind, place) of one named model."""
    path = Path(item).expanduser()
    if item.strip() and path.is_dir():
        return "local", str(path.resolve())
    if alias is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", item) or item.startswith((".", "~", "/")):
        raise _unknown(item)
    repo = ALIASES.get(alias, item)
    if hub.source != "embedded":
        directory = _cached(repo) or (_download(repo) if hub.reachable() else None)
        if directory:
            return "hub", str(directory)
        if hub.source == "hub":
            raise UserError(f"Model {item!r} ({repo}) is not cached and the hub cannot be reached ({hub.why}); give a "
                            "local directory or --source embedded.")  # fmt: skip
    if alias is None:
        why = "--source embedded was given" if hub.source == "embedded" else f"the hub cannot be reached ({hub.why})"
        raise UserError(f"Model {item!r} cannot be loaded: {why}, and only {', '.join(ALIASES)} have an embedded "
                        "stand-in; give a local directory or one of those.")  # fmt: skip
    return "embedded", alias


def _unknown(item: str) -> UserError:
    return UserError(f"Unknown model {item!r}: give {', '.join(ALIASES)} (bert2 for a second sample), a hub id such as "
                     "user/name, or an existing local directory.")  # fmt: skip


def _cached(repo: str) -> Path | None:
    """A complete snapshot of `repo` in the local hub cache, whichever revision it is."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return None
    for found in repos:
        if found.repo_id == repo and found.repo_type == "model":
            revisions = sorted(found.revisions, key=lambda r: ("main" not in r.refs, -r.last_modified))
            for revision in revisions:
                folder = Path(revision.snapshot_path)
                if all(
                    any(map(folder.glob, patterns))
                    for patterns in (["config.json"], ["model*.safetensors"], TOKENIZER_FILES)
                ):
                    return folder
    return None


def _download(repo: str) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        api = HfApi()
        revision = None
        if not any(f.endswith(".safetensors") for f in api.list_repo_files(repo)):
            revision = _conversion(api, repo)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except UserError:
        raise
    except Exception as e:  # the hub client's many errors all mean the same to a user
        raise UserError(f"Cannot download model {repo!r}: {_first_line(e)}; check the id and your access.") from e


def _conversion(api, repo: str) -> str:
    """The revision in which the hub's own bot converted the weights of a repository that has none in safetensors."""
    for request in api.get_repo_discussions(repo, author="SFconvertbot", discussion_type="pull_request"):
        if "safetensors" in request.title and request.author == "SFconvertbot":
            return f"refs/pr/{request.num}"
    raise UserError(f"Model {repo!r} has no safetensors weights, and no others are read; convert it and give the local "
                    "directory.")  # fmt: skip


def _read(folder: Path, task: Task, seed: int, keep_head: bool) -> tuple[nn.Module, object, bool]:
    """Module, tokenizer and whether the head is trained, from a Hugging Face directory."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not a model directory: it has no config.json; give a Hugging Face directory.")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no .safetensors weights, and no others are read; convert the model first.")
    # without this transformers would make a tokenizer that knows no word
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(f"{folder} has no tokenizer (tokenizer.json); save the model's tokenizer into it.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        trained_labels = getattr(config, "id2label", None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the initialisation of weights that are not in the files
            module, info = AutoModelForSequenceClassification.from_pretrained(
                folder, num_labels=task.num_labels, dtype=torch.float32,
                use_safetensors=True, trust_remote_code=False, local_files_only=True, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises a dozen kinds for unreadable files; the user needs the sentence
        raise UserError(f"Cannot read the model in {folder} ({_first_line(e)}); give a Hugging Face directory with intact "
                        "weights, configuration and tokenizer of a model that transformers knows.") from e  # fmt: skip
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"The tokenizer in {folder} has no fast version (tokenizer.json); convert it first.")
    if tokenizer.pad_token_id is None and families.finds_last_token(module):
        tokenizer.pad_token = tokenizer.eos_token  # GPT-2 and Llama have no other
    if tokenizer.pad_token_id is None:
        raise UserError(f"The tokenizer in {folder} has no padding token; set pad_token in its tokenizer_config.json.")
    rows, last = module.get_input_embeddings().weight.shape[0], max(tokenizer.get_vocab().values())
    if last >= rows:
        raise UserError(f"The tokenizer in {folder} gives ids up to {last}, and the model has embeddings for {rows} tokens; give "
                        "the model its own tokenizer, or call resize_token_embeddings and save it.")  # fmt: skip
    if getattr(module.config, "type_vocab_size", None) == 1 and "token_type_ids" in tokenizer.model_input_names:
        # it may give types that the model knows nothing of; so that the exported one does not either
        names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    _refuse_lost_weights(folder, module, info)
    trained = keep_head and not info["missing_keys"] and not info["mismatched_keys"]
    if trained:
        _check_label_order(folder, trained_labels, task)
    return module, tokenizer, trained


def _refuse_lost_weights(folder: Path, module: nn.Module, info: dict) -> None:
    """A new head (and pooler) is as it should be; an encoder that transformers filled up with random weights is not."""
    mismatched = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    inside = f"{module.base_model_prefix}."
    lost = sorted(k for k in {*info["missing_keys"], *mismatched} if k.startswith(inside) and ".pooler." not in k)
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise UserError(f"The weights in {folder} do not fit its config.json ({lost[0]}{more} missing or of another shape); "
                        "give a directory whose configuration fits its weights.")  # fmt: skip


def _check_label_order(folder: Path, trained_labels: dict | None, task: Task) -> None:
    names = [str(v).lower() for _, v in sorted((int(k), v) for k, v in (trained_labels or {}).items())]
    wanted = [name.lower() for name in task.label_names]
    if names != wanted and sorted(names) == sorted(wanted):
        raise UserError(
            f"The trained head in {folder} orders the labels {names}, the data {wanted}; give a model directory with "
            "the data's order, or --retrain-teachers where it is a teacher.")  # fmt: skip


def _name_labels(module: nn.Module, task: Task) -> None:
    if task.kind == "regression":
        module.config.problem_type = "regression"
    else:
        module.config.problem_type = "single_label_classification"
        module.config.id2label = dict(enumerate(task.label_names))
        module.config.label2id = {name: i for i, name in enumerate(task.label_names)}


def _find_padding(module: nn.Module, tokenizer) -> str | None:
    """Where the classifier looks for the last token that is no padding, its configuration has the tokenizer's; returns what changed."""
    config, padding = module.config.get_text_config(), tokenizer.pad_token_id
    before = config.pad_token_id
    if before == padding or not families.finds_last_token(module):
        return None
    config.pad_token_id = padding
    return f"reads a text's last token, the last that is no padding, so pad_token_id {before} of its configuration becomes the tokenizer's {padding}"


def _first_line(e: Exception) -> str:
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")[:300]
