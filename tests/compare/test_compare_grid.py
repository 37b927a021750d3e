"""From a grid to its cells: what wins over what, what names stand for, what a file of a grid may hold; and the recipes."""

import pytest
import yaml
from compare_helpers import ROWS, grid
from run_helpers import ROOT

from engine.compare import options
from engine.compare.grid import find_row
from engine.errors import UserError


def settings(number: int = 0, **changes) -> dict:
    return grid(**changes).cells()[number].settings


def refused(**changes) -> str:
    with pytest.raises(UserError) as caught:
        grid(**changes)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


# Cells


def test_cells_are_rows_values_and_seeds_seed_by_seed():
    rows = [{"name": "T", "show": "bert"}, {"name": "A", "method": "kd", "each": {"data": ["x", "y"]}}, {"name": "B"}]
    found = [(c.row, c.value, c.seed) for c in grid(rows=rows, seeds=[3, 1]).cells()]
    assert found == [(0, None, 3), (1, "x", 3), (1, "y", 3), (2, None, 3), (1, "x", 1), (1, "y", 1), (2, None, 1)]


def test_settings_of_a_cell():
    rows = [ROWS[0] | {"lr": 1e-4, "epochs": 7, "each": {"target_domain": ["a"]}}]
    assert settings(rows=rows, settings={"lr": 1e-5, "batch_size": 8}, seeds=[4]) == {
        "teacher_seed": 0, "lr": 1e-4, "batch_size": 8, "method": "kd", "teachers": "bert", "student": "distilbert",
        "epochs": 7, "target_domain": "a", "seed": 4,
    }  # fmt: skip


def test_numbers_are_numbers_however_yaml_reads_them():
    one, two = (grid(settings={"lr": lr}).cells()[0] for lr in ("6e-5", 6e-5))
    assert one == two and one.settings["lr"] == 6e-5
    rows = [ROWS[0] | {"each": {"temperature": [2, "1e1"]}}]
    assert [(c.value, c.settings["temperature"]) for c in grid(rows=rows).cells()] == [("2", 2.0), ("1e1", 10.0)]
    assert "--temperature is 'hot'" in refused(rows=[ROWS[0] | {"each": {"temperature": ["hot"]}}])


def test_small_wins_over_rows_a_rows_own_small_over_that_and_flags_over_all():
    rows = [ROWS[0] | {"epochs": 7, "train_size": 9, "small": {"epochs": 2}}]
    small = {"seeds": 2, "epochs": 1, "train_size": 5, "batch_size": 3}
    assert settings(rows=rows, small=small, seeds=9)["epochs"] == 7
    found = grid(rows=rows, small=small, seeds=9, scale="small", flags={"batch_size": 4})
    assert found.seeds == [0, 1]
    cell = found.cells()[0].settings
    assert (cell["epochs"], cell["train_size"], cell["batch_size"]) == (2, 5, 4)
    default = grid(scale="small")
    assert default.seeds == [0, 1] and default.cells()[0].settings["train_size"] == 2000


def test_finetuning_needs_no_teachers_and_a_teachers_own_figure_one_step_of_kd():
    rows = [{"name": "F", "method": "finetune"}]
    one, two = (grid(rows=rows, settings={"teachers": t}).cells()[0] for t in ("bert", "roberta"))
    assert one == two and "teachers" not in one.settings
    rows = [{"name": "T", "show": "bert2", "teachers": "bert,bert2"}]
    found = settings(rows=rows, settings={"max_steps": 50, "method": "metadistil", "student_warmup_epochs": 3})
    assert (found["method"], found["max_steps"], found["student_warmup_epochs"]) == ("kd", 1, 0)


def test_the_directory_of_a_cell_follows_its_settings():
    names = [c.name for s in ({}, {"lr": 1e-4}, {"log_steps": 3}) for c in grid(settings=s, seeds=2).cells()]
    assert names[0] == names[4] and names[1] == names[5]  # how often it logs changes no result
    assert len(set(names)) == 4 and names[0].startswith("kd-bert-distilbert-seed-0-")


# Models and data


