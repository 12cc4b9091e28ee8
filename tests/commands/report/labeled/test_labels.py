"""Reading a table of labels: the decision on each column, missing values, and tables that cannot be used."""

from __future__ import annotations

import io
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featray.commands.report.labeled.labels import (
    Label,
    LeftOut,
    count_class_patients,
    decide_column,
    parse_labels,
)
from featray.errors import UsageError

IDS = [f"scan{number:02d}" for number in range(40)]
SECRET = "MUSTERMANN"


def make_table(*lines: str) -> bytes:
    return "\n".join(lines).encode()


def decide(texts: list[str], name: str = "column") -> Label | LeftOut:
    return decide_column(name, texts)


def reason_of(texts: list[str], name: str = "column") -> str:
    decision = decide(texts, name)
    assert isinstance(decision, LeftOut)
    return decision.reason


def label_of(texts: list[str], name: str = "column") -> Label:
    decision = decide(texts, name)
    assert isinstance(decision, Label)
    return decision


def fail(data: bytes, scan_ids: list[str] = IDS) -> str:
    with pytest.raises(UsageError) as error:
        parse_labels(data, scan_ids)
    assert SECRET not in str(error.value)
    return str(error.value)


def test_labels_are_in_the_order_of_the_scans_and_nan_where_a_scan_has_no_value() -> None:
    data = make_table("scan_id,contrast,age", "scan02,yes,70.5", "scan00,no,", "scan01,NA,61", "scan03,no,40")
    table = parse_labels(data, ["scan00", "scan01", "scan02", "scan03", "scan04"])
    contrast, age = table.labels
    assert (contrast.kind, contrast.classes) == ("classes", ("no", "yes"))
    np.testing.assert_array_equal(contrast.values, [0, np.nan, 1, 0, np.nan])
    assert (age.kind, age.classes) == ("number", ())
    np.testing.assert_array_equal(age.values, [np.nan, 61, 70.5, 40, np.nan])
    assert (table.rows, table.unknown_rows, table.scans_without_row) == (4, 0, 1)


def test_unknown_scans_are_counted_and_do_not_influence_a_column() -> None:
    data = make_table("scan_id,grade", "scan00,a", "scan01,b", "elsewhere,c")
    table = parse_labels(data, IDS)
    assert table.unknown_rows == 1
    assert table.labels[0].classes == ("a", "b")


def test_scans_of_a_patient_have_the_same_number() -> None:
    data = make_table("scan_id,patient,x", "scan00,P1,a", "scan01,P2,b", "scan02,P1,b")
    table = parse_labels(data, IDS[:4])
    assert table.has_patients
    first, second, third, without_row = table.patients
    assert first == third
    assert len({int(first), int(second), int(without_row)}) == 3


def test_a_scan_without_a_patient_has_no_label_because_it_cannot_be_kept_with_its_patient() -> None:
    data = make_table("scan_id,patient,x", "scan00,P1,a", "scan01,P2,b", "scan02,,b")
    table = parse_labels(data, IDS[:3])
    assert table.rows_without_patient == 1
    np.testing.assert_array_equal(table.labels[0].values, [0, 1, np.nan])


def test_without_a_patient_column_each_scan_is_a_patient() -> None:
    table = parse_labels(make_table("scan_id,x", "scan00,a", "scan01,b"), IDS[:2])
    assert not table.has_patients
    assert len(set(table.patients.tolist())) == 2


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings_of_spreadsheets_are_read(separator: str, encoding: str) -> None:
    lines = [separator.join(row) for row in (("scan_id", "röntgen"), ("scan00", "ja"), ("scan01", "nein"))]
    table = parse_labels("\r\n".join(lines).encode(encoding), IDS)
    assert table.labels[0].name == "röntgen"


def test_decimal_commas_are_numbers_in_a_table_with_semicolons() -> None:
    table = parse_labels(make_table("scan_id;x", "scan00;1,5", "scan01;2", "scan02;3,25"), IDS)
    np.testing.assert_array_equal(table.labels[0].values[:3], [1.5, 2, 3.25])


def test_two_numbers_or_few_whole_numbers_are_classes_and_others_are_numbers() -> None:
    assert label_of(["0", "1", "1", "0"]).classes == ("0", "1")
    assert label_of(["0.5", "1.5", "1.5"]).kind == "classes"
    assert label_of(["4", "0", "10", "1", "2"]).classes == ("0", "1", "2", "4", "10")
    assert label_of([str(number % 6) for number in range(60)]).kind == "number"
    assert label_of(["1.5", "2.5", "3.5"] * 5).kind == "number"


def test_classes_do_not_depend_on_case_and_none_is_a_class() -> None:
    label = label_of(["None", "iv", "none", "IV", "n/a", "NULL", "."])
    assert label.classes == ("iv", "None")
    assert int(label.known.sum()) == 4


def test_ids_are_left_out() -> None:
    assert "like an id" in reason_of([f"{SECRET}-{number}" for number in range(30)])
    assert "like an id" in reason_of([str(1001 + number) for number in range(30)])
    assert "like an id" in reason_of([str(number * 7919) for number in range(30)], "case_id")


