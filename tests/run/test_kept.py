"""What runs keep for later ones is found by a program of the same numbers alone."""

from run_helpers import sentences, succeed, table

from engine.compare.grid import Cell
from engine.data import kept

KINDS = {
    "tokens": 5,
    "teachers": 1,
    "states": 1,
    "answers": 1,
}  # folders of the cache, and how many entries the run leaves


def test_other_numbers_find_nothing_that_was_kept(tmp_path, monkeypatch):
    """Tokens and words, prepared teachers, mean states and answers all lie under names that change with NUMBERS; so does a
    comparison's finished run."""
    rows = [("ab"[i % 2], text, label) for i, (text, label) in enumerate(sentences(110))]
    data = table(tmp_path / "d.tsv", rows, "kind\tsentence\tlabel")
    names, key, cache = [], kept.key, tmp_path / "cache"

    def recorded(**settings):
        names.append(key(**settings))
        monkeypatch.setattr(kept, "NUMBERS", kept.NUMBERS + 1)
        assert key(**settings) != names[-1]
        monkeypatch.setattr(kept, "NUMBERS", kept.NUMBERS - 1)
        return names[-1]

    monkeypatch.setattr(kept, "key", recorded)
    succeed(data, tmp_path / "run", method="metakd", domain_column="kind", cache_teacher_logits=True, noise_student=0.1,
            max_steps=1, feature_epochs=1, train_size=32, cache_dir=cache)  # fmt: skip
    assert {kind: len(list((cache / kind).iterdir())) for kind in KINDS} == KINDS
    assert {file.stem for kind in KINDS for file in (cache / kind).iterdir()} <= set(names)
    assert Cell(0, None, 0, "row", {"seed": 0}).digest == names[-1][:10]
