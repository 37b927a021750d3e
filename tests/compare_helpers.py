"""What the tests of comparisons share: small grids."""

from engine.compare.grid import Grid
from engine.compare.grid_file import build

ROWS = [{"name": "KD", "method": "kd", "teachers": "bert", "student": "distilbert"}]


def grid(**changes) -> Grid:
    """A checked grid; `changes` are keys of its file, or scale, flags, places and data of the command line."""
    scale, flags = changes.pop("scale", "full"), changes.pop("flags", None)
    given = {key: changes.pop(key) for key in ("places", "data") if key in changes}
    return build({"title": "t", "rows": ROWS} | changes, "g.yaml", scale, flags, **given)