def test_models_are_replaced_by_places():
    rows = [{"name": "M", "teachers": "bert,roberta,bert2", "student": "distilbert"}]
    found = settings(rows=rows, places={"bert": ("../enc", "0,1"), "distilbert": ("../enc", "1,3,5")})
    assert found["teachers"] == "../enc,roberta,../enc"  # a source named twice takes the next sample
    assert (found["student"], found["student_layers"]) == ("../enc", "1,3,5")
    models = {"bert": "a", "distilbert": {"place": "b", "layers": "2"}}
    found = settings(rows=rows, models=models, places={"bert": ("c", None)})
    assert (found["teachers"], found["student"], found["student_layers"]) == ("c,roberta,c", "b", "2")
    rows[0] |= {"teachers": "bert", "student": "tinybert6"}  # a model whose name ends in a digit is no sample
    assert settings(rows=rows, models={"tinybert6": "hub/id"})["student"] == "hub/id"


def test_a_second_sample_needs_the_first_before_it():
    rows, local = [{"name": "M", "teachers": "bert2"}], {"bert": ("x", None)}
    assert settings(rows=rows)["teachers"] == "bert2"  # the hub's has a name of its own
    assert "name the others before it" in refused(rows=rows, places=local)
    assert "the 3. time" in refused(rows=[{"name": "M", "teachers": "bert,bert3"}], places=local)


def test_data_are_replaced_by_places_also_where_a_row_is_run_for_each():
    rows = [ROWS[0] | {"each": {"data": ["cola", "rte"]}}]
    assert [c.settings["data"] for c in grid(rows=rows, data={"cola": "../cola"}).cells()] == ["../cola", "rte"]
    assert "--data does not go with the row 'KD'" in refused(rows=rows, flags={"data": "x"})


