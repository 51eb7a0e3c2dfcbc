"""A reader of pages of photos."""

from html.parser import HTMLParser


class Cells(HTMLParser):
    """The cells of the tables, and the names of the photos that are shown."""

    def __init__(self, source):
        super().__init__()
        self.cells, self.names, self.place = [], [], None
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        if tag == "td":
            self.place = self.cells
            self.cells.append("")
        elif tag == "figcaption":
            self.place = self.names
            self.names.append("")

    def handle_endtag(self, tag):
        if tag in ("td", "figcaption"):
            self.place = None

    def handle_data(self, data):
        if self.place:
            self.place[-1] += data


def outcomes(source):
    """Name of a file -> what becomes of it."""
    cells = Cells(source).cells
    return {name.partition("/")[2]: text for name, text in zip(*[iter(cells)] * 2, strict=True)}
