import json
import subprocess
import sys

import pytest

from fedge.shared.cli import main
from fedge.shared.privacy.accounting.adversaries import account
from fedge.shared.privacy.accounting.epsilon import Release, epsilon

EPSILON = "--noise-multiplier 1 --sampling-rate 0.1 --steps 100 --delta 1e-5"
CALIBRATE = "--epsilon 1 --delta 1e-5 --sampling-rate 0.1 --steps 100"


@pytest.fixture
def fedge(capsys):
    """Runs an action of `fedge privacy` with options in one text; gives status, output, error."""

    def run(action, options=""):
        status = main.main(["privacy", *action.split(), *options.split()])
        return status, *capsys.readouterr()

    return run


def as_json(result):
    status, out, err = result
    assert (status, err) == (0, "")
    assert out.count("\n") == 1
    return json.loads(out)


def test_epsilon_prints_the_published_number_alone(fedge):
    status, out, err = fedge("epsilon", EPSILON)
    assert (status, out) == (0, "7.0466\n")
    assert err == (
        "epsilon 7.0466 at delta 1e-05, PLD, where one takes part or not: for whoever reads the results alone; "
        "with unit site 91.8173 for the server, which sees who was sampled; "
        "with unit example the server's is the same\n"
    )


def test_with_a_unit_only_its_readers_are_told(fedge):
    for action, options in (("epsilon", EPSILON), ("calibrate", CALIBRATE)):
        _, number, _ = fedge(action, options)
        status, out, err = fedge(action, f"{options} --unit example")
        assert (status, out) == (0, number)
        assert err.endswith("for whoever reads the results, the server too\n")
        status, out, err = fedge(action, f"{options} --unit site")
        assert (status, out) == (0, number)
        assert err.endswith("for the server, which sees who was sampled\n")
        assert "unit" not in err


def test_sampling_hides_an_example_from_the_server_and_no_site(fedge):
    example = as_json(fedge("epsilon", f"{EPSILON} --unit example --json"))
    site = as_json(fedge("epsilon", f"{EPSILON} --unit site --json"))
    assert (example["unit"], site["unit"]) == ("example", "site")
    for result in (example, site):
        released = [Release(1.0, 0.1, 100)]
        consumers, server = account(released, 1e-5, result["unit"])
        assert (result["epsilon"], result["epsilon_server"]) == (consumers, server)
    assert example["epsilon_server"] < site["epsilon_server"]


def test_epsilon_as_json_has_all_that_went_in(fedge):
    result = as_json(fedge("epsilon", f"{EPSILON} --json"))
    assert result == {
        "noise_multiplier": 1.0,
        "sampling_rate": 0.1,
        "steps": 100,
        "fixed_size": False,
        "delta": 1e-5,
        "epsilon": epsilon([Release(1.0, 0.1, 100)], 1e-5),
        "epsilon_unamplified": epsilon([Release(1.0, 1.0, 100)], 1e-5),
        "accountant": "PLD",
    }


def test_a_fixed_size_costs_more_and_says_so(fedge):
    status, out, err = fedge("epsilon", f"{EPSILON} --fixed-size")
    assert (status, out) == (0, "14.0538\n")
    assert "RDP, where one is replaced" in err
    result = as_json(fedge("epsilon", f"{EPSILON} --fixed-size --json"))
    assert (result["fixed_size"], result["accountant"]) == (True, "RDP")


def test_without_sampling_there_is_one_reader(fedge):
    status, out, err = fedge("epsilon", "--noise-multiplier 4 --delta 1e-5")
    assert (status, out) == (0, "0.9263\n")
    assert "analytic" in err
    assert "server" not in err
    result = as_json(fedge("epsilon", "--noise-multiplier 4 --delta 1e-5 --json"))
    assert result["epsilon"] == result["epsilon_unamplified"]


def test_no_noise_has_no_epsilon(fedge):
    assert fedge("epsilon", "--noise-multiplier 0 --delta 1e-5")[:2] == (0, "inf\n")
    result = as_json(fedge("epsilon", "--noise-multiplier 0 --delta 1e-5 --json"))
    assert result["epsilon"] is None


@pytest.mark.parametrize(
    "options", [CALIBRATE, "--epsilon 1 --delta 1e-5", "--epsilon 0.3 --delta 1e-6 --steps 7"]
)
def test_calibrate_prints_noise_that_keeps_the_promise(fedge, options):
    status, out, err = fedge("calibrate", options)
    assert status == 0
    assert out == f"{float(out):.4f}\n"
    assert err.count("\n") == 1
    result = as_json(fedge("calibrate", f"{options} --json"))
    assert result["noise_multiplier"] == float(out)
    assert 0.997 * result["target"] < result["epsilon"] <= result["target"]
    # What is printed, given back as it stands, is within.
    again = f"--noise-multiplier {out.strip()} --sampling-rate {result['sampling_rate']} "
    spent = as_json(
        fedge("epsilon", f"{again} --steps {result['steps']} --delta {result['delta']} --json")
    )
    assert spent["epsilon"] == result["epsilon"]


@pytest.mark.parametrize(
    ("action", "options", "option"),
    [
        ("epsilon", "--noise-multiplier -1 --delta 1e-5", "--noise-multiplier: must be"),
        ("epsilon", "--noise-multiplier nan --delta 1e-5", "--noise-multiplier: must be"),
        ("epsilon", "--noise-multiplier one --delta 1e-5", "--noise-multiplier: invalid"),
        ("epsilon", "--noise-multiplier 1 --delta 1", "--delta: must be"),
        ("epsilon", "--noise-multiplier 1 --delta 0", "--delta: must be"),
        ("epsilon", "--noise-multiplier 1 --delta 1e-5 --steps 0", "--steps: must be"),
        ("epsilon", "--noise-multiplier 1 --delta 1e-5 --steps 1.5", "--steps: invalid"),
        ("epsilon", "--noise-multiplier 1 --delta 1e-5 --sampling-rate 2", "--sampling-rate: must"),
        ("epsilon", "--noise-multiplier 1", "--delta"),
        ("epsilon", "--noise 1 --delta 1e-5", "--noise-multiplier"),
        ("calibrate", "--epsilon 0 --delta 1e-5", "--epsilon: must be above 0"),
        ("calibrate", "--epsilon 1e-9 --delta 1e-5", "--epsilon: must be reachable"),
        ("calibrate", "--epsilon 1 --delta 1e-5 --sampling-rate 0", "--sampling-rate: must be"),
        ("calibrate", "--epsilon 1 --delta 1e-5 --fixed-size", "--fixed-size"),
        ("calibrate", f"{CALIBRATE} --unit person", "--unit: invalid"),
        ("", "", "ACTION"),
    ],
)
def test_bad_values_are_wrong_usage_in_one_line(fedge, action, options, option):
    status, out, err = fedge(action, options)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("FE-102 ")
    assert option in err
    assert " Remedy: " in err


def test_help_fits_a_screen(fedge, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for action in ("", "epsilon", "calibrate"):
        status, out, err = fedge(action, "--help")
        lines = out.splitlines()
        assert (status, err) == (0, "")
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        assert "example:" in lines


def test_help_of_all_commands_does_not_pay_for_it():
    code = (
        "import sys; import fedge.shared.commands.privacy; "
        "sys.exit(bool({'numpy', 'scipy', 'dp_accounting'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