FILE = """
settings: {data: amazon, method: kd, teachers: bert, student: tinybert}
against: first
rows:
  - {name: first, published: {dvd: 90, books: 80}, each: {target_domain: [dvd, books]}}
  - {name: shown, show: bert, published: 85, each: {target_domain: [dvd, books]}}
  - {name: last, student: distilbert}
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "g.yaml").write_text(FILE)
    return ["--config", str(tmp_path / "g.yaml")]


def test_flags_of_models_and_data(file):
    words = "--model bert=../e --model tinybert=../e:1,3 --data amazon=../amazon --seeds 2,5 --values dvd --rows shown,first"
    given = options.parse([*file, *words.split()])
    cells = given.grid.cells()
    assert [(c.row, c.value, c.seed) for c in cells] == [(0, "dvd", 2), (1, "dvd", 2), (0, "dvd", 5)]
    assert cells[0].settings["data"] == "../amazon" and cells[0].settings["student_layers"] == "1,3"
    # the average over all values does not compare with one of them
    assert [row.published for row in given.grid.rows] == [{"dvd": 90}, None]
    assert "--model bert=e --model tinybert=e:1,3 --data amazon=amazon" in given.command


def test_a_row_that_is_left_out_is_nobodys_reference(file):
    assert options.parse(file).grid.against == "first"
    words = [*file, "--rows", "last,shown"]
    assert options.parse(words).grid.against is None
    with pytest.raises(UserError, match="--against is 'first', which no row is called"):
        options.parse([*words, "--against", "first"])
    assert options.parse([*words, "--against", "last"]).grid.against == "last"


def test_the_command_names_no_place_of_one_machine():
    words = "--methods kd --data /some/where/sst2 --cache-dir /c --output=/o --model bert=~/m/enc:1"
    assert (
        options.parse(words.split()).command == "python -m engine.compare --methods kd --data sst2 --model bert=enc:1"
    )


# Which row is compared with which


def test_reference():
    kd = [("KD", "kd", "bert", "distilbert"), ("KD", "kd", "roberta", "distilbert")]
    md = [("MD", "metadistil", *models) for models in (("roberta", "distilbert"), ("bert,roberta", "distilbert"), ("bert", "tinybert"))]  # fmt: skip
    rows = [dict(zip(("name", "method", "teachers", "student"), row, strict=True)) for row in [*kd, *md]]
    rows.insert(0, {"name": "T", "show": "bert", "teachers": "bert"})

    def references(found):
        return [reference and reference.title for reference in map(found.reference, found.rows)]

    first, second = "KD, bert -> distilbert", "KD, roberta -> distilbert"
    found = grid(rows=rows)
    assert references(found) == [None, None, None, second, first, None]
    assert find_row(found.rows, "T", "x") is found.rows[0]
    rows[5]["against"] = first
    assert references(grid(rows=rows, against=second)) == [None, second, None, second, second, first]


# Files

WRONG = [
    ({"rows": []}, "rows is no list"),
    ({"rows": ["KD"]}, "has no name", "{name: KD, method: kd}"),
    ({"row": 1}, "'row' is not known here", "did you mean 'rows'"),
    ({"rows": [{"name": "a", "epoch": 1}]}, "row 'a'", "'epoch'", "did you mean 'epochs'"),
    ({"settings": {"epoch": 1}}, "'epoch' is not a setting of engine.train", "did you mean 'epochs'"),
    ({"settings": [1]}, "settings is [1]", "mapping"),
    ({"settings": {"seed": 1}}, "seed is not a grid's to set"),
    ({"settings": {"lr": "fast"}}, "row 'KD'", "--lr is 'fast'", "number"),
    ({"settings": {"lr": None}}, "lr is None", "one value"),
    ({"rows": [{"name": "a", "published": "93"}]}, "published is '93'", "number"),
    ({"rows": [{"name": "a", "show": "roberta"}]}, "show is 'roberta'", "one of its teachers, bert"),
    ({"rows": [{"name": "a", "each": ["x"]}]}, "each is ['x']", "{target_domain: [a, b]}"),
    ({"rows": [{"name": "a", "each": {"domain": ["x"]}}]}, "'domain'", "not a setting"),
    ({"rows": [{"name": "a", "against": "b"}, {"name": "bb"}]}, "against is 'b'", "did you mean 'bb'"),
    ({"seeds": 0}, "seeds is 0", "at least 1"),
    ({"seeds": True}, "seeds is True"),
    ({"split": "train"}, "split is 'train'", "test or validation"),
    ({"models": {"bert": {"place": "x", "layer": "1"}}}, "models has bert", "{place: DIR"),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda case: str(case[0])[:60])
def test_a_wrong_grid_is_refused(case):
    changes, *parts = case
    message = refused(**changes)
    assert message.startswith("g.yaml") or "against is" in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(("text", "part"), [
    ("rows: [", "is not valid YAML"), ("- 1\n", "holds no grid"), ("", "holds no grid"), ("title: t\n", "needs 'rows'"),
])  # fmt: skip
def test_a_file_that_is_no_grid(tmp_path, text, part):
    (tmp_path / "g.yaml").write_text(text)
    with pytest.raises(UserError, match=part):
        options.parse(["--config", str(tmp_path / "g.yaml")])


# Recipes

RECIPES = {file.stem: file for file in (ROOT / "recipes").glob("*.yaml")}
PUBLISHED = {"table1": (16, "MetaDistil, bert+bert2 -> distilbert", 93.55), "metakd-amazon": (7, "Meta-KD, bert -> tinybert", 89.4),
             "metakd-mnli": (7, "Meta-KD, bert -> tinybert", 80.4)}  # fmt: skip


@pytest.mark.parametrize("name", ["metakd-amazon", "metakd-mnli", "reptile-glue", "table1"])
def test_recipe_at_a_small_size_on_local_models_and_data(name):
    """Every model and every data set has a name that a flag can replace."""
    assert len(RECIPES) == 4
    words, raw = ["--config", str(RECIPES[name])], yaml.safe_load(RECIPES[name].read_text())
    rows = [raw["settings"] | row for row in raw["rows"]]
    models = {
        each.strip() for row in rows for key in ("teachers", "student") for each in row.get(key, "bert").split(",")
    }
    data = {raw["settings"].get("data"), *(v for row in rows for v in row.get("each", {}).get("data", []))} - {None}
    words += [w for m in models - {"bert2"} for w in ("--model", f"{m}=./enc:1,2")]
    words += [w for each in data for w in ("--data", f"{each}=./data")]
    found = options.parse([*words, "--scale", "small"]).grid
    published = {row.title: row.published for row in found.rows if row.published is not None}
    if name in PUBLISHED:
        rows, title, figure = PUBLISHED[name]
        assert len(published) == rows and published[title] == figure
    if name.startswith("metakd"):
        assert {len(row.values) for row in found.rows} == {4 if "amazon" in name else 5}
        reference = {row.title: found.reference(row) for row in found.rows}
        assert reference["Meta-KD, bert -> tinybert"].name == "single-domain teacher"
    for cell in found.cells():
        assert cell.settings["data"] == "./data"
        assert set(cell.settings.get("teachers", "./enc").split(",")) == {"./enc"}
        assert cell.settings.get("student", "./enc") == "./enc"
    assert found.scale == "small" and len(found.seeds) < raw["seeds"]
