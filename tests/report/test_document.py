"""Reports as HTML and Markdown contain no markup other than their own."""

from __future__ import annotations

import json
import os
import threading
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from markdown_it import MarkdownIt

from persyn.errors import UsageError
from persyn.report import document, figures
from persyn.report.drawing import Picture
from persyn.report.facts import Groups, Report
from persyn.runs import run_file
from tests.report.conftest import HOSTILE

#: In the order of the page.
HEADINGS = [
    "In short",
    "Configuration and stages",
    "Teachers",
    "Planned and spent",
    "Figures",
    "Does routing pay?",
    "Strategies",
    "Failures",
    "Examples",
    "Missing parts",
    "Provenance",
]


class Page(HTMLParser):
    """The parts of a parsed page that matter here."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.headings: list[tuple[str, str]] = []
        self.blocks: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name in ("href", "src")}
        self._open.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((tag, ""))
        if tag == "pre":
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "pre" in self._open:
            self.blocks[-1] += data
        elif self.headings and self._open and self._open[-1] == self.headings[-1][0]:
            tag, said = self.headings.pop()
            self.headings.append((tag, said + data))


def seen(text: str) -> str:
    """The text as shown, with control characters replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def test_a_page_needs_nothing_and_runs_nothing(html: str) -> None:
    page = Page(html)

    assert not page.tags & {"script", "img", "iframe", "link", "object", "embed", "form", "b", "base"}
    assert not {name for name in page.attributes if name.startswith("on")}
    assert {link for link in page.links if not link.startswith("#")} == set()
    assert [said for tag, said in page.headings if tag == "h2"] == HEADINGS
    assert [said for tag, said in page.headings if tag == "h1"] == ["Run run"]
    # Word for word.
    assert f"0: {HOSTILE[0]}" in page.blocks
    assert seen(f"4: {HOSTILE[4]}") in page.blocks
    assert f"{HOSTILE[0]} by 0" in page.blocks


def test_an_example_has_its_reasoning_folded_and_word_for_word(html: str, report: Report) -> None:
    """Only the first teacher reasons: 4 tokens, of 10 in each of its six responses that reason, and 10 in another."""
    page = Page(html)
    assert f"{HOSTILE[0]} by 0, or not" in page.blocks
    assert "<details><summary>reasoning</summary>" in html
    assert '<td class="n">4</td><td class="n">34.3%</td>' in html  # 24 of 70
    assert '<td class="n">-</td><td class="n">-</td>' in html
    text = document.markdown(report, [])
    assert f"Reasoning:\n\n```text\n{HOSTILE[0]} by 0, or not\n```\n\nAnswer:\n" in text
    assert "| 4 | 34.3% |" in text


def test_headings_never_leave_out_a_level(html: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(html).headings]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_means_have_the_same_digits_behind_the_point_and_a_real_minus(html: str) -> None:
    # Right on four of six prompts; -2 nats per token. The other teacher: two of six, -1.
    for quality, learnability in (("0.667", "\u22122.000"), ("0.333", "\u22121.000")):
        assert f'<td class="n">{quality}</td><td class="n">{learnability}</td>' in html


def test_a_folder_of_weights_is_told_by_its_name_and_in_full_where_it_comes_from(report: Report) -> None:
    assert report.router is not None
    local = msgspec.structs.replace(report.router, backbone="/srv/models/small")
    begin, _, origin = document.html(msgspec.structs.replace(report, router=local), []).partition('<h2 id="provenance')
    assert "<code>small</code>" in begin
    assert "/srv/models" not in begin
    assert "<code>/srv/models/small</code>" in origin


