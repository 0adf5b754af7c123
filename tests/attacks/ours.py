"""A server that deviates, against fedge's own sites: what happened, measured.

Each function runs one attack on six fresh sites, of which site-3 is the victim, and tells what came of it. The names
are those of the attacks on Flower's SecAgg+ in flower_secagg.py. An attack is refused when every site that was told
something else than an honest server tells raised, and no share of the victim came out by it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.shared import protocol
from fedge.shared.secagg import key_agreement, messages, transcript
from fedge.shared.secagg.messages import Sharer
from fedge.shared.secagg.transcript import KeyAdvertisement

from .deviant import Refusal, Server
from .flower_parties import Outcome
from .parties import NAMES, VICTIM, make_sites

REST: Final = tuple(name for name in NAMES if name != VICTIM)


@dataclass(frozen=True)
class Attack:
    """An attack that was run.

    Args:
        outcome: what came of it.
        servers: what it used, with every refusal; the last one is where it ended.
    """

    outcome: Outcome
    servers: tuple[Server, ...]

    @property
    def refusals(self) -> list[Refusal]:
        """All sites that raised, in order."""
        return [refusal for server in self.servers for refusal in server.refusals]


def honest_round(home: Path) -> Server:
    """No attack."""
    return Server(make_sites(home)).begin().share().masked().commit().unmask()


def active_and_dead(home: Path) -> Attack:
    """The victim stands in the list of survivors twice; then in a first list, and not in a second one."""
    twice = until_masked(home / "a")
    listed = ",".join(sorted([*NAMES, VICTIM])).encode()
    twice.commit(lambda *_: {messages.SURVIVORS: listed})
    again = until_masked(home / "b").commit()
    again.commit(lambda *_: {messages.SURVIVORS: transcript.pack_sites(REST)})
    again.unmask()
    return judged(
        "active-and-dead",
        f"a list that names the victim twice: {said(twice)}; a second list without it: "
        f"{said(again, messages.COMMIT)}, and after it nobody unmasks",
        (twice, again),
        due={messages.COMMIT: 6 + 6, messages.UNMASK: 6},
    )


def swapped_key(home: Path) -> Attack:
    """The server puts a key of its own in place of the victim's box key, and of its peers' in the victim's list."""
    server = Server(make_sites(home)).begin()

    def swap(site: str, values: object) -> dict[str, bytes]:
        return {
            messages.BUNDLES: messages.joined(
                [
                    replace(b, encryption_key=key_agreement.Pair.generate().public)
                    if (b.site == VICTIM) != (site == VICTIM)
                    else b
                    for b in server.group.bundles.values()
                ]
            )
        }

    server.share(swap)
    return judged(
        "swapped-key",
        f"the bundles are signed with the roster's keys, which the server has not: {said(server)}",
        (server,),
        due={messages.SHARE: len(NAMES)},
    )


def two_survivor_lists(home: Path) -> Attack:
    """Half of the sites hear that the victim is alive, half that it is dead; no list contradicts itself."""
    server = until_masked(home)
    half = NAMES[3:]
    without = {messages.SURVIVORS: transcript.pack_sites(REST)}
    server.commit(lambda site, values: without if site in half else values)
    signed = len(server.group.signatures)
    server.unmask()
    return judged(
        "two-survivor-lists",
        f"{signed} sites signed, 3 each list; asked to unmask with all {signed} signatures, where "
        f"{server.group.threshold} on one list are due: {said(server)}",
        (server,),
        due={messages.UNMASK: len(NAMES)},
    )


