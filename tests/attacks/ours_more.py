"""More that a server may try on fedge's own sites, beside what has a counterpart in Flower; see ours.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from fedge.shared import protocol
from fedge.shared.roster.draft import entry_of
from fedge.shared.secagg import fixed_point, messages, transcript

from .deviant import Server
from .flower_parties import Outcome
from .ours import Attack, honest_round, joined, judged, said, until_masked
from .parties import BOUNDS, LAST, NAMES, TODAY, VICTIM, make_sites, private_key, roster_of

LOST: Final = "site-6"
_PUBLIC: Final = private_key(LOST).public_key().public_bytes_raw()
#: Points of small order on Curve25519 (RFC 7748, 6.1): 0, 1, and one of order 8.
_SMALL: Final = (
    bytes(32),
    bytes([1, *bytes(31)]),
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
)


def own_bundle_altered(home: Path) -> Attack:
    """The victim alone is told bundles in which its own has another key."""
    server = Server(make_sites(home)).begin()
    mine = server.group.bundles[VICTIM]
    changed = server.group.bundles | {VICTIM: replace(mine, mask_key=bytes(range(32)))}
    server.share(
        lambda site, values: {messages.BUNDLES: joined(changed)} if site == VICTIM else values
    )
    return _told("own-bundle-altered", server, {messages.SHARE: 1})


def unknown_site(home: Path) -> Attack:
    """A site with a key of its own takes part, which no roster holds."""
    server = Server(make_sites(home, known=roster_of(NAMES[:5]))).begin().share()
    return _told("unknown-site", server, {messages.SHARE: 6})


def revoked_site(home: Path) -> Attack:
    """A site takes part whose entry the roster revokes."""
    known = roster_of(NAMES, site_6=replace(entry_of(_PUBLIC, LAST), revoked=True))
    server = Server(make_sites(home, known=known)).begin().share()
    return _told("revoked-site", server, {messages.SHARE: 6})


def expired_site(home: Path) -> Attack:
    """A site takes part whose last day was yesterday."""
    known = roster_of(NAMES, site_6=entry_of(_PUBLIC, TODAY.replace(month=5, day=31)))
    server = Server(make_sites(home, known=known)).begin().share()
    return _told("expired-site", server, {messages.SHARE: 6})


def two_bundles_of_one_site(home: Path) -> Attack:
    """One site stands in the bundles twice."""
    return _bundles("two-bundles-of-one-site", home, lambda b: [b[0], *b])


def unsorted_bundles(home: Path) -> Attack:
    """The bundles in another order, of which the transcript would be another."""
    return _bundles("unsorted-bundles", home, lambda b: b[::-1])


def small_cohort(home: Path) -> Attack:
    """Four sites, where each site's policy asks for five."""
    server = Server(make_sites(home)).begin(NAMES[:4]).share()
    return _told("small-cohort", server, {messages.SHARE: 4})


def small_order_keys(home: Path) -> Attack:
    """A site in league with the server signs keys with which every agreement gives zero."""
    servers = []
    for field in ("encryption_key", "mask_key"):
        for number, point in enumerate(_SMALL):
            server = Server(make_sites(home / f"{field}-{number}"))
            server.begin(requests=None)
            group = server.group
            weak = replace(group.bundles[LOST], **{field: point})
            signed = transcript.new_advertisement(
                group.attempt, LOST, weak.encryption_key, weak.mask_key, private_key(LOST)
            )
            told = {messages.BUNDLES: joined(group.bundles | {LOST: signed})}
            del server.sites[LOST], group.bundles[LOST]
            server.share(lambda *_, told=told: told)
            servers.append(server)
    return judged("small-order-keys", said(servers[0]), tuple(servers), {messages.SHARE: 5 * 6})


def split_sharers(home: Path) -> Attack:
    """Three sites hear that all have shared, two that one has not; all hear of one list of survivors."""
    server = Server(make_sites(home)).begin().share()
    fewer = NAMES[3:5]

    def split(site: str, values: dict[str, Any]) -> dict[str, Any]:
        if site not in fewer:
            return values
        told = messages.sharers_of(messages.record(values))
        return {messages.SHARERS: messages.joined([s for s in told if s.site != LOST])}

    server.masked(split)
    server.group.survivors.remove(LOST)
    server.commit().unmask()
    return _told("split-sharers", server, {messages.UNMASK: 5})


def split_model(home: Path) -> Attack:
    """Half of the sites are sent another model, from which one update could be told from the others."""
    server = Server(make_sites(home))
    other = server.train_request()
    first = next(iter(server.weights))
    server.weights[first] = server.weights[first] + np.float32(2**-20)
    server.begin(requests=dict.fromkeys(NAMES[:3], other)).share()
    return _told("split-model", server, {messages.SHARE: 6})


def split_clip(home: Path) -> Attack:
    """One site is told another clipping bound."""
    return _split("split-clip", home, clipping_bound=1.0)


def split_cap(home: Path) -> Attack:
    """One site is told another weight cap."""
    return _split("split-cap", home, weight_cap=1)


