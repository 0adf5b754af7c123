import shutil

import numpy as np
import pytest

from fedge.shared.errors import DataError
from fedge.shared.preprocessing import steps
from fedge.shared.tasks.heart import FILES, MAX_FILE_BYTES, TASK, load

ROW = "63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0"


@pytest.fixture
def folder(data_folder, tmp_path):
    for name in FILES.values():
        shutil.copy(data_folder / "heart" / name, tmp_path)
    return tmp_path


def test_rows_and_split_are_the_published_ones(folder):
    table = load(folder)
    counts = {
        site: (
            int((~table.test[table.sites == site]).sum()),
            int(table.test[table.sites == site].sum()),
        )
        for site in FILES
    }
    assert counts == {
        "cleveland": (199, 104),
        "hungary": (172, 89),
        "switzerland": (30, 16),
        "va": (85, 45),
    }


def test_first_row_is_read_right(folder):
    table = load(folder)
    assert table.features[0].tolist() == pytest.approx([63, 1, 1, 145, 233, 1, 2, 150, 0, 2.3])
    assert table.labels[0] == 0
    encoded = steps.apply(TASK.preprocessing[:1], table.features[:1])
    # Numbers in order, then cp = 2, 3, 4 and restecg = 1, 2.
    expected = [63, 1, 145, 233, 1, 150, 0, 2.3, 0, 0, 0, 0, 1]
    assert encoded[0].tolist() == pytest.approx(expected)


def test_any_narrowing_is_the_disease(folder):
    table = load(folder)
    share = [table.labels[table.sites == site].mean() for site in FILES]
    assert share == pytest.approx([139 / 303, 98 / 261, 45 / 46, 101 / 130])


def test_the_split_is_stratified_where_it_can_be(folder):
    table = load(folder)
    of_site = table.sites == "cleveland"
    shares = [table.labels[of_site & (table.test == part)].mean() for part in (True, False)]
    assert shares[0] == pytest.approx(shares[1], abs=0.01)


@pytest.mark.parametrize("path", [None, "nowhere"])
def test_the_folder_must_be_there(path, tmp_path):
    with pytest.raises(DataError, match=r"data\.path: must be the folder of") as caught:
        load(tmp_path / path if path else None)
    assert caught.value.code == 301


def test_a_missing_file_is_named(folder):
    (folder / FILES["va"]).unlink()
    with pytest.raises(DataError, match=r"processed\.va\.data") as caught:
        load(folder)
    assert caught.value.code == 301


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("1,2,3", r"line 2: must hold 14 columns, got 3"),
        (
            ROW.replace("145.0", "high"),
            r"line 2, column 4: must be a finite number or \?, got 'high'",
        ),
        (ROW.replace("145.0", "nan"), r"line 2, column 4: must be a finite number"),
        (ROW.replace("145.0", "1e999"), r"line 2, column 4: must be a finite number"),
        (ROW.replace("145.0", ""), r"line 2, column 4: must be a finite number"),
        (ROW.replace("1.0,1.0,", "1.0,7.0,"), r"line 2, column 3: must be one of .*, got 7.0"),
        (ROW[:-1] + "9", r"line 2, column 14: must be a diagnosis 0 to 4, got 9.0"),
        ("\xe9" + ROW, r"line 2: must be ASCII text"),
    ],
)
def test_a_bad_row_is_named(folder, row, named):
    file = folder / FILES["hungary"]
    file.write_bytes(f"{ROW}\n{row}\n{ROW}\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"processed\.hungarian\.data " + named) as caught:
        load(folder)
    assert caught.value.code == 302


def test_incomplete_rows_and_blank_lines_are_left_out(folder):
    file = folder / FILES["hungary"]
    missing = ROW.replace("145.0", "?")
    not_needed = ROW.replace("6.0,0", "?,0")
    file.write_text("\n".join([ROW, missing, "", not_needed, ROW, ""]))
    table = load(folder)
    assert (table.sites == "hungary").sum() == 3


def test_a_file_is_bounded(folder):
    (folder / FILES["hungary"]).write_text(f"{ROW}\n" * (MAX_FILE_BYTES // len(ROW)))
    with pytest.raises(DataError, match="must be at most") as caught:
        load(folder)
    assert caught.value.code == 302


def test_too_few_rows_to_split_are_refused(folder):
    (folder / FILES["hungary"]).write_text(ROW)
    with pytest.raises(DataError, match="3 complete rows or more, got 1") as caught:
        load(folder)
    assert caught.value.code == 302


def test_test_rows_are_a_fixed_draw(folder):
    assert np.array_equal(load(folder).test, load(folder).test)