def test_markdown_is_nothing_but_its_own(report: Report, pictures: list[Picture]) -> None:
    text = document.markdown(report, pictures)
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)

    inline = [child for token in tokens for child in token.children or ()]
    assert {child.type for child in inline} <= {"text", "text_special", "softbreak", "code_inline"}
    assert [token.content for token in tokens if token.type == "html_block"] == ["<!-- PerSyn report -->\n"]
    assert {token.type for token in tokens if token.type in ("blockquote_open", "ordered_list_open", "hr")} == set()
    headings = [(token.tag, after.content) for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert [said for tag, said in headings if tag == "h1"] == ["Run run"]
    assert [said for tag, said in headings if tag == "h2"] == HEADINGS[1:]
    fences = [token.content for token in tokens if token.type == "fence"]
    assert f"0: {HOSTILE[0]}\n" in fences
    assert f"{HOSTILE[5]}\n" in fences  # three and four backticks do not end the block
    shown = ["".join(child.content for child in token.children or ()) for token in tokens]
    assert shown.count(" ".join(HOSTILE[6].split())) == 2  # a licence in one cell
    # Each row is one line with as many cells as the header.
    types = [token.type for token in tokens]
    assert types.count("table_open") == 8
    for place in [place for place, type_ in enumerate(types) if type_ == "table_open"]:
        rows = " ".join(types[place : types.index("table_close", place)]).split("tr_open")[1:]
        assert len({row.count("td_open") + row.count("th_open") for row in rows}) == 1
    cells = [token.type for token in tokens if token.type in ("tr_open", "th_open", "td_open", "table_open")]
    for table in " ".join(cells).split("table_open")[1:]:
        assert (
            len({row.count("t") // 1 for row in table.replace("td_", "t").replace("th_", "t").split("tr_open")[1:]})
            == 1
        )


def test_markdown_shows_figures_from_their_folder(report: Report, pictures: list[Picture]) -> None:
    text = document.markdown(report, pictures, folder="my figures")
    assert "![Prompts by teacher](my%20figures/teacher-shares.svg)" in text


@pytest.mark.parametrize("name", ["- item", "-", "1) one", ") one", "1. one", "+ item", "# head", "---", "====", "> a"])
def test_a_line_of_markdown_that_begins_with_a_foreign_name_is_a_line(report: Report, name: str) -> None:
    groups = Groups("topic", [name, "other"], ["a", "b"], [[3, 1], [1, 3]])

    text = document.markdown(report, [figures.group_shares(groups)])

    tokens = MarkdownIt("commonmark").parse(text)
    shown = ["".join(child.content for child in token.children or ()) for token in tokens]
    assert f"{name} mostly to a (75%); other mostly to b (75%)." in shown


def test_spaces_and_line_ends_of_other_scripts_and_systems_are_shown_as_they_are(report: Report) -> None:
    changed = msgspec.structs.replace(report, absent={"x": "Tokyo\u3000Tower, 5\xa0%\r\nand on"})
    assert "Tokyo\u3000Tower, 5\xa0%\r\nand on" in document.html(changed, [])
    assert "Tokyo Tower, 5 % and on" in document.markdown(changed, [])


def test_control_characters_are_seen_not_obeyed(report: Report) -> None:
    changed = msgspec.structs.replace(report, absent={"x": HOSTILE[9]})
    for text in (document.html(changed, []), document.markdown(changed, [])):
        assert not set(text) & {"\x1b", "\x07", "\u202e", "\u2066", "\u2028"}
        assert "\ufffd[31mred" in text.replace("\\", "")


def test_the_configuration_in_a_report_starts_the_same_run(report: Report, tmp_path: Path) -> None:
    blocks = [block for block in Page(document.html(report, [])).blocks if block.startswith("{\n")]
    file = tmp_path / "run.json"
    file.write_text(blocks[0])

    frozen = json.loads(blocks[0])
    again = run_file.read(file)
    # The prompts' file is found next to the run file.
    frozen["prompts"]["file"] = [str(tmp_path / frozen["prompts"]["file"])]
    assert again.frozen() == frozen


def test_hits_are_counted_on_the_prompts_that_have_a_best_teacher(report: Report) -> None:
    """On one hold-out prompt fewer, as if its responses had equal rewards."""
    assert report.hits is not None
    changed = msgspec.structs.replace(report, hits=msgspec.structs.replace(report.hits, n_prompts=3))

    said = " ".join(document.headlines(changed))

    assert "On 4 hold-out prompts the router's choice has a mean reward of 0.550" in said
    assert "Of the 3 prompts whose responses differ in reward, it picks a best teacher for 75%" in said


def test_a_report_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        document.write(tmp_path / "report.html", "PerSyn report \ud800")

    assert list(tmp_path.iterdir()) == []


def test_a_report_that_several_write_at_once_is_whole_at_every_moment(tmp_path: Path) -> None:
    path, is_over = tmp_path / "report.html", threading.Event()
    texts = {f"<!-- PerSyn report -->{letter * 300_000}" for letter in "abc"}
    document.write(path, next(iter(texts)))

    def write(text: str) -> None:
        while not is_over.is_set():
            document.write(path, text)

    writers = [threading.Thread(target=write, args=(text,)) for text in texts]
    for writer in writers:
        writer.start()
    seen = {path.read_text() for _ in range(200)}
    is_over.set()
    for writer in writers:
        writer.join()
    assert seen <= texts
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]


def test_a_pipe_is_no_report(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(UsageError, match="is not a PerSyn report"):
        document.write(tmp_path / "pipe", "")


def test_only_a_report_is_overwritten(report: Report, tmp_path: Path) -> None:
    mine, other = tmp_path / "report.html", tmp_path / "notes.html"
    document.write(mine, document.html(report, []))
    document.write(mine, document.markdown(report, []))
    document.write(mine, document.html(report, []))
    other.write_text("<!doctype html>\n<p>mine</p>")

    with pytest.raises(UsageError, match="is not a PerSyn report"):
        document.write(other, document.html(report, []))
    with pytest.raises(UsageError, match="is a folder"):
        document.write(tmp_path, "")
    with pytest.raises(UsageError, match="there is no folder"):
        document.write(tmp_path / "nowhere" / "report.html", "")
    assert other.read_text().endswith("<p>mine</p>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.html", "report.html"]


def test_figures_are_files_in_a_folder_of_their_own(pictures: list[Picture], tmp_path: Path) -> None:
    folder = tmp_path / "figures"
    document.write_figures(folder, pictures[:2])
    document.write_figures(folder, pictures[:1])

    assert sorted(path.name for path in folder.iterdir()) == ["teacher-shares.png", "teacher-shares.svg"]


@pytest.mark.parametrize("name", ["notes.txt", "holiday.png"])
def test_a_folder_with_anything_else_in_it_is_not_replaced(pictures: list[Picture], tmp_path: Path, name: str) -> None:
    document.write_figures(tmp_path / "figures", pictures[:1])
    (tmp_path / "figures" / name).write_text("mine")

    with pytest.raises(UsageError, match=f"{name}.*not a figure of a report"):
        document.write_figures(tmp_path / "figures", pictures[:1])

    assert (tmp_path / "figures" / name).read_text() == "mine"
