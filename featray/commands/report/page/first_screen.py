"""Write the first screen: verdicts, chart of all candidates, cards, extremes of the best unit."""

from __future__ import annotations

from featray.commands.report.page.charts import DotChart, DotRow, draw_dot_chart, draw_dot_key
from featray.commands.report.page.images import draw_tile
from featray.commands.report.page.markup import Child, Markup, element, isolate, join, mark_code
from featray.commands.report.page.model import Candidate, Cell, Extremes, LabelResult, Leak, PageModel, Score
from featray.commands.report.page.numbers import (
    drop_nonfinite,
    format_bytes,
    format_cell,
    format_gb,
    format_number,
)
from featray.commands.report.page.parts import (
    write_advice,
    write_details,
    write_figure,
    write_numbers,
    write_select,
    write_table,
)

_FEW_VERDICTS = 3
"""More verdicts are written smaller, next to each other."""
_MAX_COSTS = 6
"""Candidates on the card about costs."""
_MAX_ITEMS = 6
"""Sentences on a card before the others are folded away."""


def write_first_screen(model: PageModel) -> Markup:
    """Return everything above the panels."""
    verdicts = [_write_verdict(result) for result in model.labels]
    if not verdicts:
        verdicts = [element("div", element("p", model.summary, class_="sentence"), class_="verdict")]
    many = "verdicts many" if len(verdicts) > _FEW_VERDICTS else "verdicts"
    charts = _write_charts(model)
    return join(
        element("section", verdicts, class_=many, aria_label="Verdicts"),
        element("div", charts, _write_cards(model), class_="front" if charts else None),
        _write_strip(model.extremes, model) if model.extremes else None,
    )


def _write_verdict(result: LabelResult) -> Markup:
    start, colon, rest = result.sentence.partition(": ")
    sentence = join(element("strong", start + colon.strip()), " ", rest) if colon else join(result.sentence)
    return element(
        "div",
        None if result.label in start else element("p", isolate(result.label), class_="label"),
        element("p", sentence, class_="sentence"),
        [element("p", note, class_="note") for note in result.notes],
        class_="verdict refusal" if result.is_refusal else "verdict",
    )


def _write_charts(model: PageModel) -> Markup | None:
    """Return one chart per label with scores, of which the script shows one; without scores, the leakage."""
    results = [result for result in model.labels if result.scores]
    if not results:
        return element("div", _write_leak_chart(model), class_="charts") if model.leaks else None
    options = [(number, result.label) for number, result in enumerate(results)]
    select = write_select("label", "Label", options) if len(results) > 1 else None
    charts = [_write_label_chart(f"chart-{number}", result, model) for number, result in enumerate(results)]
    return element("div", select, charts, class_="charts", data_switch="label")


def _write_label_chart(key: str, result: LabelResult, model: PageModel) -> Markup:
    scores = {score.candidate: score for score in result.scores}
    reach = result.perfect - result.chance
    rows = [
        _make_row(candidate, scores.get(candidate.name), _find_ticks(candidate, model, result.chance, reach))
        for candidate in model.candidates
    ]
    headers = ("Layer (view)", result.metric, "Per scan", "Comparison")
    chart = DotChart(
        f"{result.metric} for {result.label}",
        f"{key}-read",
        headers,
        result.chance,
        tuple(rows),
        _list_targets(model),
    )
    patients = "" if result.patients is None else f" of {result.patients:,} patients"
    reading = f"From {result.scans:,} scans{patients}; layers are in network order. {_explain_ticks(model)}"
    return _write_chart(
        chart,
        join(f"{result.metric} for ", isolate(result.label)),
        f"{result.metric}, {result.interval}",
        reading,
        _write_numbers(result, model),
    )


