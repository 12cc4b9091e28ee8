"""The books: what the ledger promises beside the rows that are there, one layer at a time.

Of every promised row one byte is kept while its layer is read: whether it was seen. A million scans of one
patch take 1 MB, of a hundred patches 100 MB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.commands.verify.findings import Fault, Findings, Kind
from featray.commands.verify.read_features import FileRows, Rows, Shape
from featray.commands.verify.read_scans import Ledger, covered
from featray.commands.verify.run_files import RecipeFacts
from featray.output.dataset import FEATURES, SCANS
from featray.schema import DataFile

_SEEN, _SEEN_OTHER = 1, 2


class LayerBooks:
    """The rows of one layer against the ledger.

    Args:
        layer: Its name.
        ledger: All scans.
        rows: Rows of the layer, as the log has it.
    """

    def __init__(self, layer: str, ledger: Ledger, rows: int) -> None:
        self.layer, self.ledger = layer, ledger
        # More patches than the layer has rows cannot be there; a damaged number must not cost the memory.
        self._patches = np.minimum(ledger.patches, rows + 1)
        self._ends = np.cumsum(self._patches)
        self._seen = np.zeros(int(self._ends[-1]) if len(ledger) else 0, np.uint8)
        self._shapes: dict[tuple[int, Shape], list[Rows]] = defaultdict(list)
        self.recipes: set[int] = set()
        self.has_rows = np.zeros(len(ledger), bool)

    def add(self, rows: FileRows) -> list[Fault]:
        """Enter the rows of one file; return what is wrong with them."""
        known = rows.scan >= 0
        scan, patch, recipe = rows.scan[known], rows.patch[known].astype(np.int64), rows.recipe[known]
        self.has_rows[scan] = True
        is_other = recipe != self.ledger.recipe.of_row[scan]
        is_ok, is_promised = self.ledger.is_ok[scan], (patch >= 0) & (patch < self._patches[scan])
        self.recipes.update(np.unique(recipe[is_ok & ~is_other]).tolist())
        self._add_shapes(rows.shapes)
        slot = self._ends[scan] - self._patches[scan] + patch
        doubled = self._see(slot, is_promised & ~is_other, _SEEN)
        self._see(slot, is_promised & is_other, _SEEN_OTHER)
        is_other_run = ~is_other & (rows.run[known] != self.ledger.run.of_row[scan])
        found = (
            (Kind.FEATURES_WITHOUT_LEDGER, ~is_ok),
            (Kind.OTHER_RECIPE, is_ok & is_other),
            (Kind.OTHER_RUN, is_ok & is_other_run),
            (Kind.SURPLUS_PATCH, is_ok & ~is_promised),
            (Kind.DOUBLED_ROW, doubled),
        )
        return [self._fault(kind, scan[mask], patch[mask]) for kind, mask in found if mask.any()]

    def missing(self) -> tuple[Rows, Rows]:
        """Return the scans that lack patches of this layer, and for each the first patch it lacks.

        Among them are those whose recipe has no such layer.
        """
        lacking = np.flatnonzero(self._seen == 0)
        scan = np.searchsorted(self._ends, lacking, side="right")
        first = lacking - (self._ends[scan] - self._patches[scan])
        scan, at = np.unique(scan, return_index=True)
        return scan, first[at]

    def of_recipes_with_layer(self, scan: Rows, facts: Mapping[int, RecipeFacts]) -> NDArray[np.bool_]:
        """Return whether each scan's recipe has this layer, as far as rows or a run tell."""
        codes = range(len(self.ledger.recipe.values))
        have = [code for code in codes if code in self.recipes or self.layer in facts[code].layers]
        return np.isin(self.ledger.recipe.of_row[scan], have)

    def of_recipes_without(self, scan: Rows, facts: Mapping[int, RecipeFacts]) -> NDArray[np.bool_]:
        """Return whether a run tells of each scan's recipe that it has no such layer."""
        known = [code for code, told in facts.items() if told.layers and self.layer not in told.layers]
        return np.isin(self.ledger.recipe.of_row[scan], known)

    def uneven(self, facts: Mapping[int, RecipeFacts]) -> list[Fault]:
        """Return the scans whose shape is not that of most, by recipe, where the input has one size."""
        faults = []
        for code in sorted({code for code, _ in self._shapes if facts[code].is_fixed_size}):
            rows = {shape: np.concatenate(found) for (c, shape), found in self._shapes.items() if c == code}
            usual = max(rows, key=lambda shape: len(rows[shape]))
            for shape in sorted(set(rows) - {usual}):
                names = self.ledger.names(rows[shape])
                detail = f"{names[0].as_py()}: {shape}, others have {usual}"
                faults.append(Fault(Kind.UNEVEN_SHAPE, names, detail))
        return faults

    def _add_shapes(self, shapes: Mapping[Shape, Rows]) -> None:
        for shape, scan in shapes.items():
            codes = self.ledger.recipe.of_row[scan]
            for code in np.unique(codes).tolist():
                self._shapes[code, shape].append(scan[codes == code].astype(np.int32))

    def _see(self, slot: Rows, mask: NDArray[np.bool_], bit: int) -> NDArray[np.bool_]:
        """Mark promised rows as seen; return which of all rows had been seen before, also by this call."""
        chosen = np.flatnonzero(mask)
        slots, first = np.unique(slot[chosen], return_index=True)
        is_again = np.ones(len(chosen), bool)
        is_again[first] = (self._seen[slots] & bit) > 0
        self._seen[slots] |= bit
        doubled = np.zeros(len(slot), bool)
        doubled[chosen[is_again]] = True
        return doubled

    def _fault(self, kind: Kind, scan: Rows, patch: Rows) -> Fault:
        example = f"{self.ledger.ids[int(scan[0])].as_py()}: patch {patch[0]}"
        return Fault(kind, self.ledger.names(scan), example)


