import gzip
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from fedge.shared.config.reader import load as load_config
from fedge.shared.errors import DataError
from fedge.shared.tasks import hmp_adl
from fedge.shared.tasks.dry_run import check
from fedge.shared.tasks.hmp_adl import ACTIVITIES, FILE, TASK, WINDOW, acceleration, load, windows
from fedge.simulations.engine import simulate

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "hmp-adl.toml"
LINE = b"22 49 35\r\n"


@pytest.fixture(scope="module")
def table(data_folder):
    started = time.process_time()
    found = load(data_folder / "hmp_adl")
    assert time.process_time() - started < 5
    return found


def name(activity="walk", volunteer="f1", second=0, folder="Walk"):
    return f"HMP/{folder}/Accelerometer-2011-03-24-10-24-{second:02d}-{activity}-{volunteer}.txt"


def pack(path, members, mode="w:gz"):
    """Write (name or TarInfo, bytes) pairs."""
    with tarfile.open(path, mode) as archive:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = info.size or len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def refusal(path):
    with pytest.raises(DataError) as caught:
        load(path)
    return caught.value.code, str(caught.value)


def test_what_the_archive_holds(table):
    assert table.features.shape == (5721, WINDOW, 3) and table.features.dtype == np.float32
    assert table.features.min() == -1.5 and table.features.max() == 1.5
    assert len(np.unique(table.sites)) == 16
    assert set(table.labels) == set(range(14))
    assert 0.2 < table.test.mean() < 0.3


def test_no_window_is_on_both_sides(table):
    # With the copies in the *_MODEL folders, some would be.
    sides = {}
    for window, test in zip(table.features, table.test, strict=True):
        sides.setdefault(window.tobytes(), set()).add(bool(test))
    assert sum(len(found) > 1 for found in sides.values()) == 0


def test_every_volunteer_trains_and_tests(table):
    for site in np.unique(table.sites):
        own = table.sites == site
        assert (own & table.test).any() and (own & ~table.test).sum() > 4
    assert set(table.labels[table.test]) == set(range(14))


def test_codes_are_the_manuals_accelerations():
    codes = np.array([0, 21, 63], dtype=np.uint8)
    assert acceleration(codes).tolist() == pytest.approx([-1.5, -0.5, 1.5])


def test_windows_overlap_by_half_and_leave_the_rest():
    samples = np.arange(3 * 300).reshape(300, 3)
    found = windows(samples)
    assert found.shape == (3, WINDOW, 3)
    assert np.array_equal(found[1], samples[64:192])


def test_one_recording_is_on_one_side_and_models_are_left_out(tmp_path):
    members = [(name(second=s), LINE * 200) for s in (3, 1, 2, 0)]
    members += [(name(second=1, folder="Walk_MODEL"), LINE * 200), ("HMP/README.txt", b"read me")]
    members += [(name(second=9), LINE * (WINDOW - 1))]
    # The second in time, which stands third in the archive.
    members[1] = (name(second=1), b"63 0 1\n" * 200)
    table = load(pack(tmp_path / FILE, members))
    assert table.test.tolist() == [False, False, True, True, False, False, False, False]
    assert table.features[2, 0].tolist() == pytest.approx([1.5, -1.5, -1.5 + 3 / 63])
    assert set(table.sites) == {"f1"} and set(table.labels) == {ACTIVITIES.index("walk")}


@pytest.mark.parametrize(
    "line", [b"22 49 35\n", b" 22  49\t35 \n", b"\n22 49 35\n\n", b"22 49 35 \r\n"]
)
def test_lines_may_be_written_in_several_ways(tmp_path, line):
    table = load(pack(tmp_path / FILE, [(name(), line * WINDOW)]))
    assert np.array_equal(table.features[0], acceleration(np.full((WINDOW, 3), [22, 49, 35])))


def test_the_task_fits_together():
    check(TASK)


@pytest.mark.parametrize("path", [None, "nowhere", "."])
def test_the_archive_must_be_there(path, tmp_path):
    code, message = refusal(tmp_path / path if path else None)
    assert code == 301 and ("data.path" in message if path is None else "readable" in message)


@pytest.mark.parametrize(
    "bad", [b"22 49\n", b"22 49 64\n", b"22 49 -1\n", b"22 49 35 1\n", b"22 4.5 35\n", b"\xff\n"]
)
def test_a_bad_line_is_named(tmp_path, bad):
    pack(tmp_path / FILE, [(name(), LINE * 5 + bad + LINE * 200)])
    code, message = refusal(tmp_path)
    assert code == 302 and "walk-f1.txt line 6: must hold 3 codes 0 to 63, got" in message


