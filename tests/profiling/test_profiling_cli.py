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


def test_sizes():
    right = {"24GB": 24 * 10**9, "24GiB": 24 * 2**30, "80G": 80 * 10**9, "80Gi": 80 * 2**30, "0.5 TiB": 2**39, "12345": 12345,
             "700mb": 700 * 10**6, "3KiB": 3072}  # fmt: skip
    assert {given: size(given, "--gpu-memory") for given in right} == right
    for given in ("", "24XB", "GB", "-3GB", "0", "0GB", "1e9", "24GB8", "nan"):
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
    (["--strategies", "exact,magic"], "--strategies has 'magic'"),
    (["--checkpointing-choices", "selective"], "--checkpointing-choices"),
    (["--batch-sizes", "8,x"], "--batch-sizes"),
    (["--lengths", "3"], "--lengths"),
    (["--micro-batch-sizes", "0"], "--micro-batch-sizes"),
    (["--classes", "0"], "--classes"),
    (["--steps", "0"], "--steps is 0"),
    (["--no-such-flag"], "--no-such-flag is not a flag; see python -m engine.profiling --help."),
    (["--resume"], "--resume"),
    (["--device", "tpu"], "--device"),
    (["--student", "no-such-model"], "no-such-model"),
    (["--source", "embedded", "--student", "user/name"], "user/name"),
    ([*SMALL, "--lengths", "64,4096"], "--lengths"),
    ([*SMALL, "--method", "metakd"], "--method metakd"),
    ([*SMALL, "--student-layers", "0,9"], "--student-layers"),
]


def sentence(capsys, said: str) -> bool:
    printed = capsys.readouterr().err
    return printed.startswith("error: ") and said in printed and printed.count("\n") == 1


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=str)
def test_refusals_are_one_sentence_that_names_the_flag(words, said, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert program.main(["--estimate", *words]) == 2
    assert sentence(capsys, said)


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


@pytest.fixture
def estimated(monkeypatch):
    """Estimates are made up: 8 GiB of an example, and half as many operations by the exact strategy."""

    def estimate(config, task, student, teachers, device) -> Estimate:
        sizes = dict.fromkeys(CATEGORIES, 0) | {"weights": 2**33 // config.optim.batch_size}
        flops, total = 1e9 if config.method.meta_grad == "exact" else 2e9, sum(sizes.values())
        return Estimate(str(device), "metadistil", total, {"context": 5}, sizes, "quiz", {}, {}, flops, ["nothing"])

    monkeypatch.setattr(forecast, "estimate", estimate)


def test_a_table_a_sentence_and_a_file(estimated, tmp_path, capsys):
    output = tmp_path / "out"
    words = ["--estimate", *SMALL, "--gpu-memory", "10GB", "--lengths", "32", "--batch-size", "4", "--strategies",
             "exact,double_backward", "--output", str(output)]  # fmt: skip
    assert program.main(words) == 0
    printed = capsys.readouterr().out
    assert "EMBEDDED DEMONSTRATION" in printed and "Assumed: nothing." in printed
    found = json.loads((output / "estimate.json").read_text())
    assert (found["gpu_memory"], found["cheapest"]) == (10 * 10**9, 0)
    rows = [(row["setting"]["meta_grad"], row["fits"], row["total"], row["device"]) for row in found["estimates"]]
    assert rows == [(strategy, True, 2**31 + 5, "cpu") for strategy in ("exact", "double_backward")]
    run = found["sentence"].split(": ")[-1]
    assert run.split()[-1] in printed
    config = cli.parse(shlex.split(run)[3:])
    assert (config.data.max_length, config.method.meta_grad, config.optim.batch_size) == (32, "exact", 4)
    assert program.main(words) == 2  # the output is in use
    assert "--output" in capsys.readouterr().err


def test_what_fits_nothing_says_what_is_least(estimated, capsys):
    assert program.main(["--estimate", *SMALL, "--gpu-memory", "1MB", "--batch-sizes", "4,8"]) == 0
    printed = capsys.readouterr().out
    assert "Nothing fits into 0.00 GiB; the smallest is 8 x 128" in printed and "with 1.00 GiB" in printed