def replayed_round_or_attempt(home: Path) -> Attack:
    """Old bundles, boxes and signatures in a new attempt; then the round once more without the victim."""
    sites = make_sites(home)
    old = Server(sites).begin().share().masked()
    bundles = Server(sites, attempt=2).begin()
    bundles.share(
        lambda site, _: {messages.BUNDLES: joined({**old.group.bundles, **_of(site, bundles)})}
    )
    encrypted_shares = Server(sites, attempt=3).begin().share()
    encrypted_shares.group.encrypted_shares[VICTIM] = old.group.encrypted_shares[VICTIM]
    encrypted_shares.masked()
    signatures = Server(sites, attempt=4).begin().share()
    signatures.masked(
        lambda site, _: {
            messages.SHARERS: joined(
                {s.site: s for s in _sharers(old, site)}
                | {s.site: s for s in _sharers(signatures, site) if s.site == site}
            )
        }
    )
    last = Server(sites, attempt=5).begin().share().masked().commit().unmask()
    again = Server({n: sites[n] for n in REST}, attempt=6).begin()
    return judged(
        "replayed-round-or-attempt",
        f"old bundles: {said(bundles)}; the victim's old boxes: {said(encrypted_shares)}; "
        f"old signatures: {said(signatures)}; "
        f"the round once more without the victim, after its sum was opened: {said(again)} "
        "(under another run's name: the last row of the next table)",
        (old, bundles, encrypted_shares, signatures, last, again),
        due={messages.SHARE: 6, messages.MASKED: 5 + 6, protocol.TRAIN: 5},
        opened=(last,),
    )


def edited_roster(home: Path) -> Attack:
    """Four sites that do not exist join the bundles, signed with keys of the server's."""
    server = Server(make_sites(home)).begin()
    invented = [
        transcript.new_advertisement(
            server.group.attempt,
            f"site-{number}",
            key_agreement.Pair.generate().public,
            key_agreement.Pair.generate().public,
            Ed25519PrivateKey.generate(),
        )
        for number in (6001, 6002, 6003, 6004)
    ]
    listed = sorted([*server.group.bundles.values(), *invented], key=lambda b: b.site)
    server.share(lambda *_: {messages.BUNDLES: messages.joined(listed)})
    return judged(
        "edited-roster",
        f"each site asks the roster that its owner installed: {said(server)}",
        (server,),
        due={messages.SHARE: len(NAMES)},
    )


def lowered_threshold(home: Path) -> Attack:
    """The server announces a threshold of 1, lists two survivors, and unmasks with fewer signatures than are due."""
    server = Server(make_sites(home)).begin()
    server.share(lambda *_: {"threshold": 1}).masked()
    few = (NAMES[0], VICTIM)
    server.commit(
        lambda site, values: (
            {messages.SURVIVORS: transcript.pack_sites(few)} if site in few else values
        )
    )
    server.group.survivors = [n for n in NAMES if n not in few]
    server.unmask()
    return judged(
        "lowered-threshold",
        "no message says a threshold, each site computes it (5 of 6); two survivors: "
        f"{said(server, messages.COMMIT)}; 4 signatures: {said(server, messages.UNMASK)}",
        (server,),
        due={messages.COMMIT: 2, messages.UNMASK: 4},
    )


