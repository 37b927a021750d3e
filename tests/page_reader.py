"""Pages taken apart, for tests of reports."""

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert(1)</script>\"'&amp;</style>--><svg onload=x>$\\frac{$]]>\x00\x1b[31m\ud800"


class Reader(HTMLParser):
    """The elements and texts of a page. A tag that is not closed, or not open, is an error, and so is an id given twice."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.ids = [attributes["id"] for _, attributes, _ in self.elements if "id" in attributes]
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append((tag, len(self.texts)))

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), [name for name, _ in self.open]))
        assert len(dict(attrs)) == len(attrs), (tag, attrs)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1][0] if self.open else "", data.strip()))

    def of(self, tag: str) -> list[dict]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def words(self) -> str:
        return " ".join(text for name, text in self.texts if name != "style")

    def labels(self) -> list[str]:
        """What the drawings say to those who cannot see them."""
        return [attributes["aria-label"] for attributes in self.of("svg") if "aria-label" in attributes]

    def tags(self) -> set[str]:
        return {tag for tag, _, _ in self.elements}


def table(page: str, name: str) -> list[list[str]]:
    """The cells of the table that has the caption of this id."""
    (found,) = re.findall(rf'<caption id="{name}".*?</table>', page, flags=re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", found, flags=re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, flags=re.DOTALL) for row in rows]
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in row] for row in cells]
