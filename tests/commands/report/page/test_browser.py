"""The page in a real browser: clicks, keys, narrow screens, print, and no scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from browser import (
    COLOR_RULES,
    LAPTOP,
    PHONE,
    Visits,
    find_accessibility_faults,
    read_axe,
    require_chromium,
    run_chromium,
)
from hostile_texts import HOSTILE, change_texts

from featray.commands.report.page.files import PAGE_NAME, make_files
from featray.commands.report.page.model import PageModel
from featray.commands.report.page.page import MAX_BYTES

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

ModelMaker = Callable[..., PageModel]
pytestmark = pytest.mark.slow
CHROMIUM = require_chromium()
PAGES = ("usual", "no-labels", "large", "hostile")
SCANS = 12
SCAN = 3
SCAN_ID = "site-0/patient-0003/ct.nii.gz"
LOOK_AT_FOCUS = """() => {
  const stop = document.activeElement;
  const box = stop.getBoundingClientRect();
  const isOnScreen = box.bottom > 0 && box.top < innerHeight;
  return [window.stops.indexOf(stop), isOnScreen && getComputedStyle(stop).outlineStyle === "solid"];
}"""
"""Place of the element with the focus among `window.stops`, and whether the reader sees it."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Run one browser for all tests of this file."""
    with run_chromium(CHROMIUM) as running:
        yield running


