"""same_pins.py A B: whether two requirements files install the same, hashes included, wherever nmoe is supported.

uv's releases word the same markers differently, so that files which install the same need not be equal.
"""

import sys
from itertools import product
from pathlib import Path

from packaging.requirements import Requirement

Pin = tuple[str, str | None, frozenset[str], frozenset[str]]
"""Version, address, extras, hashes."""

ENVIRONMENTS = [
    {
        "sys_platform": system,
        "platform_system": system.capitalize(),
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "implementation_name": "cpython",
        "python_version": python,
        "python_full_version": f"{python}.1",
    }
    for (system, machine), python in product(
        (("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64"), ("darwin", "x86_64")),
        ("3.11", "3.12", "3.13", "3.14"),
    )
]


def read(path: str) -> list[tuple[Requirement, frozenset[str]]]:
    """The file's requirements, each with its hashes."""
    lines = [line for line in Path(path).read_text().splitlines() if not line.lstrip().startswith("#")]
    found = []
    for entry in "\n".join(lines).replace("\\\n", " ").splitlines():
        words, hashes = [], []
        for word in entry.split():
            (hashes if word.startswith("--hash=") else words).append(word)
        if words:
            found.append((Requirement(" ".join(words)), frozenset(hashes)))
    return found


def pins(requirements: list[tuple[Requirement, frozenset[str]]], environment: dict[str, str]) -> dict[str, set[Pin]]:
    """What is installed there, by name."""
    found: dict[str, set[Pin]] = {}
    for requirement, hashes in requirements:
        if requirement.marker is None or requirement.marker.evaluate(environment):
            pin = str(requirement.specifier), requirement.url, frozenset(requirement.extras), hashes
            found.setdefault(requirement.name, set()).add(pin)
    return found


def main() -> int:
    """Prints what differs; 1 if anything does."""
    ours, theirs = (read(path) for path in sys.argv[1:3])
    differences = set()
    for environment in ENVIRONMENTS:
        a, b = pins(ours, environment), pins(theirs, environment)
        for name in a.keys() | b.keys():
            if a.get(name) != b.get(name):
                versions = [", ".join(sorted(pin[0] for pin in of.get(name, ()))) or "none" for of in (a, b)]
                differences.add(
                    f"{name}: {versions[0]} and {versions[1]}" if len(set(versions)) > 1 else f"{name}: hashes"
                )
    for difference in sorted(differences):
        print(difference)
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