def flipped_box_bit(home: Path) -> Attack:
    """One bit of the box from the victim to site-1 is flipped on the way."""
    server = Server(make_sites(home)).begin().share()
    encrypted_share = bytearray(server.group.encrypted_shares[VICTIM][NAMES[0]])
    encrypted_share[len(encrypted_share) // 2] ^= 1
    server.group.encrypted_shares[VICTIM][NAMES[0]] = bytes(encrypted_share)
    server.masked().commit().unmask()
    return judged(
        "flipped-box-bit",
        f"{said(server)}; the other {len(server.group.survivors)} went on, and their sum was {opened_as(server)}",
        (server,),
        due={messages.MASKED: 1},
        opened=(server,),
    )


def second_unmask(home: Path) -> Attack:
    """After an honest unmask the sites are asked again: other signatures, another list, another attempt."""
    server = honest_round(home / "a")
    rest = {messages.SURVIVORS: transcript.pack_sites(REST)}
    fewer = [messages.Signed(n, s) for n, s in sorted(server.group.signatures.items())][:5]
    server.unmask(lambda *_: {messages.SIGNATURES: messages.joined(fewer)})
    lists = honest_round(home / "b").commit(lambda *_: rest).unmask()
    attempt = Server(server.sites, attempt=2).begin()
    return judged(
        "second-unmask",
        f"other signatures: {said(server)}; another list: {said(lists, messages.COMMIT)}; another attempt: "
        f"{said(attempt)}; each site had given one share of the victim, all of one kind",
        (server, lists, attempt),
        due={
            messages.UNMASK: 2 * len(NAMES),
            messages.COMMIT: len(NAMES),
            protocol.TRAIN: len(NAMES),
        },
        opened=(server, lists),
    )


ATTACKS: Final[tuple[Callable[[Path], Attack], ...]] = (
    active_and_dead,
    swapped_key,
    two_survivor_lists,
    replayed_round_or_attempt,
    edited_roster,
    lowered_threshold,
    flipped_box_bit,
    second_unmask,
)


def opened_as(server: Server) -> str:
    """Whether the sum is right, in words."""
    return "right" if server.is_right() else "wrong"


def said(server: Server, kind: str | None = None) -> str:
    """Who raised what, in few words."""
    found = Counter(
        (r.code, r.peer) for r in server.refusals if kind is None or r.kind == kind
    ).most_common()
    if not found:
        return "nobody raised"
    return ", ".join(
        f"{count} of {len(server.sites)} raised FE-{code}{f' naming {peer}' if peer else ''}"
        for (code, peer), count in found
    )


def until_masked(home: Path) -> Server:
    return Server(make_sites(home)).begin().share().masked()


def _of(site: str, server: Server) -> dict[str, KeyAdvertisement]:
    return {site: server.group.bundles[site]}


def _sharers(server: Server, site: str) -> list[Sharer]:
    return messages.sharers_of(messages.record(server.group.masked_values(site)))


def joined(items: Mapping[str, KeyAdvertisement | Sharer]) -> bytes:
    return messages.joined([items[name] for name in sorted(items)])


def judged(
    name: str,
    how: str,
    servers: tuple[Server, ...],
    due: Mapping[str, int],
    opened: tuple[Server, ...] = (),
) -> Attack:
    """The verdict: refused where as many raised as were lied to, and the victim's secrets stayed where they were.

    Args:
        name: of the attack.
        how: what happened.
        servers: that it used.
        due: refusals by message type.
        opened: servers that opened an honest sum too, and so hold one share of the victim a site, all of one kind.
    """
    raised = Counter(r.kind for server in servers for r in server.refusals)
    out = sum(server.shares_given(VICTIM) for server in servers if server not in opened)
    refused = raised == Counter(due) and not out
    words = f"{how}; {out} shares of the victim came out by it"
    return Attack(Outcome(name, "refused" if refused else "succeeds", words), servers)


# Faults, under their names in flower_faults.py: refused where the fault neither changed nor ended the round.


def nan_update(home: Path) -> Attack:
    """A fault: a column of the victim's data is NaN, and its training makes NaN of its weights."""
    sites = make_sites(home)
    sites[VICTIM].learner.data.train_features[:, 0] = np.nan
    server = Server(sites).begin().share().masked().commit().unmask()
    return judged(
        "nan-update",
        f"{said(server)} before any key of it went out; the sum over the other {len(server.group.survivors)} was "
        f"{opened_as(server)}",
        (server,),
        due={protocol.TRAIN: 1},
        opened=(server,),
    )


def dropout_before_upload(home: Path) -> Attack:
    """A fault: the victim is gone before its vector is, at each place where it can be."""
    sites = make_sites(home)
    early = Server({n: sites[n] for n in REST}).begin().share().masked().commit().unmask()
    heard = [f"1 before exchange 1: the sum over the other 5 was {opened_as(early)}"]
    servers = [early]
    for number, place in enumerate(("share", "masked"), start=2):
        server = Server(sites, server_round=number).begin()
        if place == "share":
            # Its reply is lost; the others go on without it.
            server.share()
            del server.group.sharers[VICTIM], server.group.encrypted_shares[VICTIM]
            server.masked()
        else:
            server.share().masked(skip=VICTIM)
        server.commit().unmask()
        heard.append(f"1 at {place}: the sum over the other 5 was {opened_as(server)}")
        servers.append(server)
    right = all(text.endswith("right") for text in heard)
    return Attack(
        Outcome("dropout-before-upload", "refused" if right else "succeeds", "; ".join(heard)),
        tuple(servers),
    )


FAULTS: Final[tuple[Callable[[Path], Attack], ...]] = (nan_update, dropout_before_upload)