def _write_chart(chart: DotChart, title: Child, value: str, reading: str, numbers: Markup) -> Markup:
    """Return a dot chart as a figure, with the meaning of its marks above it and the explanation below.

    Args:
        chart: The chart; its figure gets the id before `-read` in `DotChart.described_by`.
        title: Heading.
        value: Meaning of a dot and its interval.
        reading: Sentences on how to read the chart.
        numbers: The numbers as a table.
    """
    key = chart.described_by.removesuffix("-read")
    return element(
        "figure",
        element("figcaption", element("h2", title, id=f"{key}-name")),
        draw_dot_key(chart, value),
        draw_dot_chart(chart),
        element("p", class_="readout scripted", aria_hidden="true"),
        element(
            "p",
            reading.strip(),
            write_advice("Click a row, or move with the arrow keys, to read it."),
            class_="read",
            id=f"{key}-read",
        ),
        numbers,
        id=key,
        aria_labelledby=f"{key}-name",
    )


def _list_targets(model: PageModel) -> tuple[str, ...]:
    """Return the names of the ticks in the order of their letters."""
    return tuple(dict.fromkeys(leak.target for leak in model.leaks))


def _explain_ticks(model: PageModel) -> str:
    if not model.leaks:
        return ""
    return (
        "The ticks under a row show how well facts of the acquisition can be read from the same values, "
        "between chance and the best possible score: a tick far to the right warns of leakage."
    )


def _find_ticks(
    candidate: Candidate, model: PageModel, chance: float, reach: float
) -> tuple[tuple[str, float, str], ...]:
    return tuple(
        (leak.target, chance + leak.strength * reach, _describe_leak(leak))
        for leak in model.leaks
        if leak.candidate == candidate.name and drop_nonfinite(leak.strength) is not None
    )


def _describe_leak(leak: Leak) -> str:
    if leak.score is None:
        return f"{format_number(100 * leak.strength, 0)} %"
    return f"{leak.metric} {format_number(leak.score)}".strip()


def _make_row(candidate: Candidate, score: Score | None, ticks: tuple[tuple[str, float, str], ...]) -> DotRow:
    return DotRow(
        candidate.name,
        None if score is None else drop_nonfinite(score.value),
        None if score is None else drop_nonfinite(score.low),
        None if score is None else drop_nonfinite(score.high),
        ticks,
        (
            _describe_score(score),
            "" if candidate.is_baseline else format_bytes(candidate.bytes_per_scan),
            "" if score is None else score.word,
        ),
        is_baseline=candidate.is_baseline,
        is_chosen=score is not None and score.is_chosen,
    )


def _describe_score(score: Score | None) -> str:
    if score is None:
        return "not measured"
    if score.low is None or score.high is None:
        return format_number(score.value)
    return f"{format_number(score.value)} ({format_number(score.low)} to {format_number(score.high)})"


def _write_numbers(result: LabelResult, model: PageModel) -> Markup:
    """Return the numbers of a chart as a table, with the leakage of each candidate."""
    scores = {score.candidate: score for score in result.scores}
    targets = _list_targets(model)
    strengths = {(leak.candidate, leak.target): _describe_leak(leak) for leak in model.leaks}
    rows: list[list[Cell]] = []
    for candidate in model.candidates:
        score = scores.get(candidate.name)
        numbers = (score.value, score.low, score.high) if score else (None, None, None)
        wins = None if score is None or score.wins is None else f"{format_number(100 * score.wins, 0)} %"
        cells = [candidate.name, *map(format_number, numbers), wins, candidate.values]
        rows.append([*cells, *(strengths.get((candidate.name, target)) for target in targets)])
    columns = ("Candidate", result.metric, "Low", "High", "Resamples won", "Values", *targets)
    return write_numbers("Numbers as a table", write_table(columns, rows, f"Numbers for {result.label}"))


