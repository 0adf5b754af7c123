import builders
import pytest

from fedge.client.settings.site_config import SiteFile
from fedge.shared.config import home_files

GOOD = '[site]\nname = "a"\ntask = "digits"\n[server]\naddress = "h:1"\n'


def refused(path, text, code):
    path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
    return builders.refused(code, home_files.read, path, SiteFile)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "site.toml"


def test_a_good_file_is_read(path):
    path.write_text(GOOD)
    assert home_files.read(path, SiteFile).site.name == "a"


def test_no_file_is_no_home(path):
    said = builders.refused(901, home_files.read, path, SiteFile)
    assert "must hold site.toml, got none" in said


def test_unreadable_files_are_told_apart(path):
    refused(path, b"\xff\xfe", 203)
    refused(path, "x" * (2**20 + 1), 203)
    refused(path, "[site", 204)
    refused(path, "a = " + "[" * 100_000, 204)
    refused(path, "a = " + "9" * 5000, 204)
    path.unlink()
    path.mkdir()
    builders.refused(203, home_files.read, path, SiteFile)


def test_a_misspelt_key_is_named_with_the_nearest_of_its_table(path):
    message = refused(path, GOOD + "[data]\ntest-fractoin = 0.5\n", 202)
    assert message == (
        "site.toml: data.'test-fractoin': must be a known key; the nearest is data.test-fraction"
    )
    assert "there is none like it" in refused(path, GOOD + "[zzz]\n", 202)


def test_values_are_named_by_their_key(path):
    assert refused(path, "", 201).startswith("site.toml: site.name: must be given, got nothing")
    message = refused(path, GOOD + "[data]\nseed = -1\n", 201)
    assert message == "site.toml: data.seed: must be at least 0, got -1"
    refused(path, "site = 3\n", 201)
    refused(path, GOOD + '[data]\nseed = "1"\n', 201)
