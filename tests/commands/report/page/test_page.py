"""The HTML of the page: structure, names, escaping, size and colors."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hostile_texts import HOSTILE, change_texts

import featray.commands.report.page.page as page_module
from featray.commands.report.page.markup import clean
from featray.commands.report.page.model import Column, LabelResult, Leak, Outlier, PageModel, Scans, Score
from featray.commands.report.page.page import MAX_BYTES, Download, render_page
from featray.commands.report.page.parts import write_table

ModelMaker = Callable[..., PageModel]
VOID = {"br", "circle", "image", "input", "line", "meta", "path", "rect", "use"}


class Reader(HTMLParser):
    """Reads a page into lists and checks that each element is closed in order.

    Attributes:
        elements: Tag, attributes and tags around each element.
        texts: Tag around each text, and the text.
    """

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], tuple[str, ...]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), tuple(self._open)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes, _ in self.elements if name == tag]

    def get_text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag not in ("script", "style"))

    def get_payload(self) -> dict[str, object]:
        (start,) = [text for tag, text in self.texts if tag == "script" and text.startswith("{")]
        return dict(json.loads(start))


def read_page(model: PageModel, *, include_images: bool = True) -> Reader:
    return Reader(render_page(model, include_images=include_images).decode())


@pytest.fixture(scope="module")
def reader(make_model: ModelMaker) -> Reader:
    return read_page(make_model())


def test_every_id_is_unique_and_every_reference_to_an_id_exists(reader: Reader) -> None:
    ids = [attributes["id"] for _, attributes, _ in reader.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = {
        word
        for _, attributes, _ in reader.elements
        for key in ("aria-labelledby", "aria-describedby", "for", "list")
        for word in (attributes.get(key) or "").split()
    }
    links = {(attributes.get("href") or "#")[1:] for tag in ("a", "use") for attributes in reader.find(tag)}
    assert (references | links) - {""} <= set(ids)


def test_the_page_links_to_all_its_sections(reader: Reader) -> None:
    sections = [attributes["id"] for attributes in reader.find("section") if "id" in attributes]
    links = [row["href"] for tag, row, around in reader.elements if tag == "a" and "nav" in around]
    assert links == [f"#{section}" for section in sections]
    assert len(links) == 10


def test_every_picture_has_a_role_and_a_name_or_is_hidden(reader: Reader) -> None:
    pictures = reader.find("svg") + reader.find("canvas")
    assert len(pictures) > 20
    for attributes in pictures:
        hidden = attributes.get("aria-hidden") == "true"
        assert hidden or (attributes.get("role") in ("img", "application") and attributes.get("aria-label"))


def test_every_figure_has_a_sentence_on_how_to_read_it_and_its_data(reader: Reader) -> None:
    figures = [attributes["id"] for attributes in reader.find("figure")]
    read = {attributes.get("id") for attributes in reader.find("p") if attributes.get("class") == "read"}
    assert {f"{figure}-read" for figure in figures} <= read
    charts = [tag for tag, attributes, _ in reader.elements if attributes.get("class") in ("dots", "map")]
    tables = [around for tag, _, around in reader.elements if tag == "table" and "details" in around]
    assert len(tables) >= len(charts) > 0


def test_every_control_and_table_has_a_name(reader: Reader) -> None:
    labels = {attributes.get("for") for attributes in reader.find("label")}
    for attributes in reader.find("select") + reader.find("input"):
        assert attributes["id"] in labels
    assert all(attributes.get("aria-label") for attributes in reader.find("table"))


def test_each_chart_has_one_mark_in_the_order_of_the_tab_key(reader: Reader) -> None:
    rows = [attributes for attributes in reader.find("svg") if attributes.get("class") == "row"]
    charts = [attributes for attributes in reader.find("table") if attributes.get("class") == "dots"]
    assert [row["tabindex"] for row in rows].count("0") == len(charts) == 2
    cells = [attributes["tabindex"] for attributes in reader.find("td") if "tabindex" in attributes]
    heat_maps = [row for row in reader.find("table") if (row.get("class") or "").startswith("heat")]
    assert cells.count("0") == len(heat_maps) == 4


def test_a_page_needs_no_network_and_runs_only_its_own_script(make_model: ModelMaker) -> None:
    text = render_page(make_model(), [Download("a b?.json", "all numbers")]).decode()
    addresses = set(re.findall(r"(?:https?:)?//[\w.]+", text)) - {"http://www.w3.org"}
    assert not {address for address in addresses if ":" in address}
    reader = Reader(text)
    for tag, attributes, _ in reader.elements:
        assert "style" not in attributes, tag
        assert not any(key.startswith("on") for key in attributes), tag
        source = attributes.get("src") or attributes.get("href") or "#"
        assert source.startswith(("#", "data:image/png;base64,")) or source == "a%20b%3F.json"
    policy = [row for row in reader.find("meta") if row.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in str(policy[0]["content"])
    assert "unsafe" not in str(policy[0]["content"])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_add_no_element_and_no_attribute(make_model: ModelMaker, text: str) -> None:
    model = make_model(scans=12, slices=12)
    plain, hostile = (read_page(change_texts(model, texts)) for texts in (("x",), (text,)))
    shape = [(tag, sorted(attributes)) for tag, attributes, _ in plain.elements]
    assert [(tag, sorted(attributes)) for tag, attributes, _ in hostile.elements] == shape
    assert hostile.get_text().count(clean(text)) > 100
    assert len(plain.find("circle")) > 20


def test_hostile_scan_ids_are_found_by_the_script_as_they_are(make_model: ModelMaker) -> None:
    ids = tuple(f"{text}{number}" for number, text in enumerate(HOSTILE * 2))
    payload = read_page(make_model(ids=ids)).get_payload()
    replaced = str.maketrans(dict.fromkeys("\ud800\u202e", "\ufffd"))
    assert payload["ids"] == [scan_id.translate(replaced) for scan_id in ids]


def test_a_verdict_and_a_refusal_have_the_same_form(reader: Reader) -> None:
    classes = [attributes.get("class") for attributes in reader.find("div")]
    assert classes.count("verdict") == classes.count("verdict refusal") == 1
    text = reader.get_text()
    assert "No verdict:" in text
    assert "24 scans have this label; about 150 are needed." in text


def test_a_page_without_labels_says_so_and_shows_the_leakage(make_model: ModelMaker) -> None:
    reader = read_page(make_model(labels=False))
    assert "No labels were given." in reader.get_text()
    assert "leakage" in {attributes["id"] for attributes in reader.find("figure")}
    assert "label-matrix" not in {attributes["id"] for attributes in reader.find("figure")}


def test_many_verdicts_are_small_and_without_scores_no_place_is_kept_for_a_chart(
    make_model: ModelMaker,
) -> None:
    refusal = dataclasses.replace(make_model().labels[1], scores=())
    model = dataclasses.replace(make_model(), labels=(refusal,) * 4, leaks=())
    classes = {attributes.get("class") for _, attributes, _ in read_page(model).elements}
    assert "verdicts many" in classes
    assert not {"front", "charts"} & classes
    assert {"verdicts", "front"} <= {row.get("class") for _, row, _ in read_page(make_model()).elements}


def test_a_label_stands_over_its_verdict_unless_the_verdict_begins_with_it(make_model: ModelMaker) -> None:
    label = make_model().labels[1]
    named = dataclasses.replace(label, sentence=f"No verdict for {label.label}: 24 scans.")
    for result, is_there in ((label, True), (named, False)):
        text = render_page(dataclasses.replace(make_model(), labels=(result,))).decode()
        assert ('<p class="label"><bdi>lesion radius</bdi></p>' in text) == is_there


def test_a_long_list_on_a_card_is_folded_away(make_model: ModelMaker) -> None:
    model = dataclasses.replace(make_model(), changes=tuple(f"change {number}" for number in range(9)))
    reader = read_page(model)
    assert "3 more" in reader.get_text()
    around = [around for tag, _, around in reader.elements if tag == "li" and "details" in around]
    assert len(around) == 3


def test_numbers_with_a_unit_are_aligned_as_numbers() -> None:
    table = write_table(("Layer", "Zeros", "State"), [("a", "5.7 %", "active"), ("b", None, "12 of 16")], "x")
    cells = [row.get("class") for tag, row, _ in Reader(table).elements if tag in ("th", "td")]
    assert cells == ["text", None, "text", None, None, "text", None, None, "text"]


def test_an_empty_model_gives_a_page(make_model: ModelMaker) -> None:
    reader = read_page(PageModel("empty", summary="No scans."))
    assert reader.find("figure") == []
    assert "No scans." in reader.get_text()


def test_missing_numbers_are_shown_as_dashes(make_model: ModelMaker) -> None:
    nan = float("nan")
    model = make_model(scans=12, slices=0)
    model = dataclasses.replace(model, leaks=(Leak("conv_1 (mean)", "kernel", nan),))
    label = LabelResult("x", "No verdict.", True, "AUC", 0.5, scores=(Score("conv_1 (mean)", nan, nan, nan),))
    maps = tuple(dataclasses.replace(part, x=np.full(12, np.nan)) for part in model.maps)
    columns = (Column("a", (None,) * 12), Column("b", (nan,) * 12))
    scans = dataclasses.replace(model.scans, columns=columns)
    changed = dataclasses.replace(
        model, labels=(label,), maps=maps, scans=scans, outliers=(Outlier(0, "a", nan, ""),)
    )
    text = render_page(changed).decode()
    assert "–" in text
    assert 'class="dot"' not in text
    assert text.count('class="leak"') == text.count("leakage: <bdi>") == 1
    assert "nan" not in " ".join(re.findall(r'="([^"]*)"', text)).lower().split()


def test_without_images_the_file_holds_no_slice(make_model: ModelMaker) -> None:
    text = render_page(make_model(), include_images=False).decode()
    assert "data:image" not in text
    assert "holds no slices of patients" in text
    assert "<symbol" not in text


def test_with_images_the_page_says_how_many_slices_it_holds_and_holds_each_once(reader: Reader) -> None:
    assert "holds 60 slices of patients" in reader.get_text()
    assert len(reader.find("image")) == 60


@pytest.mark.slow
def test_a_page_with_5000_points_and_300_slices_fits_and_draws_on_canvas(make_model: ModelMaker) -> None:
    page = render_page(make_model(scans=5000, slices=300))
    reader = Reader(page.decode())
    assert len(page) <= MAX_BYTES
    assert len(reader.find("canvas")) == 4
    assert len(reader.find("image")) == 300


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "images", "sentence"),
    [
        (420_000, 60, None),
        (210_000, 0, "The slices were left out"),
        (150_000, 0, "Maps left out because"),
        (10_000, 0, "Everything that lists scans was left out"),
    ],
)
def test_a_page_that_is_too_large_loses_slices_before_numbers_and_says_so(
    make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch, limit: int, images: int, sentence: str | None
) -> None:
    monkeypatch.setattr(page_module, "MAX_BYTES", limit)
    page = render_page(make_model())
    reader = Reader(page.decode())
    assert len(reader.find("image")) == images
    assert "dots" in {attributes.get("class") for attributes in reader.find("table")}
    if sentence:
        assert sentence in reader.get_text()
    else:
        assert "left out" not in reader.get_text()


def test_maps_color_scans_by_each_column_with_at_most_seven_entries(make_model: ModelMaker) -> None:
    names = tuple(f"value {number % 11}" for number in range(60))
    model = dataclasses.replace(
        make_model(), scans=Scans(tuple(map(str, range(60))), (Column("many", names),))
    )
    columns = read_page(model).get_payload()["columns"]
    assert isinstance(columns, list)
    assert [entry[0] for entry in columns[0]["legend"]][-1] == "5 other values (25)"
    assert set(columns[0]["codes"]) == set("0123456")


def parse_themes() -> list[dict[str, str]]:
    """Return the colors of the light and of the dark theme by their names."""
    style = Path(page_module.__file__).with_name("style.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{[^}]*--ink[^}]*\}", style)
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w+)", block)) for block in blocks)
    return [light, light | dark]


def measure_contrast(first: str, second: str) -> float:
    """Return the contrast ratio of two colors as WCAG 2 defines it."""

    def measure_luminance(color: str) -> float:
        channels = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((measure_luminance(first), measure_luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", parse_themes(), ids=["light", "dark"])
def test_texts_and_marks_have_the_contrast_of_wcag_aa(theme: dict[str, str]) -> None:
    for background in ("bg", "card"):
        for text in ("ink", "soft", "accent"):
            assert measure_contrast(theme[text], theme[background]) >= 4.5, (text, background)
        for mark in ("edge", "leak", "hit", "strong-rule", *(f"c{number}" for number in range(7))):
            assert measure_contrast(theme[mark], theme[background]) >= 3, (mark, background)


def parse_cell_colors() -> list[dict[str, str]]:
    """Return the text color of each color class of heat maps, for both themes."""
    style = Path(page_module.__file__).with_name("style.css").read_text(encoding="utf-8")
    rules = re.findall(r"^ *((?:td\.[qd]\d, )+td\.[qd]\d) \{ color: (#\w+); \}", style, re.MULTILINE)
    pairs = [{name[3:]: color for name in names.split(", ")} for names, color in rules]
    light = pairs[0] | pairs[1]
    return [light, light | pairs[2] | pairs[3]]


@pytest.mark.parametrize("number", [0, 1], ids=["light", "dark"])
def test_numbers_on_heat_maps_have_the_contrast_of_wcag_aa(number: int) -> None:
    theme, texts = parse_themes()[number], parse_cell_colors()[number]
    assert len(texts) == 16
    for name, color in texts.items():
        assert measure_contrast(theme[name], color) >= 4.5, (name, color)
