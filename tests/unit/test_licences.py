"""What Gale needs to run may be used and passed on by whoever uses Gale."""

import re
from collections.abc import Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = re.compile(
    r"Apache([ -]2\.0| Software License)?( WITH LLVM-exception)?|MIT( License)?|(\d-Clause )?BSD( License)?"
    r"|BSD-[23]-Clause|ISC|BSL-1\.0|PSF-2\.0|Python Software Foundation License|MPL-2\.0|Zlib|0BSD|Unlicense"
)
"""MPL-2.0 binds changes to the files under it, and nothing around them."""
CUDA = re.compile(r"(nvidia|cuda)-")
"""Comes with PyTorch's CUDA build, under NVIDIA's own terms."""


def needed(name: str, extras: frozenset[str], seen: dict[str, Distribution]) -> None:
    """Add what a distribution needs to run on this platform, itself included."""
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return  # of another platform
    seen[canonicalize_name(name)] = found
    for requirement in map(Requirement, found.requires or ()):
        marker = requirement.marker
        wanted = marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if wanted and canonicalize_name(requirement.name) not in seen:
            needed(requirement.name, frozenset(requirement.extras), seen)


def licences(found: Distribution) -> Iterator[str]:
    """The licences that a distribution names; none: it says nothing in a form that can be read."""
    metadata = found.metadata
    classifiers = [line.rsplit(" :: ", 1)[-1] for line in metadata.get_all("Classifier", []) if line[:7] == "License"]
    stated = metadata.get("License-Expression") or (None if classifiers else metadata.get("License"))
    yield from classifiers if stated is None else re.split(r" (?:AND|OR|and|or) ", stated.strip("() "))


def test_everything_needed_has_a_permissive_licence() -> None:
    seen: dict[str, Distribution] = {}
    needed("gale-server", frozenset(), seen)
    assert {"torch", "fastapi", "pyzmq", "llguidance"} <= seen.keys()
    assert len(seen) > 40
    for name, found in seen.items():
        if not CUDA.match(name):
            named = list(licences(found))
            assert named and all(PERMISSIVE.fullmatch(licence.strip("() ")) for licence in named), (name, named)
