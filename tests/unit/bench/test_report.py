"""The report: one page that needs nothing else, plots, Markdown; looked at in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gradq.bench.report import write_report
from gradq.cli.app import run
from gradq.errors import BenchError, ConfigError

# recorded by benchmarks/sweep.py --tiny and gradq bench collectives, on two shaped links
RECORDS = Path(__file__).parents[2] / "fixtures" / "bench"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    return write_report(RECORDS, out)


class Tags(HTMLParser):
    """Checks that tags close and collects what they refer to."""

    VOID = frozenset({"meta", "path", "use", "image", "rect", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.references, self.cells = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_startendtag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("src", "href") and value]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_needs_nothing_else(report):
    text = report.read_text()
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(reference.startswith("#") for reference in tags.references)
    assert "<script" not in text
    assert not re.search(r"url\((?!#)", text), "only clip paths of its own"
    assert "prefers-color-scheme: dark" in text
    assert "var(--ink)" in text, "plots follow the page's colours"
    assert "#1b1c1d" not in text.partition("</style>")[2]


def test_what_the_page_and_the_markdown_say(report):
    text, markdown = report.read_text(), report.with_name("report.md").read_text()
    tags = Tags()
    tags.feed(text)
    for part in ("plain DDP", "compute only", "int4, free codec", "100 Mbit/s", "1 Gbit/s", "busbw GB/s"):
        assert part in tags.cells
        assert part in markdown
    assert text.count("class='verdict'") == 2
    assert "measured with raw TCP" in text
    assert "pays below" in markdown
    for name in re.findall(r"\((\S+\.png)\)", markdown):
        picture = report.with_name(name)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 5000


def test_names_cannot_break_the_page(tmp_path):
    table = (RECORDS / "collectives.json").read_text()
    (tmp_path / "collectives.json").write_text(table.replace('"int8"', '"<b>&int8"'))
    text = write_report(tmp_path).read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;int8" in text


def test_the_command_line(tmp_path, capsys):
    (tmp_path / "records").mkdir()
    shutil.copy(RECORDS / "collectives.json", tmp_path / "records")
    assert run(["report", str(tmp_path / "records"), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "report.html") in capsys.readouterr().out
    assert run(["report", str(tmp_path / "nothing")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_nothing_to_report(tmp_path):
    (tmp_path / "training.jsonl").write_text('{"record": "step"}\n')
    with pytest.raises(ConfigError, match="has no records with samples"):
        write_report(tmp_path)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot write the report"):
        write_report(RECORDS, tmp_path / "file" / "out")


def test_no_matplotlib(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'gradq\[plot\]'"):
        write_report(RECORDS, tmp_path)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to look at the page with")
@pytest.mark.parametrize(
    ("width", "dark"),
    [
        (420, True),
        (1200, False),
        pytest.param(420, False, marks=pytest.mark.slow),
        pytest.param(1200, True, marks=pytest.mark.slow),
    ],
)
def test_the_page_in_a_browser(report, tmp_path, width, dark):
    matplotlib_image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "page.png"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        f"--user-data-dir={tmp_path}/profile",
        f"--window-size={width},1600",
        f"--screenshot={picture}",
    ]
    # 0 is dark, 1 is light
    command += [f"--blink-settings=preferredColorScheme={0 if dark else 1}", report.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=90)
    pixels = matplotlib_image.imread(picture)[..., :3]
    assert pixels.shape[:2] == (1600, width)
    ground = pixels[5, 5]
    assert (ground.mean() < 0.2) if dark else (ground.mean() > 0.9)
    assert pixels.std() > 0.05, "the page is empty"
    edge = pixels[:, -8:]
    assert abs(edge - ground).max() < 0.05, "something runs over the right edge"
