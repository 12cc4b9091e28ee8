"""Content of the report page, as plain dataclasses without computation.

Scans are numbered: a scan is its position in `Scans.ids`. Candidates (a layer in a view) and baselines are
named: every part of the model refers to a candidate by `Candidate.name`. All texts may contain any character;
the page escapes them. Numbers that do not exist are None or NaN and appear as a dash.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real

import numpy as np
from numpy.typing import NDArray

Cell = str | int | float | None
"""Content of a table cell."""
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Candidate:
    """A layer in a view, or a baseline.

    Attributes:
        layer: Name of the layer or of the baseline.
        view: Form of its values, e.g. `vector`, `mean`, `max` or `grid`; empty for a baseline.
        values: Number of values per scan.
        bytes_per_scan: Size of these values.
        collection_bytes: Size for all scans of the collection.
        is_baseline: Whether this is a baseline, which is compared but never recommended.
    """

    layer: str
    view: str
    values: int
    bytes_per_scan: int
    collection_bytes: int
    is_baseline: bool = False

    @property
    def name(self) -> str:
        """Return the name by which the other parts of the model refer to this candidate."""
        return f"{self.layer} ({self.view})" if self.view else self.layer


@dataclass(frozen=True)
class Score:
    """How well a label can be read off a candidate.

    Attributes:
        candidate: Name of the candidate.
        value: Score, in the metric of the label.
        low: Lower end of the interval.
        high: Upper end of the interval.
        wins: Share of the resamples that this candidate wins, from 0 to 1.
        word: One or two words about the comparison, e.g. `chosen` or `as good`; may be empty.
        is_chosen: Whether the verdict recommends this candidate.
    """

    candidate: str
    value: float
    low: float | None = None
    high: float | None = None
    wins: float | None = None
    word: str = ""
    is_chosen: bool = False


@dataclass(frozen=True)
class Leak:
    """How well a property of the acquisition can be read off a candidate.

    Attributes:
        candidate: Name of the candidate.
        target: Name of the property, e.g. `kernel` or `slice count`.
        strength: Position between chance (0) and perfect prediction (1).
        score: Score in `metric`.
        metric: Name of the metric of `score`.
    """

    candidate: str
    target: str
    strength: float
    score: float | None = None
    metric: str = ""


@dataclass(frozen=True)
class LabelResult:
    """Verdict and scores for one label.

    Attributes:
        label: Name of the label.
        sentence: The verdict or the refusal, as one sentence or two. The page prints the part before the
            first colon in bold.
        is_refusal: Whether no candidate is recommended.
        metric: Name of the metric, e.g. `AUC` or `R²`.
        chance: Score of a guess.
        perfect: Best possible score.
        scans: Number of scans with this label.
        patients: Number of their patients; None if unknown.
        scores: Scores of candidates and baselines, in any order.
        interval: Meaning of `Score.low` and `Score.high`.
        notes: Further sentences, e.g. about the permutation control.
    """

    label: str
    sentence: str
    is_refusal: bool
    metric: str
    chance: float
    perfect: float = 1.0
    scans: int = 0
    patients: int | None = None
    scores: tuple[Score, ...] = ()
    interval: str = "95 % interval"
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Veto:
    """A reason against a candidate.

    Attributes:
        candidate: Name of the candidate.
        reason: One sentence.
    """

    candidate: str
    reason: str


@dataclass(frozen=True)
class DataTable:
    """A table, e.g. of health measures.

    Attributes:
        columns: Titles of the columns. The first column names the row.
        rows: Cells of each row.
        explanations: Column title → one sentence that explains the column.
        reading: Sentence on how to read the table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    explanations: Mapping[str, str] = field(default_factory=dict)
    reading: str = ""


@dataclass(frozen=True, eq=False)
class Matrix:
    """A heat map: rows × columns of numbers.

    Attributes:
        title: Heading.
        reading: Sentence on how to read it, with the number of scans that it is from.
        rows: Names of the rows.
        columns: Names of the columns.
        values: Array (rows, columns); NaN for a missing value.
        low: Value of the first color.
        high: Value of the last color.
        is_diverging: Whether the middle between `low` and `high` is neutral, as for correlations.
        decimals: Digits after the decimal point.
        row_title: Noun for the rows, e.g. `unit`.
        marks: Array (rows, columns) of texts that follow the values, e.g. `*`; None for no marks.
    """

    title: str
    reading: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    low: float = 0.0
    high: float = 1.0
    is_diverging: bool = False
    decimals: int = 2
    row_title: str = ""
    marks: tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True)
class Column:
    """A property of the scans, e.g. a label or a header field.

    Attributes:
        name: Name of the property.
        values: One value per scan: all numbers or all texts; None where it is missing.
    """

    name: str
    values: tuple[Cell, ...]

    @property
    def is_numeric(self) -> bool:
        """Return whether every value that is present is a number."""
        present = [value for value in self.values if value is not None]
        return bool(present) and all(isinstance(value, Real) for value in present)