def survivor_lists(home: Path) -> Attack:
    """Survivors without oneself, with one who did not share, with one who does not exist."""
    server = Server(make_sites(home)).begin()
    server.share()
    del server.group.sharers[LOST]
    server.masked()
    lists = {
        NAMES[0]: NAMES[1:],
        NAMES[1]: NAMES,
        NAMES[2]: (*NAMES[:5], "site-7"),
        NAMES[3]: NAMES[:4],
        NAMES[4]: (),
    }
    server.commit(lambda site, _: {messages.SURVIVORS: transcript.pack_sites(lists[site])})
    return _told("survivor-lists", server, {messages.COMMIT: 5})


def steps_out_of_order(home: Path) -> Attack:
    """A step is left out, taken twice with other content, or taken again after the next."""
    skipped = Server(make_sites(home / "a")).begin().share()
    skipped.group.survivors = list(NAMES)
    skipped.commit()
    twice = Server(make_sites(home / "b")).begin().share()
    twice.share(lambda *_: {"more": 1})
    back = until_masked(home / "c").share()
    return judged(
        "steps-out-of-order",
        f"left out: {said(skipped)}; twice with other content: {said(twice)}; "
        f"again after the next: {said(back)}",
        (skipped, twice, back),
        {messages.COMMIT: 6, messages.SHARE: 12},
    )


def garbage(home: Path) -> Attack:
    """Bytes that are no list, lists without end, other types, nothing at all."""
    made: dict[str, Any] = {
        NAMES[0]: b"\xff" * 1000,
        NAMES[1]: bytes(protocol.MAX_SITES * 256 + 1),
        NAMES[2]: bytes(protocol.MAX_SITES * 256),
        NAMES[3]: 7,
        NAMES[4]: b"",
        NAMES[5]: [b"\x06site-1"],
    }
    servers = []
    for kind, key in (
        (messages.SHARE, messages.BUNDLES),
        (messages.MASKED, messages.SHARERS),
        (messages.COMMIT, messages.SURVIVORS),
        (messages.UNMASK, messages.SIGNATURES),
    ):
        server = Server(make_sites(home / kind)).begin()
        before = messages.STEPS.index(kind)
        for step in (server.share, server.masked, server.commit)[:before]:
            step()
        for site in NAMES:
            server.tell(site, kind, {key: made[site]})
        servers.append(server)
    due = dict.fromkeys(messages.STEPS, 6)
    return judged("garbage", f"each step: {said(servers[0])}", tuple(servers), due)


def second_sum_after_signing(home: Path) -> Attack:
    """All sign the survivors, some are asked for shares, all for a second sum of the round without the victim."""
    first = until_masked(home).commit()
    first.group.survivors = [*NAMES[:2], VICTIM]
    first.unmask()
    rest = {n: s for n, s in first.sites.items() if n != VICTIM}
    second = Server(rest, attempt=2).begin()
    return judged(
        "second-sum-after-signing",
        f"asked for a second sum: {said(second)}",
        (second,),
        {protocol.TRAIN: len(rest)},
    )


def another_run(home: Path) -> Attack:
    """The same work under another run's name, over all but the victim, and the difference of the two sums."""
    first = honest_round(home)
    rest = {n: s for n, s in first.sites.items() if n != VICTIM}
    second = Server(rest, run_id="run-2").begin().share().masked().commit().unmask()
    apart = first.opened()[0] - second.opened()[0]
    off = np.abs(apart - first.plain(VICTIM)).max() * fixed_point.scale(
        BOUNDS.value_bound, len(NAMES)
    )
    found = "succeeds" if off < 2 * len(NAMES) and not second.refusals else "refused"
    how = (
        f"{len(second.refusals)} raised, and the difference of the two sums is the victim's weighted update to "
        f"{'a few' if found == 'succeeds' else 'many'} quantisation steps: what two sums over "
        "almost the same sites tell, only differential privacy bounds"
    )
    return Attack(Outcome("another-run-without-the-victim", found, how), (first, second))


MORE: Final[tuple[Callable[[Path], Attack], ...]] = (
    own_bundle_altered,
    unknown_site,
    revoked_site,
    expired_site,
    two_bundles_of_one_site,
    unsorted_bundles,
    small_cohort,
    small_order_keys,
    split_sharers,
    split_model,
    split_clip,
    split_cap,
    survivor_lists,
    steps_out_of_order,
    garbage,
    second_sum_after_signing,
    another_run,
)


def _told(name: str, server: Server, due: dict[str, int]) -> Attack:
    return judged(name, said(server), (server,), due)


def _bundles(name: str, home: Path, change: Callable[[list[Any]], list[Any]]) -> Attack:
    server = Server(make_sites(home)).begin()
    listed = change(list(server.group.bundles.values()))
    server.share(lambda *_: {messages.BUNDLES: messages.joined(listed)})
    return _told(name, server, {messages.SHARE: 6})


def _split(name: str, home: Path, **other: float) -> Attack:
    server = Server(make_sites(home))
    server.begin(requests={VICTIM: server.train_request(**other)}).share()
    return _told(name, server, {messages.SHARE: 6})
