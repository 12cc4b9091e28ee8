"""Reconcile the two tables: compare the rows that the scans table requires with the rows of `features`.

While a layer is read, one byte is kept per required row: whether the row was seen. A million scans of one
patch take 1 MB; with a hundred patches each, they take 100 MB.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.commands.verify.expected_cells import NO_CELL, ExpectedCells
from featray.commands.verify.findings import Fault, FindingKind, Findings
from featray.commands.verify.read_features import FeaturesFile, Rows, Shape
from featray.commands.verify.read_scans import ScansTable, can_be_in_files
from featray.output.dataset import FEATURES, SCANS
from featray.schema import DataFile

BrokenFiles = Sequence[tuple[DataFile, Fault]]
"""Unreadable files, each with the reason."""

_SEEN, _SEEN_WITH_OTHER_RECIPE = 1, 2


class LayerReconciliation:
    """The rows of one layer, compared with the cells that the layer must have.

    Args:
        layer: Name of the layer.
        cells: The cells that all scans must have.
        rows: Number of rows of the layer according to the log.

    Attributes:
        has_rows: bool (scans,), whether the layer has a row of the scan.
    """

    def __init__(self, layer: str, cells: ExpectedCells, rows: int) -> None:
        self.layer, self.scans, self._cells = layer, cells.scans, cells
        self._recipe = cells.get_recipe_codes(layer)
        scans = cells.scans
        # A layer cannot have more patches than rows. This limits the memory if a stored number is damaged.
        self._patches = np.where(self._recipe == NO_CELL, 0, np.minimum(scans.patches, rows + 1))
        self._ends = np.cumsum(self._patches)
        self._seen = np.zeros(int(self._ends[-1]) if len(scans) else 0, np.uint8)
        self._shapes: dict[tuple[int, Shape], list[Rows]] = defaultdict(list)
        self._seen_recipes: set[int] = set()
        self.has_rows = np.zeros(len(scans), bool)

    def add_file(self, file: FeaturesFile) -> list[Fault]:
        """Add the rows of one file, and return the faults that the comparison finds."""
        is_known = file.scan >= 0
        scan, patch = file.scan[is_known], file.patch[is_known].astype(np.int64)
        recipe, expected = file.recipe[is_known], self._recipe[scan]
        self.has_rows[scan] = True
        is_cell, is_other_recipe = expected != NO_CELL, recipe != expected
        is_required = (patch >= 0) & (patch < self._patches[scan])
        self._seen_recipes.update(np.unique(recipe[is_cell & ~is_other_recipe]).tolist())
        self._add_shapes(file.shapes)
        position = self._ends[scan] - self._patches[scan] + patch
        is_doubled = self._mark_seen(position, is_required & ~is_other_recipe, _SEEN)
        self._mark_seen(position, is_required & is_other_recipe, _SEEN_WITH_OTHER_RECIPE)
        checks = (
            (FindingKind.FEATURES_WITHOUT_LEDGER, ~is_cell),
            (FindingKind.OTHER_RECIPE, is_cell & is_other_recipe),
            (FindingKind.SURPLUS_PATCH, is_cell & ~is_required),
            (FindingKind.DOUBLED_ROW, is_doubled),
        )
        return [self._make_fault(kind, scan[mask], patch[mask]) for kind, mask in checks if mask.any()]

    def find_missing_patches(self) -> tuple[Rows, Rows]:
        """Return the scans that lack patches of this layer, and the first missing patch of each.

        Scans whose layers are assumed are among them.
        """
        positions = np.flatnonzero(self._seen == 0)
        scan = np.searchsorted(self._ends, positions, side="right")
        patch = positions - (self._ends[scan] - self._patches[scan])
        scan, first = np.unique(scan, return_index=True)
        return scan, patch[first]

    def has_layer(self, scan: Rows) -> NDArray[np.bool_]:
        """Return whether each scan must have this layer.

        If the layers of a scan are assumed, it must have this layer if a row of the same recipe has it.

        Args:
            scan: Row numbers in the scans table.
        """
        is_assumed = self._cells.is_assumed[self._cells.codes[scan]]
        return ~is_assumed | np.isin(self._recipe[scan], list(self._seen_recipes))

    def find_uneven_shapes(self) -> list[Fault]:
        """Return one fault for each shape that differs from the most frequent shape of its recipe.

        Scans without a fixed input size are left out.
        """
        faults = []
        for code in sorted({code for code, _ in self._shapes}):
            scans_by_shape = {
                shape: np.concatenate(parts)
                for (other, shape), parts in self._shapes.items()
                if other == code
            }
            usual = max(scans_by_shape, key=lambda shape: len(scans_by_shape[shape]))
            for shape in sorted(set(scans_by_shape) - {usual}):
                ids = self.scans.get_ids(scans_by_shape[shape])
                detail = f"{ids[0].as_py()}: {shape}, others have {usual}"
                faults.append(Fault(FindingKind.UNEVEN_SHAPE, ids, detail))
        return faults

    def _add_shapes(self, shapes: Mapping[tuple[int, Shape], Rows]) -> None:
        """Add the shapes of the expected cells of scans with a fixed input size."""
        for (code, shape), scan in shapes.items():
            is_judged = self._cells.has_fixed_size[scan] & (self._recipe[scan] == code)
            if code != NO_CELL and is_judged.any():
                self._shapes[code, shape].append(scan[is_judged].astype(np.int32))

    def _mark_seen(self, positions: Rows, mask: NDArray[np.bool_], bit: int) -> NDArray[np.bool_]:
        """Mark required rows as seen; return which rows were seen before, or are duplicates of each other.

        Args:
            positions: (rows,), position of each row among all required rows.
            mask: (rows,), which rows to mark.
            bit: `_SEEN` or `_SEEN_WITH_OTHER_RECIPE`.
        """
        selected = np.flatnonzero(mask)
        unique_positions, first = np.unique(positions[selected], return_index=True)
        is_repeated = np.ones(len(selected), bool)
        is_repeated[first] = (self._seen[unique_positions] & bit) > 0
        self._seen[unique_positions] |= bit
        is_doubled = np.zeros(len(positions), bool)
        is_doubled[selected[is_repeated]] = True
        return is_doubled

    def _make_fault(self, kind: FindingKind, scan: Rows, patch: Rows) -> Fault:
        example = f"{self.scans.ids[int(scan[0])].as_py()}: patch {patch[0]}"
        return Fault(kind, self.scans.get_ids(scan), example)


@dataclass
class Reconciliation:
    """The comparison of all layers with the scans table, for problems that no single layer shows.

    Attributes:
        scans: All scans.
        has_rows: bool (scans,), whether any layer has a row of the scan.
        is_in_broken_file: bool (scans,), whether missing patches of the scan may be in a broken file.
        missing: Layer → scans with missing patches that no broken file explains, and the first missing patch.
        unknown_ids: Layer → ids of features that are not in the scans table.
    """

    scans: ScansTable
    has_rows: NDArray[np.bool_] = field(init=False)
    is_in_broken_file: NDArray[np.bool_] = field(init=False)
    missing: dict[str, tuple[Rows, Rows]] = field(default_factory=dict)
    unknown_ids: dict[str, pa.Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.has_rows = np.zeros(len(self.scans), bool)
        self.is_in_broken_file = np.zeros(len(self.scans), bool)

    def add_layer(self, layer: LayerReconciliation, broken: BrokenFiles, findings: Findings) -> None:
        """Add a layer after all its files have been read.

        Args:
            layer: The layer, with the rows of all readable files.
            broken: Files of the layer that cannot be read.
            findings: Receives the problems of this layer.
        """
        self.has_rows |= layer.has_rows
        for fault in layer.find_uneven_shapes():
            findings.add(fault, FEATURES, layer.layer)
        scan, first_patch = layer.find_missing_patches()
        # If the only file of a layer is broken, nothing else may show that an assumed cell exists. So every
        # scan that may have the cell and that the file can contain is affected.
        is_explained = np.zeros(len(self.scans), bool)
        for kind, files in _group_by_kind(broken).items():
            affected = scan[can_be_in_files(self.scans.ids, files)[scan]]
            is_explained[affected] = True
            findings.add(Fault(kind, self.scans.get_ids(affected)), FEATURES, layer.layer)
        self.is_in_broken_file |= is_explained
        is_missing = layer.has_layer(scan) & ~is_explained[scan]
        self.missing[layer.layer] = scan[is_missing], first_patch[is_missing]

    def report(self, broken_scans: BrokenFiles, findings: Findings) -> None:
        """Report the problems that only all layers together show.

        Args:
            broken_scans: Files of the scans table that cannot be read.
            findings: Receives the problems.
        """
        has_nothing = (self.scans.patches > 0) & ~self.has_rows & ~self.is_in_broken_file
        if has_nothing.any():
            ids = self.scans.get_ids(np.flatnonzero(has_nothing))
            findings.add(Fault(FindingKind.LEDGER_WITHOUT_FEATURES, ids, ids[0].as_py()), SCANS)
        for layer, (scan, first_patch) in self.missing.items():
            has_something = ~has_nothing[scan]
            if has_something.any():
                scan, first_patch = scan[has_something], first_patch[has_something]
                ids = self.scans.get_ids(scan)
                detail = f"{ids[0].as_py()}: patch {first_patch[0]} of {self.scans.patches[scan[0]]}"
                findings.add(Fault(FindingKind.MISSING_PATCH, ids, detail), FEATURES, layer)
        self._report_unknown_ids(_group_by_kind(broken_scans), findings)

    def _report_unknown_ids(
        self, broken_scans: Mapping[FindingKind, list[DataFile]], findings: Findings
    ) -> None:
        """Report features of scans that no readable file of the scans table lists.

        They count as damage of a broken file that may list the scan, or else as features without a scan.
        """
        for layer, unsorted_ids in self.unknown_ids.items():
            ids = unsorted_ids.cast(pa.large_string()).sort()
            is_unexplained = np.ones(len(ids), bool)
            for kind, files in broken_scans.items():
                is_in_files = can_be_in_files(ids, files)
                findings.add(Fault(kind, ids.filter(pa.array(is_in_files))), SCANS)
                is_unexplained &= ~is_in_files
            if is_unexplained.any():
                ids = ids.filter(pa.array(is_unexplained))
                detail = f"{ids[0].as_py()}: not in the scans table"
                findings.add(Fault(FindingKind.FEATURES_WITHOUT_LEDGER, ids, detail), FEATURES, layer)


def _group_by_kind(broken: Iterable[tuple[DataFile, Fault]]) -> dict[FindingKind, list[DataFile]]:
    files: dict[FindingKind, list[DataFile]] = defaultdict(list)
    for file, fault in broken:
        files[fault.kind].append(file)
    return files
