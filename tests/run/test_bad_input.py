"""What a user can get wrong: one sentence, exit status 2, and nothing on the disk is touched. Wrong data are in tests/data/."""

import json
import shutil
from dataclasses import fields
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from run_helpers import contents, flags, sentences, succeed, table
from safetensors.torch import load, save

from engine.config import Config
from engine.run.output import OutputDirectory
from engine.train import main


@pytest.fixture
def place(tmp_path, tmp_path_factory, monkeypatch):
    """A working directory with good data in d.tsv and, of two domains, domains.tsv; the cache is elsewhere."""
    monkeypatch.setenv("METADISTIL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.chdir(tmp_path)
    table(tmp_path / "d.tsv", sentences())
    rows = [(("books", "dvd")[i % 2], text, i // 2 % 2) for i, (text, _) in enumerate(sentences())]
    table(tmp_path / "domains.tsv", rows, "kind\tsentence\tlabel")
    return tmp_path


@pytest.fixture
def refused(place, capsys):
    """`refused(words, *parts)`: the command is refused, the sentence holds the parts, no file came, went or changed."""

    def check(words: list[str], *parts: str) -> str:
        before = contents(place)
        capsys.readouterr()
        status = main([str(word) for word in words])
        error = capsys.readouterr().err
        assert status == 2, error
        assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n"), error
        assert len(error) < 600 and "Traceback" not in error and "<class" not in error and "typing." not in error
        for part in parts:
            assert part in error, f"{part!r} is not in: {error}"
        assert contents(place) == before
        return error

    return check


# Settings

DOMAINS = ["--data", "domains.tsv", "--domain-column", "kind", "--method", "metakd"]  # more are in test_domain_plan.py
ALLOWED = [
    (["--batch-size", "2.5"], "--batch-size is '2.5'", "whole number"),
    (["--lr", ".inf"], "--lr is"),
    (["--lr", "abc"], "--lr is 'abc'", "number"),
    (["--method", "foo"], "--method is 'foo'", "one of finetune, kd, lgtm, metadistil, metakd, reptile"),
    (["--precision", "tf32", "--device", "cpu"], "--precision is tf32", "CUDA device", "use --precision fp32"),
    (["--optimizer", "apex", "--device", "cpu"], "--optimizer apex needs a CUDA device", "flat or torch"),
    (["--teacher-params", "some"], "--teacher-params is 'some'", "last-N"),
    (["--teacher-params", "lora:4000"], "Teacher bert: --teacher-params is lora:4000", "smaller rank"),
    (["--checkpointing", "selective"], "--checkpointing selective is refused", "use student, teachers or both"),
    (["--teacher-weights", "1,2,3"], "--teacher-weights is '1,2,3'", "learned"),
    (["--teacher-weights", "-1"], "--teacher-weights is '-1'", "positive"),
    (["--method", "kd", "--teacher-weights", "learned"], "--teacher-weights learned", "--method metadistil"),
    (["--method", "finetune", "--teacher-weights", "1"], "finetune has no teachers", "leave --teacher-weights out"),
    (["--cache-teacher-logits"], "--cache-teacher-logits", "--method metadistil", "change in every round", "--method kd"),
    (["--method", "finetune", "--cache-teacher-logits"], "--cache-teacher-logits", "has no teachers", "leave it out"),
    (["--method", "reptile", "--teachers", "distilbert", "--student", "bert"], "--layer-map skip", "the student has 4 layers"),
    (["--method", "reptile", "--meta-grad", "first_order"], "--meta-grad first_order does not fit --method reptile"),
    (["--method", "reptile", "--pilot-steps", "2"], "--pilot-steps 2 does not fit --method reptile", "leave it out"),
    (["--method", "reptile", "--checkpointing", "both"], "--checkpointing both does not fit --method reptile"),
    (["--method", "reptile", "--teacher-params", "lora:2"], "--teacher-params lora:2 does not fit --method reptile"),
    (["--learning-rate", "1"], "--learning-rate is not a flag", "--help"),
    (["--epoch", "1"], "--epoch is not a flag", "did you mean --epochs"),
    (["--teacher=bert"], "--teacher is not a flag", "did you mean --teachers"),
    (["stray"], "'stray' belongs to no flag", "quotes"),
    (["--lr"], "--lr needs a value", "--help"),
    (["--resume=yes"], "--resume takes no value", "'yes'"),
    (["--teachers", ""], "--teachers", "at least one"),
    (["--teachers", "brt"], "'brt'", "bert, roberta, distilbert, tinybert", "local directory"),
    (["--student", ""], "''", "existing local directory"),
    (["--student", "bert2"], "--student is 'bert2'"),
    (["--student", "nobody/nothing"], "'nobody/nothing'", "--source embedded", "local directory"),
    (["--student-layers", "5"], "--student-layers is [5]", "0 to 1"),
    (["--student-layers", "one"], "--student-layers is 'one'", "as in 1,3,5"),
    (["--student-layers", "0,0"], "--student-layers is [0, 0]", "once"),
    (["--device", "foo"], "--device is 'foo'", "auto, cpu, cuda"),
    (["--compile", "--checkpointing", "both"], "--compile does not go with --checkpointing both", "leave one of the two out"),
    (["--cuda-graphs", "on", "--device", "cpu"], "--cuda-graphs on needs a CUDA device", "use --cuda-graphs auto"),
    (["--quiz-size", "500"], "--quiz-size is 500", "d.tsv", "120 usable rows", "smaller size or a quiz file"),
    (["--data", "sst3"], "--data 'sst3'", "known are sst2"),
    (["--data", "mrpc"], "--data mrpc", "--source embedded", "local files"),
    (["--text-column", "words"], "d.tsv", "no column 'words'", "sentence, label", "--text-column"),
    (["--domain-column", "label"], "--domain-column is label", "the label column", "--label-column"),
    (["--metric", "pearson"], "--metric pearson", "regression", "use accuracy or f1 or matthews"),
    (["--metric", "f1", "--task", "regression"], "--metric f1", "classification", "use pearson or spearman"),
    (["--method", "finetune", "--noise-teacher", "0.2"], "--noise-teacher is 0.2", "has no teachers", "--noise-student"),
    (["--method", "kd", "--cache-teacher-logits", "--noise-teacher", "0.2"], "--noise-teacher", "--cache-teacher-logits",
     "leave one of the two out"),
    (["--feature-epochs", "2"], "--feature-epochs 2", "choose one with --feature-loss"),
    (["--feature-loss", "tinybert", "--teachers", "distilbert", "--student", "bert"], "student, which has 4, but a teacher has 2",
     "--feature-loss none"),
    (["--feature-loss", "tinybert", "--compile"], "--compile hides the attention scores", "leave one of them out"),
    (["--feature-loss", "tinybert", "--checkpointing", "both"], "--checkpointing both does not keep", "leave one of them out"),
    (["--method", "lgtm", "--feature-loss", "tinybert", "--checkpointing", "student"], "--checkpointing student does not keep"),
    (["--method", "kd", "--feature-loss", "tinybert", "--cache-teacher-logits"], "--cache-teacher-logits cannot keep",
     "--feature-epochs"),
    (["--config", "none.yaml"], "--config", "none.yaml", "existing YAML file"),
    (["--output", ""], "--output is empty", "name a directory"),
    (["--output", "d.tsv"], "--output d.tsv is a file", "directory"),
    (["--output", "d.tsv/deeper"], "--output d.tsv/deeper", "d.tsv is a file", "another directory"),
    (["--output", "/proc/none/run"], "--output /proc/none/run", "another directory"),
    (["--resume", "--output", "none"], "--resume finds no run in none", "leave --resume out"),
    (["--cache-dir", "d.tsv"], "--cache-dir", "d.tsv", "file"),
    (["--seed", str(2**64)], "--seed is"),
    (["--report-to", "comet"], "--report-to has 'comet'", "one or more of wandb, mlflow, trackio"),
    (["--metrics-port", "0", "--metrics-host", "192.0.2.1"], "--metrics-host '192.0.2.1'", "another --metrics-host"),
    (["--metrics-host", "0.0.0.0"], "--metrics-host 0.0.0.0 needs --metrics-port"),
    ([*DOMAINS, "--student", "tinybert"], "the student tinybert has 2 heads and bert 4"),
    ([*DOMAINS, "--feature-loss", "none", "--feature-epochs", "1"], "--feature-epochs 1", "choose one with --feature-loss"),
    ([*DOMAINS, "--feature-epochs", "0", "--cache-teacher-logits"], "--cache-teacher-logits cannot keep", "--feature-epochs"),
    *(([*DOMAINS, "--method", "kd", "--teachers", "TRAINED", "--prepare-method", how], f"--prepare-method {how}",
       "has a trained one already", "--retrain-teachers") for how in ("meta", "multitask")),
]  # fmt: skip


@pytest.mark.parametrize("case", ALLOWED, ids=lambda case: " ".join(case[0]))
def test_settings(refused, finished, case):
    words, *parts = case
    words = [finished / "student" if word == "TRAINED" else word for word in words]
    refused([*flags("d.tsv", "out"), *words], *parts)


CHOICES = {name: get_args(kind) for section in fields(Config)
           for name, kind in get_type_hints(section.default_factory).items() if get_origin(kind) is Literal}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_words_that_are_no_choice(refused, name):
    flag = f"--{name.replace('_', '-')}"
    refused([f"{flag}=middle"], f"{flag} is 'middle'", f"one of {', '.join(CHOICES[name])}")


def test_what_the_machine_cannot(refused, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = flags("d.tsv", "out", source="auto", teachers="nobody/nothing")
    refused(words, "'nobody/nothing'", "HF_HUB_OFFLINE", "local directory")
    words = flags("d.tsv", "out", source="hub", teachers="bert")
    refused(words, "'bert'", "HF_HUB_OFFLINE", "local directory or --source embedded")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(flags("d.tsv", "out", device="cuda"), "--device is cuda", "no CUDA device", "cpu or auto")
    monkeypatch.setenv("ENGINE_KERNELS", "cuda")
    refused(flags("d.tsv", "out"), "ENGINE_KERNELS is 'cuda'", "auto, triton, cpp, reference")


YAML = {
    "not yaml": ("a: [1,\n b", "line 3", "not valid YAML"),
    "empty": ("", "no settings", "epochs: 3"),
    "misspelt key": ("epoch: 3\n", "'epoch'", "did you mean epochs"),
    "nested": ("models:\n  teachers: bert\n", "'models.teachers'", "not a setting"),
    "fraction for a count": ("batch_size: 2.5\n", "batch_size in c.yaml is '2.5'", "whole number"),
    "list for text": ("teachers: [bert, roberta]\n", "teachers in c.yaml", "text", "quotes"),
    "nothing for a number": ("quiz_batches: null\n", "quiz_batches in c.yaml is null", "whole number"),
    "word for a switch": ("retrain_teachers: perhaps\n", "retrain_teachers in c.yaml is 'perhaps'", "true or false"),
}


@pytest.mark.parametrize("name", YAML)
def test_yaml(refused, place, name):
    text, *parts = YAML[name]
    (place / "c.yaml").write_text(text)
    words = ["--config", "c.yaml", "--data", "d.tsv", "--source", "embedded", "--output", "out"]
    refused(words, "c.yaml", *parts)


# Models


def weights(change):
    return {"model.safetensors": lambda content: save(change(load(content)), metadata={"format": "pt"})}


def config(**changes):
    return {"config.json": lambda content: json.dumps(json.loads(content) | changes).encode()}


# files of a student's directory, by what becomes of their bytes; None for a file that goes
FOREIGN = config(model_type="mine", architectures=["Mine"],
                 auto_map={"AutoConfig": "mine.MineConfig", "AutoModelForSequenceClassification": "mine.Mine"})  # fmt: skip
SPOIL = {
    "labels in another order": (config(id2label={"0": "1", "1": "0"}, label2id={"1": 0, "0": 1}), "['1', '0']", "['0', '1']"),
    "damaged weights": ({"model.safetensors": b"not safetensors"}, "Cannot read", "intact"),
    "weights cut short": ({"model.safetensors": lambda content: content[: len(content) // 2]}, "Cannot read", "intact"),
    "broken config": ({"config.json": b'{"model_type": '}, "Cannot read", "intact"),
    "config of no known model": ({"config.json": b'{"model_type": "zebra"}'}, "Cannot read", "intact"),
    "no config": ({"config.json": None}, "no config.json", "Hugging Face directory"),
    "no weights": ({"model.safetensors": None}, "no .safetensors weights", "convert"),
    "pickled weights only": ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "no .safetensors weights", "convert"),
    "no tokenizer": ({"tokenizer.json": None, "tokenizer_config.json": None}, "okenizer"),
    "damaged tokenizer": ({"tokenizer.json": b"{"}, "Cannot read", "intact"),
    "a layer missing": (weights(lambda w: {k: v for k, v in w.items() if ".layer.0." not in k}), "do not fit"),
    "other names": (weights(lambda w: {"x" + k: v for k, v in w.items()}), "do not fit"),
    "other width of words": (weights(lambda w: {k: v[:, :-1].contiguous() if "word_embeddings" in k else v
                                                for k, v in w.items()}), "do not fit"),
    "code of its own": (FOREIGN | {"mine.py": b"open('executed', 'w')\nclass MineConfig: pass\nclass Mine: pass\n"},
                        "Cannot read", "intact"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOIL)
def test_model_directories(refused, place, finished, name):
    """In turns of the teacher and of the student."""
    changes, *parts = SPOIL[name]
    folder, role = place / "model", ("teachers", "student")[list(SPOIL).index(name) % 2]
    shutil.copytree(finished / "student", folder)
    for file, change in changes.items():
        content = change((folder / file).read_bytes()) if callable(change) else change
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    refused(flags("d.tsv", "out", **{role: "./model"}), str(folder), *parts)
    assert not (place / "executed").exists()


# Output directories


def test_output_in_use(refused, place):
    (place / "out").mkdir()
    refused(flags("none.tsv", "out"), "none.tsv")  # and the folder stays empty
    refused(flags("d.tsv", "out", student="./none"), "./none")
    (place / "out" / "thesis.txt").write_text("do not touch")
    refused(flags("d.tsv", "out"), "--output out holds files already", "another directory", "--resume")


@pytest.fixture
def interrupted(place, finished):
    """What a killed run leaves, as far as --resume looks at it before it starts."""
    shutil.copytree(finished, place / "out")
    (place / "out" / "summary.json").unlink()
    return place / "out"


def test_resume_with_changed_flags(refused, interrupted):
    refused([*flags("d.tsv"), "--resume"], "--resume needs --output", "interrupted run")
    refused(["--resume", "--output", "out", "--lr", "0.5", "--seed", "3"],
            "--lr 0.5 (was 0.001)", "--seed 3 (was 1)", "start a new one")  # fmt: skip


def test_resume_from_damaged_files(refused, interrupted):
    (interrupted / "checkpoint.safetensors").write_bytes(b"nonsense")
    refused(["--resume", "--output", "out"], "checkpoint.safetensors cannot be read", "another --output")
    (interrupted / "config.yaml").write_text("epochs: [")
    refused(["--resume", "--output", "out"], "config.yaml", "not valid YAML")
    (interrupted / "config.yaml").unlink()
    refused(["--resume", "--output", "out"], "--resume finds no run in out", "config.yaml", "leave --resume out")


def test_an_output_is_for_one_process(refused, interrupted):
    other = OutputDirectory("out", "kd", resume=True)
    other.create()
    refused(flags("d.tsv", "out"), "--output out holds files already")
    refused(["--resume", "--output", "out"], "--output out is in use by another process; wait for it or stop it.")
    other.close()
    assert not (interrupted / ".lock").exists()


# What is allowed, if odd


def test_a_student_bigger_than_its_teacher_is_a_warning(place, capsys):
    succeed("d.tsv", "out", teachers="tinybert", student="bert", method="kd", max_steps=1)
    warning = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: "))
    assert "the student has 24" in warning and "tinybert" in warning and "smaller" in warning
