"""From the names in a domain column to ids."""

from __future__ import annotations

from collections.abc import Sequence

from engine.data.columns import Rows
from engine.data.read import Table
from engine.errors import UserError

MAX_DOMAINS = 1000
SHOWN = 10


class Domains:
    """The domains of the training data, which are all that there are."""

    def __init__(self, names: Sequence[str], table: Table, column: str):
        """Raises UserError for more than `MAX_DOMAINS` names, which is a column of something else."""
        self.names, self.train = tuple(sorted(set(names))), table.name
        self.ids = {name: i for i, name in enumerate(self.names)}
        if len(self.names) > MAX_DOMAINS:
            raise UserError(
                f"{table.name}: the column {column!r} holds {len(self.names):,} different domains, more than the "
                f"{MAX_DOMAINS:,} allowed; name the right column with --domain-column."
            )

    def convert(self, rows: Rows, table: Table) -> tuple[Rows, int]:
        """`rows` of `table` with ids for names, and how many rows of hub data were left out, their domain being none of
        train's. Raises UserError for such a row of a local file.
        """
        ids = [self.ids.get(name, -1) for name in rows.domains]
        unknown = [i for i, domain in enumerate(ids) if domain < 0]
        if unknown and table.local:
            name = rows.domains[unknown[0]]
            known = ", ".join(self.names[:SHOWN]) + (", ..." if len(self.names) > SHOWN else "")
            raise UserError(
                f"{table.place(rows.numbers[unknown[0]])}: the training data ({self.train}) has no domain "
                f"{name[:37] + '...' if len(name) > 40 else name!r}; its domains are {known}."
            )
        rows.domains = ids
        return (rows.take([i for i, domain in enumerate(ids) if domain >= 0]) if unknown else rows), len(unknown)


def describe(names: Sequence[str], ids: Sequence[int]) -> str:
    """The domains and how many examples each has: books 1,558, dvd 1,560."""
    shown = [f"{name} {ids.count(i):,}" for i, name in enumerate(names[:SHOWN])]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
