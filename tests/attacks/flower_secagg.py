"""A server that deviates, against Flower's own SecAgg+ clients: what happened, measured.

Each function runs one attack (or fault) on six fresh clients, of which number 3 is the victim, and tells what came of
it. "succeeds" means that the server had the victim's update to within one quantisation step for each vector that the
recovery used, or, for a fault, that it changed or ended the round. Nothing is concluded from reading Flower's code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Final

from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_separate
from flwr.supercore.primitives.asymmetric import (
    bytes_to_public_key,
    generate_key_pairs,
    public_key_to_bytes,
)

from .flower_faults import dropout_before_upload, nan_update
from .flower_parties import (
    MODULUS,
    VICTIM,
    Outcome,
    Pool,
    Refused,
    Server,
    Site,
    Vector,
    decode,
    honest_end,
    make_sites,
    own_secrets,
    recover,
    steps_off,
    total,
    true_sum,
    until_masked,
)

#: Flower's releases on which this was measured; what it calls is the same in both, byte for byte.
MEASURED: Final = ("1.41", "1.42")


def honest_round(seed: int) -> tuple[float, float, int]:
    """No attack, no drop: the sum's largest error in quantisation steps, the examples found, and the true number."""
    server = Server(make_sites(seed))
    _, masked = until_masked(server)
    examples, found = decode(total(masked, server.unmask(server.sites)), len(masked))
    true = sum(site.examples for site in server.sites.values())
    return steps_off(found, true_sum(server.sites.values())), examples, true


def active_and_dead(seed: int) -> Outcome:
    """The victim stands in both lists of the unmask stage, so each client sends both of its shares."""
    server = Server(make_sites(seed))
    keys, masked = until_masked(server)
    pool = server.unmask(server.sites, dead=[VICTIM])
    return _recovered(
        "active-and-dead",
        server.sites[VICTIM],
        recover(masked[VICTIM], VICTIM, *own_secrets(pool), keys),
        "all 6 clients answered one list pair that names the victim twice, and raised nothing",
    )


def swapped_key(seed: int) -> Outcome:
    """The server puts a key of its own in place of the victim's and its peers' box keys, and re-encrypts."""
    server = Server(make_sites(seed))
    keys = server.setup()
    own, public = generate_key_pairs()
    lists = {n: keys | {VICTIM: [keys[VICTIM][0], public_key_to_bytes(public)]} for n in keys}
    # A list with two equal keys is refused, so every peer gets a key of its own in the victim's list.
    fakes = {n: generate_key_pairs() for n in keys if n != VICTIM}
    lists[VICTIM] = keys | {
        n: [keys[n][0], public_key_to_bytes(pair[1])] for n, pair in fakes.items()
    }
    boxes = server.share_keys(lists)
    pool: Pool = {}
    for peer, (private, _) in fakes.items():
        near = generate_shared_key(private, bytes_to_public_key(keys[VICTIM][1]))
        far = generate_shared_key(own, bytes_to_public_key(keys[peer][1]))
        plain = decrypt(near, boxes[VICTIM, peer])
        _, _, b, s = share_keys_plaintext_separate(plain)
        pool.setdefault((VICTIM, "b"), []).append(b)
        pool.setdefault((VICTIM, "s"), []).append(s)
        boxes[VICTIM, peer] = encrypt(far, plain)
        boxes[peer, VICTIM] = encrypt(near, decrypt(far, boxes[peer, VICTIM]))
    masked = server.collect(boxes)
    mine = recover(masked[VICTIM], VICTIM, *own_secrets(pool), keys)
    right = honest_end(server, masked)
    return _recovered(
        "swapped-key",
        server.sites[VICTIM],
        mine,
        "box keys replaced both ways, all boxes to and from the victim read and re-encrypted; no client raised, "
        f"the honest unmask followed and the sum was {right}",
    )


