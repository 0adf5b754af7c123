"""Scenes that wait more than they work, each with a federation of its own: a file's are played at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from .deployment import Deployment

Scene = Callable[[Deployment], None]
#: Seconds between the beginnings of two scenes: their processes shall not all start at once.
APART = 20.0


@contextmanager
def playing(
    request: pytest.FixtureRequest,
    scenes: Mapping[str, Scene],
    folder: Callable[[str], Path],
    path: Callable[[Path], str] = lambda _: "",
) -> Iterator[dict[str, Future[None]]]:
    """The scenes whose tests, with the parameter ``scene``, are to run, under way.

    Args:
        request: of the fixture of a module.
        scenes: by name.
        folder: makes one for a scene.
        path: folder of packages that its processes find besides their own, made in the folder.
    """

    def play(name: str, own: Path, wait: float) -> None:
        time.sleep(wait)
        with Deployment(own / "d", path(own / "packages")) as deployment:
            scenes[name](deployment)

    here = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params.get("scene") for item in here if hasattr(item, "callspec")}
    wanted = [name for name in scenes if name in asked]
    # Not in the threads: pytest empties the folder above all others when the first is asked for.
    places = [folder(name[:20]) for name in wanted]
    with ThreadPoolExecutor(len(scenes)) as pool:
        yield {
            name: pool.submit(play, name, own, i * APART)
            for i, (name, own) in enumerate(zip(wanted, places, strict=True))
        }