def test_whole_numbers_that_are_measurements_stay() -> None:
    volumes = [str(1000 + 7919 * number) for number in range(30)]
    assert label_of(volumes, "volume").kind == "number"
    ages = np.random.default_rng(0).integers(30, 90, 60).astype(str).tolist()
    assert label_of(ages, "age").kind == "number"


@pytest.mark.parametrize("text", ["2024-02-{:02d}", "{:02d}.02.2024", "2/{:d}/24", "202402{:02d}"])
def test_dates_are_left_out(text: str) -> None:
    assert reason_of([text.format(day + 1) for day in range(25)]) == "it holds dates"


def test_numbers_of_eight_digits_that_are_no_dates_stay() -> None:
    assert label_of([f"2024{month}15" for month in (13, 27, 45, 60, 71, 99)]).kind == "number"


def test_constants_empty_columns_and_mixtures_are_left_out_with_the_reason() -> None:
    assert reason_of(["a"] * 5) == "it has the same value for all 5 scans that have one"
    assert reason_of(["", "NA"]) == "it has no value for any scan of the output"
    mixture = [str(number / 7) for number in range(30)] + ["<5", "<5"]
    assert reason_of(mixture) == "it holds 30 numbers and 2 values that are not numbers"
    assert "at most 20 are classes" in reason_of([f"{SECRET}{number % 25}" for number in range(100)])


def test_reasons_hold_no_value() -> None:
    for texts in ([SECRET] * 5, [f"{SECRET}{number}" for number in range(30)]):
        assert SECRET not in reason_of(texts)


def test_patients_of_a_class_are_counted_once() -> None:
    label = label_of(["a", "a", "b", "b", ""])
    assert count_class_patients(label, np.array([0, 0, 0, 1, 2])) == (1, 2)


@pytest.mark.parametrize("data", [b"", b"  \n\n"])
def test_an_empty_table_is_refused(data: bytes) -> None:
    assert "is empty" in fail(data)


def test_a_table_without_rows_or_without_labels_is_refused() -> None:
    assert "no rows" in fail(b"scan_id,x\n")
    assert "no column besides" in fail(make_table("scan_id,patient", f"scan00,{SECRET}"))


def test_a_table_without_scan_id_is_refused_and_a_row_instead_of_names_is_not_quoted() -> None:
    assert "its columns are 'scan', 'x'" in fail(make_table("scan,x", f"scan00,{SECRET}"))
    assert "looks like a row" in fail(make_table(f"{SECRET}/1.nii.gz,5", f"{SECRET}/2.nii.gz,6"))


def test_repeated_scans_are_refused_with_their_lines() -> None:
    message = fail(make_table("scan_id,x", f"{SECRET},a", "scan01,b", f"{SECRET},b"), [SECRET])
    assert "1 rows repeat the scan_id of an earlier row: line 4" in message


def test_rows_without_a_scan_id_or_with_another_number_of_values_are_refused_with_their_lines() -> None:
    assert "line 3" in fail(make_table("scan_id,x", "scan00,a", f",{SECRET}"))
    assert "line 3" in fail(make_table("scan_id,x", "scan00,a", f"scan01,b,{SECRET}"))


def test_a_table_without_known_scans_is_refused() -> None:
    assert "none of the 2 scan_id values" in fail(make_table("scan_id,x", f"{SECRET},a", "b,b"))


def test_a_patient_column_under_another_name_is_refused_because_patients_would_be_in_two_folds() -> None:
    message = fail(make_table("scan_id,patient_id,x", f"scan00,{SECRET},a", "scan01,b,b"))
    assert "rename it to 'patient'" in message


def test_text_that_is_damaged_is_refused() -> None:
    assert "UTF-8" in fail(b"scan_id,x\nscan00,\xff\xfe\xe4\n")
    assert "quotation marks" in fail(make_table("scan_id,x", f'scan00,"{SECRET}'))


def test_parquet_is_read_like_text() -> None:
    sink = io.BytesIO()
    columns = {
        "scan_id": IDS[:30],
        "size": [None, *(number / 7 for number in range(29))],
        "contrast": [bool(number % 2) for number in range(30)],
        "grade": pa.array([number % 3 for number in range(30)], pa.int8()),
        "visit": [date(2024, 1, 1 + number) for number in range(30)],
        "__index_level_0__": list(range(30)),
    }
    pq.write_table(pa.table(columns), sink)
    table = parse_labels(sink.getvalue(), IDS)
    size, contrast, grade = table.labels
    assert (size.kind, contrast.classes, grade.classes) == ("number", ("False", "True"), ("0", "1", "2"))
    assert int(size.known.sum()) == 29
    assert size.values[8] == 1
    assert [column.name for column in table.left_out] == ["visit"]
    assert table.scans_without_row == 10


def test_parquet_that_is_damaged_is_refused() -> None:
    assert "no complete Parquet file" in fail(b"PAR1" + bytes(40))
