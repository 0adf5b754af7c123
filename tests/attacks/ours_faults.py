"""Faults at fedge's own sites, under the names that they have in flower_faults.py; see ours.py.

"Refused" means that the fault neither changed nor ended the round.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import numpy as np

from fedge.shared import protocol

from .deviant import Server
from .flower_parties import Outcome
from .ours import REST, Attack, judged, opened_as, said
from .parties import VICTIM, make_sites


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