@dataclass
class Books:
    """What is left to settle when every layer has been read: what is there for a scan in any of them.

    Attributes:
        ledger: All scans.
        has_rows: bool (scans,), whether any row of features was seen.
        lost: bool (scans,), whether a file that cannot be read explains what the scan lacks.
        missing: Layer → scans that lack patches for no such reason, and the first patch they lack.
        unknown: Layer → ids of features without a ledger row.
    """

    ledger: Ledger
    has_rows: NDArray[np.bool_] = field(init=False)
    lost: NDArray[np.bool_] = field(init=False)
    missing: dict[str, tuple[Rows, Rows]] = field(default_factory=dict)
    unknown: dict[str, pa.Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.has_rows = np.zeros(len(self.ledger), bool)
        self.lost = np.zeros(len(self.ledger), bool)

    def close(
        self,
        books: LayerBooks,
        broken: Sequence[tuple[DataFile, Fault]],
        facts: Mapping[int, RecipeFacts],
        findings: Findings,
    ) -> None:
        """Enter a layer that has been read.

        Args:
            books: The layer's.
            broken: Its files that could not be read, each with why.
            facts: By the ledger's code of the recipe.
            findings: Get what is wrong.
        """
        self.has_rows |= books.has_rows
        for fault in books.uneven(facts):
            findings.add(fault, FEATURES, books.layer)
        scan, first = books.missing()
        # With the only file of a layer its last trace may be lost, so a broken file concerns all it may hold.
        may_have = scan[~books.of_recipes_without(scan, facts)]
        explained = np.zeros(len(self.ledger), bool)
        for kind, files in _by_kind(broken).items():
            within = may_have[covered(self.ledger.ids, files)[may_have]]
            explained[within] = True
            findings.add(Fault(kind, self.ledger.names(within)), FEATURES, books.layer)
        self.lost |= explained
        left = books.of_recipes_with_layer(scan, facts) & ~explained[scan]
        self.missing[books.layer] = scan[left], first[left]

    def settle(self, broken_scans: Iterable[tuple[DataFile, Fault]], findings: Findings) -> None:
        """Report what only all layers together can tell.

        Args:
            broken_scans: Files of `scans` that could not be read, each with why.
            findings: Get what is wrong.
        """
        has_none = self.ledger.is_ok & (self.ledger.patches > 0) & ~self.has_rows & ~self.lost
        if has_none.any():
            ids = self.ledger.names(np.flatnonzero(has_none))
            findings.add(Fault(Kind.LEDGER_WITHOUT_FEATURES, ids, ids[0].as_py()), SCANS)
        for layer, (scan, first) in self.missing.items():
            partly = ~has_none[scan]
            if partly.any():
                ids = self.ledger.names(scan[partly])
                detail = (
                    f"{ids[0].as_py()}: patch {first[partly][0]} of {self.ledger.patches[scan[partly][0]]}"
                )
                findings.add(Fault(Kind.MISSING_PATCH, ids, detail), FEATURES, layer)
        self._settle_unknown(_by_kind(broken_scans), findings)

    def _settle_unknown(self, broken_scans: Mapping[Kind, list[DataFile]], findings: Findings) -> None:
        for layer, unsorted in self.unknown.items():
            ids = unsorted.cast(pa.large_string()).sort()
            left = np.ones(len(ids), bool)
            for kind, files in broken_scans.items():
                inside = covered(ids, files)
                findings.add(Fault(kind, ids.filter(pa.array(inside))), SCANS)
                left &= ~inside
            if left.any():
                names = ids.filter(pa.array(left))
                detail = f"{names[0].as_py()}: no ledger row"
                findings.add(Fault(Kind.FEATURES_WITHOUT_LEDGER, names, detail), FEATURES, layer)


def _by_kind(broken: Iterable[tuple[DataFile, Fault]]) -> dict[Kind, list[DataFile]]:
    files: dict[Kind, list[DataFile]] = defaultdict(list)
    for file, fault in broken:
        files[fault.kind].append(file)
    return files