def two_survivor_lists(seed: int) -> Outcome:
    """Half of the clients hear that the victim is alive, half that it is dead; no list contradicts itself."""
    said = []
    for threshold in (4, 3):
        server = Server(make_sites(seed), threshold)
        keys, masked = until_masked(server)
        alive = list(server.sites)
        pool: Pool = {}
        for node in alive[:3]:
            server.unmask_from(node, alive, [], pool)
        for node in alive[3:]:
            server.unmask_from(node, [n for n in alive if n != VICTIM], [VICTIM], pool)
        got = len(pool[VICTIM, "b"]), len(pool[VICTIM, "s"])
        said.append(f"threshold {threshold}: all answered, {got[0]} and {got[1]} shares")
    return _recovered(
        "two-survivor-lists",
        server.sites[VICTIM],
        recover(masked[VICTIM], VICTIM, *own_secrets(pool), keys),
        f"{said[0]}, one of each too few; {said[1]}, enough (the server sets the threshold)",
    )


def replayed_round_or_attempt(seed: int) -> Outcome:
    """Old messages again; then the whole round once more without the victim, and the difference of the two sums."""
    server = Server(make_sites(seed))
    server.setup()
    boxes = server.share_keys()
    masked = server.collect(boxes)
    refused = [_refusal(lambda: server.collect_from(1, boxes))]
    first = total(masked, server.unmask(server.sites))
    old = dict(server.keys)

    rest = {node: site for node, site in server.sites.items() if node != VICTIM}
    again = Server(rest)
    again.setup()
    refused.append(_refusal(lambda: again.share_keys(dict.fromkeys(rest, old))))
    again.share_keys()
    stale = {pair: box for pair, box in boxes.items() if VICTIM not in pair}
    refused.append(_refusal(lambda: again.collect(stale)))
    again.setup()
    again_masked = again.collect(again.share_keys())
    second = total(again_masked, again.unmask(rest))
    apart = [(a - b) % MODULUS for a, b in zip(first, second, strict=True)]
    return _recovered(
        "replayed-round-or-attempt",
        server.sites[VICTIM],
        apart,
        f"old messages were refused (vector twice: {refused[0]}; old keys: {refused[1]}; old boxes: {refused[2]}), but "
        "the same round of the same run, asked again without the victim, was answered by all with the same updates, "
        "and one sum less the other is the victim's",
        vectors=len(masked) + len(rest),
    )


def edited_roster(seed: int) -> Outcome:
    """Four clients that do not exist join the key list, take their shares, and are gone before any mask is made."""
    sites = make_sites(seed)
    server = Server(sites, threshold=4, shares=len(sites) + 4)
    keys = server.setup()
    invented = {node: (generate_key_pairs(), generate_key_pairs()) for node in (101, 102, 103, 104)}
    public = {n: [public_key_to_bytes(p[1]) for p in pairs] for n, pairs in invented.items()}
    boxes = server.share_keys(dict.fromkeys(sites, keys | public))
    masked = server.collect({pair: box for pair, box in boxes.items() if pair[1] in sites})
    found = {}
    for node in sites:
        pool: Pool = {}
        for fake, (_, (private, _)) in invented.items():
            shared = generate_shared_key(private, bytes_to_public_key(keys[node][1]))
            parts = share_keys_plaintext_separate(decrypt(shared, boxes[node, fake]))
            pool.setdefault((node, "b"), []).append(parts[2])
            pool.setdefault((node, "s"), []).append(parts[3])
        found[node] = recover(masked[node], node, *own_secrets(pool, node), keys)
    worst = max(steps_off(decode(found[node])[1], site.weighted) for node, site in sites.items())
    right = honest_end(server, masked)
    return _recovered(
        "edited-roster",
        sites[VICTIM],
        found[VICTIM],
        "Flower has no roster, a client takes any key list: four invented clients were given shares by all, nobody "
        f"raised, and the server had {'all six updates' if worst <= 1 else 'not all updates'} before the unmask "
        f"stage; the sum was {right}",
    )


