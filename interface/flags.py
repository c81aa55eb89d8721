"""Flags: the parser of the command line, made from the settings' dataclasses. It needs no torch."""

import argparse
import difflib
import re
from dataclasses import fields

from interface.commands import COMMANDS
from safety.terminal import flag

TYPE_NAMES = {int: "whole number", float: "number", str: "text"}
LARGEST = 1e30  # of a setting without a limit of its own: fp32 holds it


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line instead of the whole usage."""
        unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            flags = {flag(f.name) for settings in COMMANDS.values() for f in fields(settings)}
            message += "; other commands have it" if unknown[1] in flags else did_you_mean(unknown[1], flags)
        self.exit(2, f"{self.prog}: {message}; see: python {self.prog} --help\n")


def did_you_mean(name, known):
    """A suggestion for a mistyped name, or ""."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def out_of_range(field, value):
    """What is wrong with a setting's value, or "": it must be within its limits, and one of its choices."""
    limits = field.metadata
    if limits["choices"] and value not in limits["choices"]:
        return f"not one of {', '.join(limits['choices'])}"
    if field.type in (str, bool):
        return "text that contains a NUL" if "\0" in str(value) else ""
    least, above, most = limits["least"], limits["above"], limits["most"]
    rules = {  # each is false for nan
        f"between {-LARGEST} and {LARGEST}": -LARGEST <= value <= LARGEST,
        f"at least {least}": least is None or value >= least,
        f"above {above}": above is None or value > above,
        f"at most {most}": most is None or value <= most,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    return f"out of range: must be {' and '.join(broken)}" if broken else ""


def converter(field):
    """The function that turns a flag's text into its value."""

    def convert(text):
        value = field.type(text)
        if problem := out_of_range(field, value):
            raise argparse.ArgumentTypeError(f"{text} is {problem}")
        return value

    convert.__name__ = TYPE_NAMES[field.type]  # argparse says "invalid number value: 'x'"
    return convert


def help_text(field):
    """A flag's help with its choices and its default."""
    limits, text = field.metadata, field.metadata["help"]
    if limits["choices"]:
        text += f" {{{','.join(limits['choices'])}}}"
    if field.default != "":
        text += f" [{field.default}]" if limits["toy"] is None else f" [{field.default}; toy: {limits['toy']}]"
    return text.replace("%", "%%")


def add_flag(parser, field):
    """Add the flag of a setting to a command's parser."""
    if field.name == "resume":
        how = {"nargs": "?", "const": "auto", "metavar": "PATH"}
    elif field.type is bool:
        how = {"action": argparse.BooleanOptionalAction}
    else:
        how = {"type": converter(field), "metavar": "X"}
    parser.add_argument(flag(field.name), help=help_text(field), **how)


def dashed(argument):
    """--batch_size=7 -> --batch-size=7. Anything that is not a flag stays as it is."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def parse(arguments, description=None):
    """(command, {setting: value}, text) of a command line, as given. Exits with code 2 if a flag is wrong."""
    parser = Parser(prog="lastmile.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, settings in COMMANDS.items():
        about = {"help": settings.__doc__, "description": settings.__doc__}
        command = commands.add_parser(name, **about, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        if name == "sample":
            command.add_argument("text", nargs="?", help="the text [standard input]")
        for field in fields(settings):
            add_flag(command, field)
    given = vars(parser.parse_args([dashed(argument) for argument in arguments]))
    return given.pop("command"), given, given.pop("text", None)