@pytest.mark.parametrize("activity", ["fly", "walk_1"])
def test_a_recording_must_say_what_it_is_of(tmp_path, activity):
    pack(tmp_path / FILE, [(name(activity), LINE * 200)])
    code, message = refusal(tmp_path)
    assert (
        code == 302 and "must be named Accelerometer-[time]-[activity]-[volunteer].txt" in message
    )


def test_a_recording_twice_would_be_on_both_sides(tmp_path):
    pack(tmp_path / FILE, [(name(), LINE * 200), (name(folder="Other"), LINE * 200)])
    code, message = refusal(tmp_path)
    assert code == 302 and "walk-f1.txt: must be in the archive once, got it twice" in message


def test_nothing_to_learn_from_is_refused(tmp_path):
    pack(tmp_path / FILE, [(name(), LINE * 100)])
    code, message = refusal(tmp_path)
    assert code == 302 and "must hold recordings of 128 samples or more" in message


def of_kind(kind):
    info = tarfile.TarInfo(name())
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_only_plain_files_are_read(tmp_path, kind):
    pack(tmp_path / FILE, [(of_kind(kind), b"")])
    code, message = refusal(tmp_path)
    assert code == 302 and "must be a plain file" in message


def test_a_sparse_file_is_refused(tmp_path):
    info = tarfile.TarInfo(name())
    # In PAX form: a map that promises a gigabyte of zeros after no data at all.
    info.pax_headers = {
        "GNU.sparse.major": "0",
        "GNU.sparse.minor": "1",
        "GNU.sparse.map": "0,0,1073741824,0",
        "GNU.sparse.size": "1073741824",
        "GNU.sparse.name": name(),
    }
    pack(tmp_path / FILE, [(info, b"")])
    assert refusal(tmp_path)[0] == 302


def test_sizes_are_bounded(tmp_path, monkeypatch):
    path = pack(tmp_path / FILE, [(name(second=s), LINE * 200) for s in range(3)])
    assert len(load(path).labels) == 6
    for limit, value, named in (
        ("MAX_ARCHIVE_BYTES", 100, "must be at most 100 bytes"),
        ("MAX_PLAIN_BYTES", 1000, "must unpack to at most 1000 bytes"),
        ("MAX_MEMBERS", 2, "must hold at most 2 members"),
        ("MAX_RECORDING_BYTES", 1999, "must be at most 1999 bytes, got 2000"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(hmp_adl, limit, value)
            code, message = refusal(path)
            assert code == 302 and named in message


def test_a_bomb_is_not_unpacked(tmp_path):
    (tmp_path / FILE).write_bytes(gzip.compress(bytes(hmp_adl.MAX_PLAIN_BYTES + 1), 6))
    assert (tmp_path / FILE).stat().st_size < 100_000
    assert refusal(tmp_path)[0] == 302


@pytest.mark.parametrize("damage", ["text", "cut", "flipped", "plain"])
def test_a_damaged_archive_is_refused(tmp_path, damage):
    noise = np.random.default_rng(0).integers(0, 64, (2000, 3))
    text = b"".join(b"%d %d %d\n" % tuple(row) for row in noise.tolist())
    path = pack(tmp_path / FILE, [(name(), text)], "w:" if damage == "plain" else "w:gz")
    data = bytearray(path.read_bytes())
    if damage == "text":
        data = bytearray(b"22 49 35\n")
    elif damage == "cut":
        del data[-200:]
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    assert refusal(path)[0] == 302


def test_other_contents_under_gzip_are_refused(tmp_path):
    (tmp_path / FILE).write_bytes(gzip.compress(b"no archive" * 100))
    code, message = refusal(tmp_path)
    assert code == 302 and "must be a tar archive" in message


def test_the_example_names_the_task():
    config = load_config(EXAMPLE, ["secure-aggregation.enabled=true"])
    assert config.task.name == TASK.name and config.data.partition == "natural"


@pytest.mark.soak
def test_a_federation_of_volunteers_learns(tmp_path, data_folder):
    config = load_config(EXAMPLE, [f"data.path={data_folder / 'hmp_adl'}", "run.rounds=2"])
    directory = simulate(config, tmp_path / "run")
    last = (directory.path / "rounds.jsonl").read_text().splitlines()[-1]
    found = json.loads(last)["metrics"]["pooled"]
    # The most frequent activity is less than a quarter of the test windows; chance is 1/14.
    assert found["accuracy"] > 0.25 and found["loss"] < np.log(14), found
