"""Flags: the parser of the command line, made from the settings' dataclasses. It needs no torch."""

import argparse
import difflib
import re
from dataclasses import fields

from interface.commands import COMMANDS
from interface.settings import flag

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
    inside = -LARGEST <= value <= LARGEST  # not so for nan
    wanted = [] if inside else [f"between {-LARGEST} and {LARGEST}"]
    if limits["least"] is not None:
        wanted.append(f"at least {limits['least']}")
        inside = inside and value >= limits["least"]
    if limits["above"] is not None:
        wanted.append(f"above {limits['above']}")
        inside = inside and value > limits["above"]
    if limits["most"] is not None:
        wanted.append(f"at most {limits['most']}")
        inside = inside and value <= limits["most"]
    return "" if inside else f"out of range: must be {' and '.join(wanted)}"


def converter(field):
    """The function that turns a flag's text into its value."""

    def convert(text):
        value = field.type(text)
        problem = out_of_range(field, value)
        if problem:
            raise argparse.ArgumentTypeError(f"{text} is {problem}")
        return value

    convert.__name__ = TYPE_NAMES[field.type]  # argparse says "invalid number value: 'x'"
    return convert


def help_text(field):
    """A flag's help with its choices and its default."""
    text = field.metadata["help"]
    if field.metadata["choices"]:
        text += f" {{{','.join(field.metadata['choices'])}}}"
    if field.default != "":
        toy = field.metadata["toy"]
        text += f" [{field.default}]" if toy is None else f" [{field.default}; toy: {toy}]"
    return text.replace("%", "%%")


def add_flag(parser, field):
    """Add the flag of a setting to a command's parser."""
    if field.name == "resume":
        parser.add_argument(flag(field.name), nargs="?", const="auto", help=help_text(field), metavar="PATH")
    elif field.type is bool:
        parser.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, help=help_text(field))
    else:
        parser.add_argument(flag(field.name), type=converter(field), help=help_text(field), metavar="X")


def dashed(argument):
    """--batch_size=7 -> --batch-size=7. Anything that is not a flag stays as it is."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") else argument


def parse(arguments, description=None):
    """(command, {setting: value}, text) of a command line, as given. Exits with code 2 where a flag is wrong."""
    parser = Parser(prog="lastmile.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, settings in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=settings.__doc__,
            description=settings.__doc__,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        if name == "sample":
            command.add_argument("text", nargs="?", help="the text [standard input]")
        for field in fields(settings):
            add_flag(command, field)
    given = vars(parser.parse_args([dashed(argument) for argument in arguments]))
    return given.pop("command"), given, given.pop("text", None)
