"""The command line of engine.profiling: flags, sizes, refusals, the table and the file."""

import json
import shlex

import pytest

from engine import cli
from engine.errors import UserError
from engine.profiling import __main__ as program
from engine.profiling.options import command, parse, size

SMALL = ["--teachers", "tinybert", "--student", "tinybert", "--source", "embedded", "--device", "cpu"]


@pytest.mark.parametrize(("given", "bytes"), [
    ("24GB", 24 * 10**9), ("24GiB", 24 * 2**30), ("80G", 80 * 10**9), ("80Gi", 80 * 2**30), ("0.5 TiB", 2**39),
    ("12345", 12345), ("700mb", 700 * 10**6), ("3KiB", 3072),
])  # fmt: skip
def test_sizes(given, bytes):
    assert size(given, "--gpu-memory") == bytes


@pytest.mark.parametrize("given", ["", "24XB", "GB", "-3GB", "0", "0GB", "1e9", "24GB8", "nan"])
def test_wrong_sizes(given):
    with pytest.raises(UserError, match=r"^--gpu-memory is .*such as 24GB, 24GiB, 80G or bytes\.$"):
        size(given, "--gpu-memory")


def test_flags_of_both_kinds():
    found = parse(["--estimate", "--student", "tinybert", "--gpu-memory", "24GB", "--strategies", "first_order,exact",
                   "--checkpointing-choices", "all", "--length", "64,32,64", "--batch-sizes=8", "--pilot-steps", "2"])  # fmt: skip
    assert found.budget == 24 * 10**9
    assert found.choices == {"meta_grad": ["exact", "first_order"], "max_length": [64, 32], "batch_size": [8],
                             "checkpointing": ["none", "student", "teachers", "both"]}  # fmt: skip
    assert (found.config.models.student, found.config.method.pilot_steps) == ("tinybert", 2)
    assert found.config.run.device == "cuda", "a GPU's memory is meant"
    assert parse(["--estimate", "--gpu-memory", "1G", "--device", "cpu"]).config.run.device == "cpu"
    assert parse(["--estimate"]).config == cli.parse([])
    assert parse(["--estimate"]).choices == {}


@pytest.mark.parametrize(("words", "said"), [
    (["--estimate", "--gpu-memory", "much"], "--gpu-memory"),
    (["--estimate", "--strategies", "exact,magic"], "--strategies has 'magic'"),
    (["--estimate", "--checkpointing-choices", "selective"], "--checkpointing-choices"),
    (["--estimate", "--batch-sizes", "8,x"], "--batch-sizes"),
    (["--estimate", "--batch-sizes", "0"], "--batch-sizes"),
    (["--estimate", "--lengths", "3"], "--lengths"),
    (["--estimate", "--lengths", ""], "--lengths"),
    (["--estimate", "--micro-batch-sizes", "0"], "--micro-batch-sizes"),
    (["--estimate", "--classes", "0"], "--classes"),
    (["--estimate", "--classes", "two"], "--classes"),
    (["--estimate", "--alpha", "7"], "--alpha"),
    (["--estimate", "--no-such-flag"], "--no-such-flag"),
    (["--estimate", "--resume"], "--resume"),
    (["--estimate", "--device", "tpu"], "--device"),
    (["--estimate", "--student", "no-such-model"], "no-such-model"),
    (["--estimate", "--source", "embedded", "--student", "user/name"], "user/name"),
    (["--estimate", *SMALL, "--lengths", "64,4096"], "--lengths"),
    (["--estimate", *SMALL, "--method", "metakd"], "--method metakd"),
    (["--estimate", *SMALL, "--student-layers", "0,9"], "--student-layers"),
], ids=lambda words: " ".join(words) if isinstance(words, list) else words)  # fmt: skip
def test_refusals_are_one_sentence_that_names_the_flag(words, said, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert program.main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert said in printed
    assert printed.count("\n") == 1


def test_the_command_takes_the_place_of_what_changes():
    words = ["--student", "a b", "--batch-size", "32", "--checkpointing=none", "--lr", "1e-4"]
    found = command(words, {"batch_size": 16, "checkpointing": "both", "micro_batch_size": None, "precision": "bf16"})
    assert found == (
        "python -m engine.train --student 'a b' --lr 1e-4 --batch-size 16 --checkpointing both --precision bf16"
    )
    assert cli.parse(shlex.split(found)[3:]).optim.batch_size == 16


def test_a_table_a_sentence_and_a_file(tmp_path, capsys):
    output = tmp_path / "out"
    words = ["--estimate", *SMALL, "--gpu-memory", "10GB", "--lengths", "32", "--batch-size", "4", "--strategies",
             "exact,double_backward", "--output", str(output)]  # fmt: skip
    assert program.main(words) == 0
    printed = capsys.readouterr().out
    assert "EMBEDDED DEMONSTRATION" in printed
    assert "Assumed:" in printed
    found = json.loads((output / "estimate.json").read_text())
    assert found["gpu_memory"] == 10 * 10**9
    exact, double = found["estimates"]
    assert exact["fits"] is double["fits"] is True
    assert (exact["setting"]["meta_grad"], double["setting"]["meta_grad"]) == ("exact", "double_backward")
    assert (exact["device"], exact["phase"]) == ("cpu", "metadistil")
    assert exact["total"] == exact["tensors"] + sum(exact["reserve"].values())
    assert exact["tensors"] == sum(exact["categories"].values())
    chosen = found["estimates"][found["cheapest"]]
    assert chosen["flops"] == min(exact["flops"], double["flops"]) > 0
    run = found["sentence"].split(": ")[-1]
    assert run in printed.replace("\n", " ") or run.split()[-1] in printed
    config = cli.parse(shlex.split(run)[3:])
    assert config.data.max_length == 32
    assert config.method.meta_grad == chosen["setting"]["meta_grad"]


def test_what_fits_nothing_says_what_is_least(capsys):
    words = [
        "--estimate",
        *SMALL,
        "--gpu-memory",
        "1MB",
        "--method",
        "finetune",
        "--max-length",
        "8",
        "--batch-size",
        "2",
    ]
    assert program.main(words) == 0
    printed = capsys.readouterr().out
    assert "Nothing fits" in printed
    assert "no" in printed


def test_a_used_output_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert program.main(["--estimate", *SMALL, "--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err
