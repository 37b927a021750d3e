"""The command line of engine.profiling: flags, sizes, refusals, the table and the file."""

import json
import shlex

import pytest
import torch

from engine import cli
from engine.errors import UserError
from engine.profiling import __main__ as program
from engine.profiling import forecast
from engine.profiling.estimate import Estimate
from engine.profiling.ledger import CATEGORIES
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


REFUSED = [
    (["--gpu-memory", "much"], "--gpu-memory"),
    (["--strategies", "exact,magic"], "--strategies has 'magic'"),
    (["--checkpointing-choices", "selective"], "--checkpointing-choices"),
    (["--batch-sizes", "8,x"], "--batch-sizes"),
    (["--batch-sizes", "0"], "--batch-sizes"),
    (["--lengths", "3"], "--lengths"),
    (["--lengths", ""], "--lengths"),
    (["--micro-batch-sizes", "0"], "--micro-batch-sizes"),
    (["--classes", "0"], "--classes"),
    (["--classes", "two"], "--classes"),
    (["--steps", "0"], "--steps is 0"),
    (["--alpha", "7"], "--alpha"),
    (["--no-such-flag"], "--no-such-flag"),
    (["--resume"], "--resume"),
    (["--device", "tpu"], "--device"),
    (["--student", "no-such-model"], "no-such-model"),
    (["--source", "embedded", "--student", "user/name"], "user/name"),
    ([*SMALL, "--lengths", "64,4096"], "--lengths"),
    ([*SMALL, "--method", "metakd"], "--method metakd"),
    ([*SMALL, "--student-layers", "0,9"], "--student-layers"),
]


@pytest.mark.parametrize(
    ("words", "said"), REFUSED, ids=lambda words: " ".join(words) if isinstance(words, list) else words
)
def test_refusals_are_one_sentence_that_names_the_flag(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert program.main(["--estimate", *words]) == 2
    assert sentence(capsys, said)


def sentence(capsys, said: str) -> bool:
    printed = capsys.readouterr().err
    return printed.startswith("error: ") and said in printed and printed.count("\n") == 1


def test_what_only_a_measurement_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = [*SMALL, "--output", str(tmp_path / "o")]
    for more, said in ((["--gpu-memory", "24GB"], "--estimate"), (["--device", "cuda"], "finds no CUDA device")):
        assert program.main([*words, *more]) == 2
        assert sentence(capsys, said) and not (tmp_path / "o").exists()


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


def test_what_fits_nothing_says_what_is_least(capsys, monkeypatch):
    def estimate(config, *_) -> Estimate:
        return Estimate(
            "cpu", "kd", 2**30 // config.optim.batch_size, {}, dict.fromkeys(CATEGORIES, 0), "quiz", {}, {}, 1.0, []
        )

    monkeypatch.setattr(forecast, "estimate", estimate)
    assert program.main(["--estimate", *SMALL, "--gpu-memory", "1MB", "--batch-sizes", "4,8"]) == 0
    printed = capsys.readouterr().out
    assert "Nothing fits into 0.00 GiB; the smallest is 8 x 128" in printed and "with 0.12 GiB" in printed


def test_a_used_output_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert program.main(["--estimate", *SMALL, "--output", str(tmp_path)]) == 2
    assert "--output" in capsys.readouterr().err
