"""Files of settings: TOML by hand, or the config.json that a stage has written. It needs no torch."""

import json
import tomllib
from dataclasses import fields
from pathlib import Path

from formats.errors import UserError
from interface.commands import COMMANDS
from interface.flags import did_you_mean, out_of_range


def read_settings(file, command, between=()):
    """{setting: value} that a file contains for a command: TOML, or the config.json of a stage.

    In TOML, keys before the first table are for every command that has such a setting, those in [ppo] for ppo only.
    between: settings that override the former and are overridden by the latter.
    """
    raw = read_raw(file)
    known = {name: {f.name: f for f in fields(settings)} for name, settings in COMMANDS.items()}
    everywhere = {}
    for of_command in (*known.values(), known[command]):  # the command's own limits are the ones that count
        everywhere |= of_command
    shared = {name: value for name, value in raw.items() if not isinstance(value, dict)}
    found = {"": check_table(shared, everywhere, f"{file}:")}
    for table in raw.keys() - shared.keys():
        if table not in known:
            raise UserError(f"{file}: no command [{table}]; tables are named {', '.join(COMMANDS)}")
        found[table] = check_table(raw[table], known[table], f"{file}: [{table}]")
    shared = {name: value for name, value in found[""].items() if name in known[command]}
    return shared | dict(between) | found.get(command, {})


def read_raw(file):
    """The contents of a settings file: {key: value, or a table}."""
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
        raw = json.loads(text) if file.endswith(".json") else tomllib.loads(text)
    except FileNotFoundError:
        raise FileNotFoundError(f"--config {file}: no such file; configs/ has examples") from None
    except (ValueError, RecursionError) as error:  # a TOMLDecodeError or UnicodeDecodeError is a ValueError
        raise UserError(f"{file}: unreadable settings: {error}; fix the file") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file}: unreadable settings: not a JSON object; fix the file")
    if file.endswith(".json"):  # facts about that run, not settings for another
        raw = {name: value for name, value in raw.items() if name not in ("stage", "commit", "overwrite", "resume")}
    return raw


def check_table(values, known, place):
    """{setting: value} of one table. Raises UserError for an unknown key, a wrong type or a value out of range."""
    found = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        field = known.get(name)
        if field is None:
            raise UserError(f"{place} {key}: no such setting{did_you_mean(name, known)}")
        if name in found:
            raise UserError(f"{place} {key}: given twice, with a dash and with an underscore; remove one")
        if field.type is float and type(value) is int:
            value = float(str(value))  # inf, and so out of range, if it is too large
        if type(value) is not field.type:
            raise UserError(f"{place} {key}: {value!r} is not of type {field.type.__name__}")
        if problem := out_of_range(field, value):
            raise UserError(f"{place} {key}: {value!r} is {problem}")
        found[name] = value
    return found
