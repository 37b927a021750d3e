"""A method from outside: one file, by its path or as an entry point of an installed distribution, and no list is touched."""

import os
import signal
from dataclasses import replace

import pytest
from outside import bring, help_of, install
from run_helpers import assert_same_models, flags, succeed, summary

from engine import cli
from engine.compare import options as comparison
from engine.errors import UserError
from engine.methods import METHODS
from engine.profiling import options as profiling
from engine.profiling.__main__ import main as profile
from engine.profiling.estimate import Setting
from engine.profiling.profile import varied
from engine.report.__main__ import main as report
from engine.telemetry.monitor import Monitor
from engine.train import main

# What kd is with --temperature 3, in a file of its own.
SOURCE = """
from __future__ import annotations

from dataclasses import dataclass

from engine.methods import Method
from engine.methods.kd import step


@dataclass
class Kept:  # which has to find its module
    loss: float


METHOD = Method(step=step, help="by a method of one's own", teachers="frozen", title="My own method",
                defaults={"temperature": 3.0, "feature_epochs": "--epochs"}, report="It is one's own.")
"""
GIVEN = {"log_steps": 1, "checkpoint_steps": 1}


@pytest.fixture(params=[pytest.param("entry point", marks=pytest.mark.slow), "path"])
def mine(request, tmp_path, monkeypatch):
    """The value of --method."""
    return bring(request.param, tmp_path, "methods", "mine", SOURCE, monkeypatch)


@pytest.fixture(scope="module")
def theirs(data, tmp_path_factory):
    return succeed(data, tmp_path_factory.mktemp("kd") / "run", method="kd", temperature=3, **GIVEN)


def test_a_run_by_it_is_stopped_resumed_and_reported(mine, theirs, data, tmp_path, monkeypatch, capsys):
    run, log = tmp_path / "run", Monitor.log
    words = flags(data, run, method=mine, **GIVEN)

    def stopped(self, name, at, values):
        log(self, name, at, values)
        if (name, at) == ("mine", 2):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", stopped)
        assert main(words) == 128 + signal.SIGTERM
    assert main([*words, "--resume"]) == 0
    assert "Resuming 'mine' after step 2" in capsys.readouterr().out
    assert_same_models(run, theirs)
    assert summary(run)["method"] == "mine" and "mine" in summary(run)["phases"]
    monkeypatch.chdir("/")  # a path was kept as one that can be read from anywhere
    read = cli.parse(["--config", str(run / "config.yaml")]).method
    assert (read.name, read.temperature) == ("mine", 3.0) and METHODS[read.method].title == "My own method"
    assert report([str(run), "--output", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "by My own method" in page and "It is one&#39;s own." in page.replace("&#x27;", "&#39;")


def test_other_commands_take_it(mine):
    grid = comparison.parse(["--methods", f"{mine},finetune"]).grid
    assert [row.name for row in grid.rows] == ["fine-tuned", "mine", "finetune"]
    assert grid.rows[1].teachers == ["bert"] and METHODS[grid.rows[1].method].title == "My own method"
    config = profiling.parse(["--method", mine]).config
    usual = Setting.of(config)  # frozen teachers have neither another strategy nor layers to recompute
    assert varied(config, [usual, replace(usual, meta_grad="first_order"), replace(usual, checkpointing="both")]) == [
        usual
    ]


@pytest.mark.slow
def test_an_estimate_takes_it(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(SOURCE)
    words = ["--method", str(tmp_path / "mine.py"), "--source", "embedded", "--lengths", "8", "--batch-sizes", "2"]
    assert profile(["--estimate", *words]) == 0
    assert "mine" in capsys.readouterr().out


def test_help_names_them_and_imports_nothing(tmp_path):
    ruler = "DIVERGENCE = Divergence(soft=soft, help='by a ruler')"
    sources = {("methods", "mine"): SOURCE, ("divergences", "length"): ruler}
    said, modules = help_of(*(install(tmp_path / name, kind, name, text) for (kind, name), text in sources.items()))
    assert "mine, by a method of one's own" in said and "length, by a ruler" in said
    assert "(default: 5; lgtm 1; metakd 2; mine 3)" in said and "(default: 0; metakd --epochs; mine --epochs)" in said
    assert not {"torch", "shelf_mine", "shelf_length"} & modules


CALL = "METHOD = Method(step=None, {})\n"
BAD = {
    "no.py": (None, "cannot be read (No such file or directory)"),
    "empty.py": ("", "has no line 'METHOD = Method(...)'"),
    "broken.py": ("METHOD = (\n", "is not valid Python", "never closed"),
    "silent.py": (CALL.format("help='by magic'"), "has no teachers= with a literal value"),
    "features.py": (CALL.format("help='by magic', teachers='none'"), "one of its own stages 'features'"),
    "reckoned.py": (CALL.format("help='by ' + magic, teachers='none'"), "has no help= with a literal value"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_none(name, tmp_path):
    source, *parts = BAD[name]
    if source is not None:
        (tmp_path / name).write_text(source)
    with pytest.raises(UserError) as e:
        cli.parse(["--method", str(tmp_path / name)])
    assert all(part in str(e.value) for part in ["--method", name, *parts]), e.value


def test_an_entry_point_without_its_module(tmp_path, monkeypatch):
    """It is named where it is asked for, and keeps nobody from using other methods."""
    monkeypatch.syspath_prepend(install(tmp_path, "methods", "gone", SOURCE))
    (tmp_path / "shelf_gone" / "gone.py").unlink()
    with pytest.raises(UserError, match="names the module shelf_gone.gone, which is not there"):
        cli.parse(["--method", "gone"])
    assert cli.parse(["--method", "kd"]).method.name == "kd"


@pytest.mark.parametrize(("defaults", "said"), [
    ({"epoch": 3}, "has the default epoch=3"), ({"batch_size": 3}, "has the default batch_size=3"),
    ({"feature_epochs": "--epoch"}, "has the default feature_epochs='--epoch'"), ({"temperature": -1.0}, "--temperature is -1.0"),
])  # fmt: skip
def test_defaults_that_do_not_fit(defaults, said, data, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        SOURCE.replace('{"temperature": 3.0, "feature_epochs": "--epochs"}', repr(defaults))
    )
    assert main(flags(data, tmp_path / "run", method=tmp_path / "mine.py")) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [
    {"teachers": "asleep"}, {"teachers": "learning"}, {"learn_from": "quiz"}, {"own_loss": True}, {"meta_teachers": True},
])  # fmt: skip
def test_traits_that_do_not_fit(changes):
    from engine.methods import Method

    with pytest.raises(
        ValueError, match=f"^{next(iter(changes)) if changes != {'teachers': 'learning'} else 'learn_from'} is"
    ):
        Method(**{"step": print, "help": "", "teachers": "none"} | changes)
