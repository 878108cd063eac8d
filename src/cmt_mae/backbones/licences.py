"""Licences of the libraries in use, from their own metadata."""

import re
from importlib import metadata
from typing import Any

NOT_STATED = "not stated"


def licence_of(name: str) -> str:
    """What a distribution's metadata say: its SPDX expression, its one-line licence, or its classifiers."""
    about: Any = metadata.metadata(name)  # an email.message.Message in all but its declared type
    stated, short = (
        next(iter(about.get_all(field) or []), "").strip()
        for field in ("License-Expression", "License")
    )
    if not stated and "\n" not in short and 0 < len(short) <= 60 and short != "UNKNOWN":
        stated = short
    kinds = [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    return stated or ", ".join(c.rsplit(" :: ", 1)[-1] for c in kinds) or NOT_STATED


def needed_libraries() -> list[str]:
    """The distributions that cmt-mae needs directly, extras left out, by its own metadata."""
    wanted = metadata.requires("cmt-mae") or []
    names = [re.match(r"[\w.-]+", line) for line in wanted if "extra ==" not in line]
    return [match[0] for match in names if match]


def libraries_line() -> str:
    """``torch 2.14.1 (BSD-3-Clause), ...``: every direct dependency that is installed."""
    parts = []
    for name in needed_libraries():
        try:
            parts.append(f"{name} {metadata.version(name)} ({licence_of(name)})")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(parts)


def if_published(licence: str | None) -> str | None:
    """What is known of weights that are recognised by their kind alone: anyone may have trained them."""
    if not licence:
        return None
    return f"{NOT_STATED}; if these are the published weights: {licence}"
