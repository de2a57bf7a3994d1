"""`${NMOE_NAME}` and `${NMOE_NAME:-default}` in the strings of a configuration."""

import re
from collections.abc import Mapping

_PLACEHOLDER = re.compile(r"\$\{([^{}]*)\}")
_INSIDE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)


def expand(text: str, environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """`text` with its placeholders replaced from `environ`, and what is wrong with those that could not be.

    As in a shell, the default serves where the variable is unset or empty. Only names that begin with `NMOE_` are
    read, so that a config says all that may change it.
    """
    problems: list[str] = []

    def replacement(match: re.Match[str]) -> str:
        inside = _INSIDE.fullmatch(match[1])
        if inside is None:
            problems.append(f"{match[0]} is no placeholder: expected ${{NMOE_NAME}} or ${{NMOE_NAME:-default}}")
            return match[0]
        name, default = inside["name"], inside["default"]
        if not name.startswith("NMOE_"):
            problems.append(f"{match[0]} names a foreign variable: only names that begin with NMOE_ are expanded")
            return match[0]
        value = environ.get(name)
        if default is not None:
            return value or default
        if value is None:
            problems.append(f"{match[0]}: {name} is not set: set it, or give a default as ${{{name}:-default}}")
            return match[0]
        return value

    expanded = _PLACEHOLDER.sub(replacement, text)
    if not problems and "${" in expanded:
        # An unclosed brace, or a variable whose value holds another placeholder: written to a run's config.toml, it
        # would mean something else when read back.
        problems.append(f"expected closed placeholders that are not nested, found {expanded!r}")
    return expanded, problems
