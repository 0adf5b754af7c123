"""`fedge privacy`: what noise is worth, how much of it a budget asks for, and what a site has spent."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from typing import TYPE_CHECKING, Any, Final

from fedge.shared.cli.command import Command
from fedge.shared.commands import privacy_ledger, privacy_restore

if TYPE_CHECKING:
    from fedge.shared.privacy.accounting.epsilon import Release

_EXAMPLE: Final = (
    "example:\n"
    "  fedge privacy epsilon --noise-multiplier 1 --sampling-rate 0.1 \\\n    --steps 100 --delta 1e-5\n"
    "  fedge privacy calibrate --epsilon 1 --sampling-rate 0.1 \\\n    --steps 100 --delta 1e-5"
)
#: Of what is printed; a noise multiplier is rounded up to it.
_DECIMALS: Final = 4


def _arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    epsilon = _action(
        actions, "epsilon", "what releases with this much noise cost", "--noise-multiplier 1"
    )
    epsilon.add_argument(
        "--noise-multiplier", metavar="Z", type=float, required=True,
        help="standard deviation of the noise over the L2 sensitivity",
    )  # fmt: skip
    epsilon.add_argument(
        "--fixed-size",
        action="store_true",
        help="samples of a fixed size (default: by a coin for each)",
    )
    calibrate = _action(
        actions, "calibrate", "the least noise that keeps within epsilon", "--epsilon 1"
    )
    calibrate.add_argument("--epsilon", metavar="E", type=float, required=True, help="above 0")
    for action in (epsilon, calibrate):
        action.add_argument("--delta", metavar="D", type=float, required=True, help="as 1e-5")
        action.add_argument(
            "--sampling-rate", metavar="Q", type=float, default=1.0,
            help="chance to be in a step's sample (default: 1)",
        )  # fmt: skip
        action.add_argument(
            "--steps", metavar="T", type=int, default=1, help="how many releases (default: 1)"
        )
        action.add_argument(
            "--unit", choices=("example", "site"),
            help="what is sampled (default: tell of both)",
        )  # fmt: skip
        action.add_argument("--json", action="store_true", help="print one JSON object")
    privacy_ledger.add(actions)
    privacy_restore.add(actions)


def _action(actions: Any, name: str, text: str, first: str) -> ArgumentParser:
    made: ArgumentParser = actions.add_parser(
        name,
        help=text,
        description=f"{text[:1].upper()}{text[1:]}.",
        epilog=f"example:\n  fedge privacy {name} {first} --delta 1e-5 \\\n    --sampling-rate 0.1 --steps 100",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return made


def _run(arguments: Namespace) -> int:
    import json
    import sys

    from fedge.shared.errors import UsageError

    if arguments.action == "ledger":
        return privacy_ledger.run(arguments)
    if arguments.action == "restore":
        return privacy_restore.run(arguments)
    try:
        result = _epsilon(arguments) if arguments.action == "epsilon" else _calibrate(arguments)
    except ValueError as error:
        name, _, rest = str(error).partition(":")
        raise UsageError(102, f"--{name.replace('_', '-')}:{rest}") from None
    if arguments.unit:
        # The server sees which sites are sampled, and as little as anybody else which examples.
        seen = "epsilon_unamplified" if arguments.unit == "site" else "epsilon"
        result |= {"unit": arguments.unit, "epsilon_server": result[seen]}
    if arguments.json:
        sys.stdout.write(json.dumps({key: _finite(value) for key, value in result.items()}) + "\n")
        return 0
    wanted = "epsilon" if arguments.action == "epsilon" else "noise_multiplier"
    sys.stdout.write(f"{result[wanted]:.{_DECIMALS}f}\n")
    sys.stderr.write(_words(result) + "\n")
    return 0


def _epsilon(arguments: Namespace) -> dict[str, Any]:
    from fedge.shared.privacy.accounting.epsilon import Release

    release = Release(
        arguments.noise_multiplier, arguments.sampling_rate, arguments.steps, arguments.fixed_size
    )
    return _shown(release, arguments.delta)


def _calibrate(arguments: Namespace) -> dict[str, Any]:
    from fedge.shared.privacy.accounting.epsilon import Release, calibrate, epsilon

    rate, steps, delta = arguments.sampling_rate, arguments.steps, arguments.delta
    unit = 10**_DECIMALS
    # Upwards, and once more where the grid of PLD, finer with more noise, still leaves the printed figure above.
    printed = -int(-calibrate(arguments.epsilon, delta, rate, steps) * unit // 1)
    while epsilon([Release(printed / unit, rate, steps)], delta) > arguments.epsilon:
        printed += 1
    return {"target": arguments.epsilon, **_shown(Release(printed / unit, rate, steps), delta)}


def _shown(release: Release, delta: float) -> dict[str, Any]:
    from fedge.shared.privacy.accounting.epsilon import accountant, epsilon, unamplified

    return {
        "noise_multiplier": release.noise_multiplier,
        "sampling_rate": release.sampling_rate,
        "steps": release.steps,
        "fixed_size": release.fixed_size,
        "delta": delta,
        "epsilon": epsilon([release], delta),
        "epsilon_unamplified": epsilon(unamplified([release]), delta),
        "accountant": accountant([release]),
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity: null stands for no bound at all."""
    return None if value == float("inf") else value


def _words(result: dict[str, Any]) -> str:
    who = "one is replaced" if result["accountant"] == "RDP" else "one takes part or not"
    server = (
        f"{result['epsilon_unamplified']:.{_DECIMALS}f} for the server, which sees who was sampled"
    )
    if result["sampling_rate"] == 1:
        readers = "whoever reads the results"
    elif result.get("unit") == "example":
        readers = "whoever reads the results, the server too"
    elif result.get("unit") == "site":
        readers = f"whoever reads the results alone; {server}"
    else:
        readers = (
            f"whoever reads the results alone; with unit site {server}; "
            "with unit example the server's is the same"
        )
    return (
        f"epsilon {result['epsilon']:.{_DECIMALS}f} at delta {result['delta']:g}, {result['accountant']}, where {who}: "
        f"for {readers}"
    )


COMMAND = Command(
    summary="compute what noise is worth, and show what is spent",
    extra="train",
    arguments=_arguments,
    run=_run,
    epilog=_EXAMPLE,
)
