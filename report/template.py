"""The page's templates: jinja2 with autoescape, so that no text of unknown origin can open a tag or an attribute."""

import functools
from pathlib import Path

import jinja2

FOLDER = Path(__file__).resolve().parent


@functools.cache
def environment():
    """Templates of this folder. A name that a template misspells is an error, not an empty text."""
    loader = jinja2.FileSystemLoader(FOLDER)
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


@functools.cache
def macros():
    """The macros of macros.html as functions."""
    return environment().get_template("macros.html").module


def read(name):
    """The text of a file of this folder."""
    return (FOLDER / name).read_text(encoding="utf-8")