def _write_leak_chart(model: PageModel) -> Markup:
    """Return the chart for a report without labels: the ticks only, from chance to perfect."""
    rows = []
    for candidate in model.candidates:
        ticks = _find_ticks(candidate, model, 0.0, 1.0)
        texts = (format_bytes(candidate.bytes_per_scan),)
        rows.append(DotRow(candidate.name, None, None, None, ticks, texts, is_baseline=candidate.is_baseline))
    headers = ("Layer (view)", "Per scan")
    chart = DotChart("Leakage", "leakage-read", headers, 0.0, tuple(rows), _list_targets(model))
    table = write_table(
        ("Candidate", "Property", "Strength", "Score"),
        [(leak.candidate, leak.target, leak.strength, _describe_leak(leak)) for leak in model.leaks],
        "Leakage as a table",
    )
    reading = f"Layers are in network order. {_explain_ticks(model)}"
    return _write_chart(chart, "Leakage", "", reading, write_numbers("Numbers as a table", table))


def _write_cards(model: PageModel) -> Markup:
    vetoes = [
        join(element("strong", isolate(veto.candidate), ":"), " ", mark_code(veto.reason))
        for veto in model.vetoes
    ]
    changes = [mark_code(change) for change in model.changes]
    return element(
        "div",
        _write_card("What rules a layer out", _write_items(vetoes) or "No measure rules out a layer."),
        _write_card("What it costs", _write_costs(model)),
        _write_card("What would change this", _write_items(changes) or "Nothing is known."),
        class_="cards",
    )


def _write_items(texts: list[Markup]) -> Markup:
    """Return a list of which a long rest is folded away."""
    shown, more = texts[:_MAX_ITEMS], texts[_MAX_ITEMS:]
    if len(more) == 1:
        shown, more = texts, []
    lists = [element("ul", [element("li", text) for text in part]) for part in (shown, more) if part]
    return join(lists[:1], write_details(f"{len(more)} more", lists[1]) if more else None)


def _write_card(title: str, *content: Child) -> Markup:
    return element("section", element("h2", title), *content, class_="card", aria_label=title)


def _write_costs(model: PageModel) -> Child:
    """Return the sizes of the recommended candidates first, then of the others in network order."""
    chosen = {score.candidate for result in model.labels for score in result.scores if score.is_chosen}
    layers = [candidate for candidate in model.candidates if not candidate.is_baseline]
    ranked = sorted(layers, key=lambda candidate: candidate.name not in chosen)
    rows = [
        element(
            "tr",
            element("th", isolate(candidate.name), scope="row"),
            element("td", format_bytes(candidate.bytes_per_scan)),
            element("td", format_gb(candidate.collection_bytes)),
            class_="chosen" if candidate.name in chosen else None,
        )
        for candidate in ranked[:_MAX_COSTS]
    ]
    total = f"{model.collection_scans:,} scans"
    head = element("tr", [element("th", text, scope="col") for text in ("Layer", "One scan", total)])
    rest = len(ranked) - len(rows)
    return join(
        element("table", element("thead", head), element("tbody", rows), aria_label="Sizes"),
        element("p", f"{rest} more in the chart.", class_="note") if rest else None,
    )


def _write_strip(extremes: Extremes, model: PageModel) -> Markup:
    groups = []
    for title, scans in (("Smallest values", extremes.low), ("Largest values", extremes.high)):
        tiles = [
            draw_tile(
                extreme.scan,
                model.scans.ids[extreme.scan],
                f"{format_cell(extreme.value)}"
                + (f" · {extreme.label_value}" if extreme.label_value else ""),
                model.slices,
            )
            for extreme in scans
        ]
        groups.append(
            element("div", element("p", title, class_="label"), element("ol", tiles, class_="tiles"))
        )
    title = join("Extremes of ", isolate(extremes.unit))
    reading = (
        f"The scans with the smallest and the largest values of the unit that follows {extremes.label} best. "
        f"Under each slice: the scan, the value of the unit and the value of {extremes.label}."
    )
    return write_figure("extremes", title, reading, element("div", groups, class_="strip"), heading="h2")