@pytest.fixture(scope="module")
def pages(browser: Browser, make_model: ModelMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a report in the folder of each of PAGES."""
    root = tmp_path_factory.mktemp("pages")
    models = {
        "usual": make_model(scans=SCANS, slices=SCANS),
        "no-labels": make_model(labels=False, slices=0),
        "large": make_model(scans=2100, slices=20),
        "hostile": change_texts(make_model(scans=20, slices=12), HOSTILE),
    }
    for name in PAGES:
        folder = root / name
        folder.mkdir()
        for file, content in make_files(models[name]).items():
            (folder / file).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def tabs(browser: Browser) -> Visits:
    """Return the tabs of the browser, which the tests of this file share."""
    return Visits(browser)


@pytest.fixture
def visits(tabs: Visits) -> Iterator[Visits]:
    """Let the test open pages; then require that they logged and requested nothing and showed no dialog."""
    tabs.problems.clear()
    yield tabs
    assert tabs.problems == []


@pytest.fixture
def usual(visits: Visits, pages: Path) -> Page:
    """Return the usual page on a laptop."""
    return visits.open(pages / "usual" / PAGE_NAME)


def read_payload(page: Page) -> dict[str, Any]:
    return dict(json.loads(page.locator("#data").text_content() or ""))


def search(page: Page, text: str) -> str:
    """Search for a scan; return the answer of the page."""
    page.get_by_label("Find a scan").fill(text)
    page.locator("#found:not(:empty)").wait_for()
    return page.locator("#found").inner_text()


def get_focus(page: Page, attribute: str) -> str:
    """Return a property of the element that has the focus."""
    return str(page.evaluate(f"document.activeElement.{attribute}"))


def find_visible(locator: Locator) -> list[Locator]:
    """Return the elements that have a place on the page, in its order."""
    is_visible = locator.evaluate_all("all => all.map((part) => part.getClientRects().length > 0)")
    return [locator.nth(place) for place, shown in enumerate(is_visible) if shown]


def open_tables(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")


def click_scan(page: Page, number: int, scan: int) -> None:
    """Click the point of a scan on a map."""
    chart = page.locator(".map").nth(number)
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    assert box is not None
    x, y = read_payload(page)["maps"][number][2 * scan : 2 * scan + 2]
    page.mouse.click(box["x"] + x * box["width"] / 400, box["y"] + y * box["height"] / 400)


@pytest.mark.parametrize("name", ["usual", "no-labels", "hostile"])
@pytest.mark.parametrize("width", [PHONE, LAPTOP])
def test_a_page_opens_from_a_file_without_errors_and_never_scrolls_sideways(
    visits: Visits, pages: Path, name: str, width: int
) -> None:
    file = pages / name / PAGE_NAME
    assert file.stat().st_size <= MAX_BYTES
    page = visits.open(file, width)
    open_tables(page)
    page.evaluate("scrollTo(500, 0)")
    assert page.evaluate("[scrollX, document.documentElement.scrollWidth, innerWidth]") == [0, width, width]


@pytest.mark.parametrize("width", [PHONE, LAPTOP])
def test_axe_finds_no_fault_in_light_and_dark(visits: Visits, pages: Path, width: int) -> None:
    axe = read_axe()
    page = visits.open(pages / "usual" / PAGE_NAME, width)
    open_tables(page)
    search(page, SCAN_ID)
    page.evaluate(axe)
    assert find_accessibility_faults(page) == []
    page.emulate_media(color_scheme="dark")
    assert find_accessibility_faults(page, COLOR_RULES) == []


def test_the_page_has_the_colors_that_the_reader_prefers(usual: Page) -> None:
    read = "getComputedStyle(document.body).backgroundColor"
    light = usual.evaluate(read)
    usual.emulate_media(color_scheme="dark")
    assert [light, usual.evaluate(read)] == ["rgb(252, 252, 250)", "rgb(20, 23, 26)"]


def test_the_search_highlights_a_scan_in_every_place(usual: Page) -> None:
    answer = search(usual, "PATIENT-0003")
    hits = find_visible(usual.locator(".hit"))
    assert answer == f"{SCAN_ID}, highlighted in {len(hits)} places"
    assert {hit.get_attribute("data-s") for hit in hits} == {str(SCAN)}
    for part in ("#extremes", "#map-0", "#map-3", "#near-query", "#outliers", "#sheet"):
        assert usual.locator(f"{part} .hit").count() == 1, part
    tile, point = usual.locator("#sheet .hit"), usual.locator("#map-0 .hit")
    assert tile.evaluate("element => getComputedStyle(element).outlineColor") == "rgb(176, 0, 110)"
    assert point.evaluate("element => getComputedStyle(element).stroke") == "rgb(176, 0, 110)"


def test_next_place_shows_each_highlighted_place_in_turn(usual: Page) -> None:
    search(usual, SCAN_ID)
    places = find_visible(usual.locator(".hit"))
    for turn in [*range(len(places)), 0]:
        usual.get_by_role("button", name="Next place").click()
        assert usual.locator("#found").inner_text() == f"Place {turn + 1} of {len(places)}"
        box = places[turn].bounding_box()
        assert box is not None
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 768


def test_enter_in_the_search_box_shows_the_first_place(usual: Page) -> None:
    search(usual, SCAN_ID)
    usual.get_by_label("Find a scan").press("Enter")
    assert usual.locator("#found").inner_text().startswith("Place 1 of ")


def test_a_text_that_no_scan_has_is_said_not_to_be_found(usual: Page) -> None:
    assert search(usual, "patient-9999") == "No scan has this id."
    assert usual.get_by_role("button", name="Next place").is_disabled()
    usual.get_by_label("Find a scan").fill("")
    usual.locator("#found:empty").wait_for(state="attached")
    assert usual.locator(".hit").count() == 0


def test_the_links_lead_to_the_sections(usual: Page) -> None:
    usual.get_by_role("link", name="Agreement of layers").click()
    box = usual.locator("#agreement").bounding_box()
    assert box is not None
    assert 0 < box["y"] < 100


def test_arrow_keys_move_between_the_rows_of_a_dot_chart(usual: Page) -> None:
    rows = usual.locator("#chart-0 svg.row")
    names = [row.get_attribute("aria-label") for row in rows.all()]
    readout = usual.locator("#chart-0 .readout")
    rows.first.focus()
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", -1), ("Home", 0)):
        usual.keyboard.press(key)
        assert get_focus(usual, "ariaLabel") == names[place], key
        assert readout.inner_text() == names[place], key


def test_a_click_on_a_row_of_a_dot_chart_shows_its_numbers(usual: Page) -> None:
    row = usual.locator("#chart-0 svg.row").nth(5)
    row.click()
    assert get_focus(usual, "ariaLabel") == row.get_attribute("aria-label")
    text = usual.locator("#chart-0 .readout").inner_text()
    assert text.startswith("conv_3 (grid): 0.86 (0.78 to 0.92), 16 kB, chosen; leakage: kernel AUC ")


def test_arrow_keys_move_between_the_cells_of_a_heat_map(usual: Page) -> None:
    table = usual.locator("#label-matrix table")
    cells = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    table.locator("td[tabindex]").first.focus()
    steps = (
        ("ArrowRight", 0, 1),
        ("ArrowDown", 1, 1),
        ("ArrowLeft", 1, 0),
        ("ArrowUp", 0, 0),
        ("End", 0, 1),
        ("Home", 0, 0),
    )
    for key, row, column in steps:
        usual.keyboard.press(key)
        focus = usual.evaluate(
            "[document.activeElement.parentElement.rowIndex - 1, document.activeElement.cellIndex - 1]"
        )
        assert focus == [row, column], key
        assert get_focus(usual, "textContent") == cells[row][column]


@pytest.mark.parametrize("name", ["usual", "large"])
def test_arrow_keys_move_between_the_scans_of_a_map(visits: Visits, pages: Path, name: str) -> None:
    page = visits.open(pages / name / PAGE_NAME)
    payload = read_payload(page)
    xy = payload["maps"][0]
    order = sorted(range(len(payload["ids"])), key=lambda scan: xy[2 * scan])
    chart, readout = page.locator(".map").first, page.locator("#map-0 .readout")
    chart.focus()
    for key, scan in (
        ("Home", order[0]),
        ("ArrowRight", order[1]),
        ("End", order[-1]),
        ("ArrowLeft", order[-2]),
    ):
        page.keyboard.press(key)
        assert readout.inner_text().startswith(payload["ids"][scan] + " · "), key
    page.keyboard.press("Enter")
    assert page.locator("#found").inner_text().startswith(payload["ids"][order[-2]] + ", highlighted in")
    page.keyboard.press("Escape")
    assert readout.inner_text() == ""


@pytest.mark.parametrize(("name", "width"), [("usual", PHONE), ("usual", LAPTOP), ("large", LAPTOP)])
def test_a_click_on_a_point_highlights_its_scan(visits: Visits, pages: Path, name: str, width: int) -> None:
    page = visits.open(pages / name / PAGE_NAME, width)
    click_scan(page, 1, SCAN)
    assert page.locator("#found").inner_text().startswith(f"{SCAN_ID}, highlighted in")
    assert page.locator("#map-1 .readout").inner_text().startswith(f"{SCAN_ID} · contrast ")


def test_a_map_of_many_scans_draws_a_found_scan_in_the_color_of_the_highlight(
    visits: Visits, pages: Path
) -> None:
    page = visits.open(pages / "large" / PAGE_NAME)
    count = """() => {
      const canvas = document.querySelector("canvas");
      const copy = new OffscreenCanvas(canvas.width, canvas.height);
      const pen = copy.getContext("2d", { willReadFrequently: true });
      pen.drawImage(canvas, 0, 0);
      const pixels = pen.getImageData(0, 0, canvas.width, canvas.height).data;
      const isHit = (at) => pixels[at] === 176 && pixels[at + 1] === 0 && pixels[at + 2] === 110;
      return pixels.reduce((sum, _, at) => sum + (at % 4 === 0 && isHit(at)), 0);
    }"""
    assert page.evaluate(count) == 0
    search(page, SCAN_ID)
    assert page.evaluate(count) > 20


def test_a_click_on_a_slice_highlights_its_scan(usual: Page) -> None:
    usual.locator(f'#sheet [data-s="{SCAN}"]').click()
    assert usual.locator("#found").inner_text().startswith(f"{SCAN_ID}, highlighted in")


def test_the_label_select_shows_the_chart_of_the_label(usual: Page) -> None:
    headings = usual.locator(".charts h2")
    assert [heading.inner_text() for heading in find_visible(headings)] == ["AUC for contrast"]
    usual.get_by_label("Label", exact=True).select_option(label="lesion radius")
    assert [heading.inner_text() for heading in find_visible(headings)] == ["R² for lesion radius"]


def test_the_color_select_changes_all_maps_and_their_legend(usual: Page) -> None:
    column = read_payload(usual)["columns"][1]
    usual.get_by_label("Color by").select_option(label="kernel")
    texts = usual.locator("#legend li").all_inner_texts()
    assert texts == [entry[0] for entry in column["legend"]]
    for number in range(4):
        shape, name = column["legend"][int(column["codes"][SCAN])][1:]
        point = usual.locator(f'#map-{number} use[data-s="{SCAN}"]')
        assert (point.get_attribute("href"), point.get_attribute("class")) == (f"#m{shape}", name)


def test_the_selects_of_the_neighbors_choose_the_scan_and_the_layers(
    usual: Page, make_model: ModelMaker
) -> None:
    model = make_model(scans=SCANS, slices=SCANS)
    usual.get_by_label("Scan", exact=True).select_option(label=model.scans.ids[7])
    usual.get_by_label("Layer", exact=True).first.select_option(label="conv_1 (mean)")
    assert usual.locator("#near-query .id").inner_text() == model.scans.ids[7]
    assert usual.locator("#near-left-name").inner_text() == "Nearest in conv_1 (mean), cosine distance"
    for side, layer in (("left", 2), ("right", 1)):
        expected = [model.scans.ids[scan] for scan in model.neighbors[layer].neighbors[7]]
        assert usual.locator(f"#near-{side} .id").all_inner_texts() == expected


def test_a_table_folds_out_with_the_mouse_and_with_the_keyboard(usual: Page) -> None:
    summary, table = usual.locator("#chart-0 summary"), usual.locator("#chart-0 details table")
    assert not table.is_visible()
    for act in (summary.click, lambda: summary.press("Enter")):
        act()
        table.wait_for()
        summary.press("Space")
        table.wait_for(state="hidden")


def test_the_table_of_a_map_gets_all_its_rows_when_it_folds_out(visits: Visits, pages: Path) -> None:
    page = visits.open(pages / "large" / PAGE_NAME)
    rows = page.locator("#map-0 tbody tr")
    assert rows.count() == 20
    page.locator("#map-0 summary").click()
    rows.nth(2099).wait_for()
    assert rows.count() == 2100
    assert page.locator("#map-0 .note").count() == 0


def test_the_tab_key_reaches_everything_in_order_and_shows_where_it_is(usual: Page) -> None:
    search(usual, SCAN_ID)
    open_tables(usual)
    count = usual.evaluate("""() => {
      const all = document.querySelectorAll("a[href], input, select, button, summary, [tabindex]");
      window.stops = [...all].filter((stop) => stop.getClientRects().length && stop.tabIndex >= 0);
      return window.stops.length;
    }""")
    assert count > 30
    usual.get_by_label("Find a scan").press("Shift+Tab")
    for place in range(count):
        assert usual.evaluate(LOOK_AT_FOCUS) == [place, True], get_focus(usual, "outerHTML")[:300]
        usual.keyboard.press("Tab")


def test_the_page_prints_all_charts_all_words_and_the_tables_that_are_folded_out(usual: Page) -> None:
    usual.locator("#map-0 summary").click()
    pdf = usual.pdf(format="A4")
    assert pdf.startswith(b"%PDF-")
    assert 4 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 10
    usual.emulate_media(media="print")
    texts = (
        "For contrast take conv_3 (grid):",
        "AUC for contrast",
        "R² for lesion radius",
        "The middle slice of",
    )
    for text in (*texts, "Logistic regression, 5 × 4 folds by patient."):
        assert usual.get_by_text(text).first.is_visible(), text
    shown = usual.locator("body").inner_text()
    assert shown.count("Positions as a table") == 1
    for text in ("Numbers as a table", "Find a scan", "arrow keys"):
        assert text not in shown, text


def test_no_part_of_a_printed_page_is_cut_off(usual: Page) -> None:
    open_tables(usual)
    usual.emulate_media(media="print")
    usual.set_viewport_size({"width": 718, "height": 1046})  # A4 without margins, in CSS pixels
    assert usual.evaluate("document.documentElement.scrollWidth") == 718
    boxes = usual.locator(".scroll").evaluate_all(
        "all => all.map((box) => [box.scrollHeight - box.clientHeight, box.scrollWidth - box.clientWidth])"
    )
    assert len(boxes) > 8
    assert all(box == [0, 0] for box in boxes)


def test_without_scripts_the_page_shows_verdicts_charts_and_maps(visits: Visits, pages: Path) -> None:
    page = visits.open(pages / "usual" / PAGE_NAME, runs_scripts=False)
    for text in ("For contrast take conv_3 (grid):", "AUC for contrast", "R² for lesion radius"):
        assert page.get_by_text(text).first.is_visible(), text
    for chart, marks in (("#chart-0 .row .dot", 12), ("#chart-1 .row .dot", 12), ("#map-0 use", SCANS)):
        assert len(find_visible(page.locator(chart))) == marks
    assert find_visible(page.locator("select, input, button, .scripted")) == []
    page.locator("#chart-1 summary").click()
    assert page.locator("#chart-1 details table").is_visible()


def test_hostile_texts_run_no_script_and_stay_texts(visits: Visits, pages: Path) -> None:
    page = visits.open(pages / "hostile" / PAGE_NAME)
    scan_id = read_payload(page)["ids"][0]
    assert scan_id.endswith("site-0/patient-0000/ct.nii.gz")
    open_tables(page)
    assert search(page, scan_id).startswith(scan_id)
    for select in ("#color", "#label", "#query", "#layer-left"):
        page.locator(select).select_option(index=1)
    click_scan(page, 0, 0)
    assert page.evaluate("[document.images.length, document.scripts.length]") == [0, 2]
    assert page.locator("#found").inner_text().startswith(scan_id)