@dataclass(frozen=True)
class Scans:
    """The scans that the page shows; of a large output, a sample.

    Attributes:
        ids: Scan ids.
        columns: Properties by which maps are colored.
    """

    ids: tuple[str, ...] = ()
    columns: tuple[Column, ...] = ()


@dataclass(frozen=True, eq=False)
class ScanMap:
    """Positions of the scans in a plane.

    Attributes:
        candidate: Name of the candidate.
        method: Name of the method, e.g. `PCA` or `t-SNE`.
        x: One coordinate per scan of `Scans`; NaN for scans that are not on this map.
        y: The other coordinate.
        caption: Sentence on how to read it, e.g. that distances mislead.
    """

    candidate: str
    method: str
    x: Floats
    y: Floats
    caption: str = ""


@dataclass(frozen=True, eq=False)
class NeighborLists:
    """Nearest neighbors of the scans in one candidate.

    Attributes:
        candidate: Name of the candidate.
        neighbors: Array (scans, k) of positions in `Scans.ids`, nearest first; -1 for a missing neighbor.
        distances: Array (scans, k).
        measure: Name of the distance.
    """

    candidate: str
    neighbors: Integers
    distances: Floats
    measure: str = "distance"


@dataclass(frozen=True)
class Outlier:
    """A scan that is far from all others.

    Attributes:
        scan: Position of the scan in `Scans.ids`.
        candidate: Name of the candidate.
        score: Size of the deviation.
        reason: One sentence, e.g. "7 times the median distance to the fifth neighbor".
    """

    scan: int
    candidate: str
    score: float
    reason: str


@dataclass(frozen=True)
class Extreme:
    """A scan at one end of the values of the best unit.

    Attributes:
        scan: Position of the scan in `Scans.ids`.
        value: Value of the unit.
        label_value: Value of the label, as a text; empty if it is missing.
    """

    scan: int
    value: float
    label_value: str = ""


@dataclass(frozen=True)
class Extremes:
    """The scans at both ends of the values of the best unit.

    Attributes:
        unit: Name of the unit, e.g. `conv_3 (grid), unit 17`.
        label: Label that the unit follows best.
        low: Scans with the smallest values, the smallest first.
        high: Scans with the largest values, the largest last.
    """

    unit: str
    label: str
    low: tuple[Extreme, ...]
    high: tuple[Extreme, ...]


@dataclass(frozen=True)
class Slice:
    """The middle slice of a scan as a gray image.

    Attributes:
        png: PNG file.
        width: Columns.
        height: Rows.
    """

    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Method:
    """Description of a method.

    Attributes:
        title: Name of the method.
        text: The computation, the number of scans, and the source.
    """

    title: str
    text: str


@dataclass(frozen=True)
class PageModel:
    """Content of the page.

    Attributes:
        title: Title of the page, e.g. the name of the output.
        facts: Short facts under the title, e.g. "248 scans", "5 layers", the model's hash, the date.
        summary: Sentence that replaces the verdicts in a report without labels.
        labels: Verdicts and scores, in the order of the labels table.
        candidates: Candidates in network order, then the baselines.
        leaks: Leakage of all candidates.
        vetoes: Reasons against candidates.
        collection_scans: Number of scans that `Candidate.collection_bytes` is for.
        changes: Advice on steps that would change the verdict, as sentences.
        extremes: Scans at the ends of the best unit; None without a best unit.
        health: Measures that need no labels; None without measures.
        stability: How much small changes of the scans change the features; None if it was not measured.
        scans: The scans that the page shows.
        maps: Maps of these scans.
        neighbors: Neighbors of these scans.
        units: Heat maps of units × labels and histograms of units against labels.
        agreement: Heat maps of layers × layers.
        outliers: Outlier scans, the most extreme first.
        slices: Position of a scan → its slice.
        methods: Descriptions of the methods.
        versions: Library → version.
        cautions: Sentences about the whole report, e.g. that each panel uses a sample.
    """

    title: str
    facts: tuple[str, ...] = ()
    summary: str = ""
    labels: tuple[LabelResult, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    leaks: tuple[Leak, ...] = ()
    vetoes: tuple[Veto, ...] = ()
    collection_scans: int = 0
    changes: tuple[str, ...] = ()
    extremes: Extremes | None = None
    health: DataTable | None = None
    stability: DataTable | None = None
    scans: Scans = field(default_factory=Scans)
    maps: tuple[ScanMap, ...] = ()
    neighbors: tuple[NeighborLists, ...] = ()
    units: tuple[Matrix, ...] = ()
    agreement: tuple[Matrix, ...] = ()
    outliers: tuple[Outlier, ...] = ()
    slices: Mapping[int, Slice] = field(default_factory=dict)
    methods: tuple[Method, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    cautions: tuple[str, ...] = ()