def lowered_threshold(seed: int) -> Outcome:
    """The server announces a threshold of 1: every share is the secret, and two clients' replies open the victim."""
    sites = make_sites(seed)
    server = Server(sites, threshold=1)
    keys, masked = until_masked(server)
    pool: Pool = {}
    server.unmask_from(1, list(sites), [], pool)
    server.unmask_from(2, [n for n in sites if n != VICTIM], [VICTIM], pool)
    for threshold in (0, -5):
        until_masked(Server(make_sites(seed), threshold))
    return _recovered(
        "lowered-threshold",
        sites[VICTIM],
        recover(masked[VICTIM], VICTIM, *own_secrets(pool), keys),
        "all accepted a threshold of 1 (and of 0 and -5) for 6 sites; one share of the victim's "
        "self-mask seed from client 1 and one of its mask key from client 2 were the secrets themselves",
    )


def flipped_box_bit(seed: int) -> Outcome:
    """One bit of the box from the victim to client 1 is flipped on the way."""
    server = Server(make_sites(seed))
    server.setup()
    boxes = server.share_keys()
    box = bytearray(boxes[VICTIM, 1])
    box[len(box) // 2] ^= 1
    boxes[VICTIM, 1] = bytes(box)
    text = _refusal(lambda: server.collect_from(1, boxes))
    fine = [server.collect_from(node, boxes) for node in server.sites if node != 1]
    named = "names" if str(VICTIM) in text else "does not name"
    return Outcome(
        "flipped-box-bit",
        "refused" if text else "succeeds",
        f"client 1 raised {text or 'nothing'}, which {named} the sender; the other {len(fine)} went on",
    )


def second_unmask(seed: int) -> Outcome:
    """After an honest unmask, the same clients are asked again with the victim as dead; then after a new setup."""
    server = Server(make_sites(seed))
    until_masked(server)
    pool = server.unmask(server.sites)
    rest = [node for node in server.sites if node != VICTIM]
    texts = {_refusal(lambda n=node: server.unmask_from(n, rest, [VICTIM], pool)) for node in rest}
    server.setup()
    texts.add(_refusal(lambda: server.unmask_from(1, rest, [VICTIM], pool)))
    handed = len(pool.get((VICTIM, "s"), []))
    return Outcome(
        "second-unmask",
        "succeeds" if handed else "refused",
        f"{handed} shares of the victim's mask key came out; said: {'; '.join(sorted(texts))}",
    )


ATTACKS: Final[tuple[Callable[[int], Outcome], ...]] = (
    active_and_dead,
    swapped_key,
    two_survivor_lists,
    replayed_round_or_attempt,
    edited_roster,
    lowered_threshold,
    flipped_box_bit,
    second_unmask,
    nan_update,
    dropout_before_upload,
)


def run_all(seed: int = 0) -> list[Outcome]:
    """All attacks and faults, each on fresh clients."""
    return [run(attack, seed) for attack in ATTACKS]


def run(attack: Callable[[int], Outcome], seed: int) -> Outcome:
    """One attack; where a client raises and the attack has no use for that, it is refused."""
    try:
        return attack(seed)
    except Refused as error:
        name = attack.__name__.replace("_", "-")
        return Outcome(name, "refused", f"a client raised {error}")


def table(outcomes: Iterable[Outcome]) -> str:
    """The outcomes as a Markdown table, with Flower's version."""
    head = f"| attack | Flower {version('flwr')} | what happened |\n|---|---|---|\n"
    return head + "".join(f"| {o.name} | {o.verdict} | {o.what_happened} |\n" for o in outcomes)


def _recovered(name: str, site: Site, vector: Vector, how: str, vectors: int = 1) -> Outcome:
    """The verdict on a vector that ought to be ``site``'s, to one step for each vector it was made from."""
    examples, found = decode(vector)
    error = steps_off(found, site.weighted)
    if error > vectors:
        return Outcome(name, "refused", f"{how}; the victim's update was not recovered")
    return Outcome(
        name,
        "succeeds",
        f"{how}; the victim's update was recovered to {error:.2f} quantisation steps, and its {examples:.0f} examples",
    )


def _refusal(work: Callable[[], object]) -> str:
    """What a client raised, as "Type: text"; empty when it raised nothing."""
    try:
        work()
    except Refused as error:
        return str(error)
    return ""


if __name__ == "__main__":
    print(table(run_all()))
