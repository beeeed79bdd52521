"""Options from configuration classes and functions, by jsonargparse: no option is written twice."""

from __future__ import annotations

import difflib
import json
import re
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from inspect import signature
from typing import Any, TypeVar, get_args

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from .errors import UsageError, field_sentence, one_line, option_of

T = TypeVar("T")
# The messages of jsonargparse that name an option.
_REQUIRED = re.compile(r"""arguments are required: ([\w.]+)|Key ["']([\w.]+)["'] is required""")
_UNKNOWN = re.compile(r"unrecognized arguments: --([^\s=]+)|(?:Key|Option) '([\w.]+)' is not (?:expected|accepted)")
_KEY = re.compile(r"""^(?:Parser key|Key) ["']([\w.]+)["']:?\s*""")


class _HelpFormatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of the description."""


class Arguments:
    """The options of one command.

    Args:
        name (`str`): of the command.
        description (`str`): the text of `--help`.
    """

    def __init__(self, name: str, description: str):
        self.parser = ArgumentParser(
            prog=f"hf-qst {name}",
            usage=f"hf-qst {name} [options]",
            description=description,
            formatter_class=_HelpFormatter,
            exit_on_error=False,
            allow_abbrev=False,
        )
        self.parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options.")
        self.parser.add_argument(
            "--verbose", action="store_true", help="Show the libraries' messages and the trace of an error."
        )
        self.names: dict[Any, list[str]] = {}

    def add(self, kind: type | Callable, skip: Iterable[str] = (), prefix: str | None = None) -> None:
        """Options for the fields of a dataclass, or the parameters of a class or a function, but for those in `skip`.

        With a prefix they are named `--prefix.name`.
        """
        accepted = {f.name for f in fields(kind) if f.init} if is_dataclass(kind) else set(signature(kind).parameters)
        adding = self.parser.add_class_arguments if isinstance(kind, type) else self.parser.add_function_arguments
        more = {"instantiate": False} if isinstance(kind, type) else {}
        self.names[kind] = adding(kind, prefix, skip=accepted & set(skip), fail_untyped=False, **more)

    def flag(self, name: str, text: str) -> None:
        """An option without a value."""
        self.parser.add_argument(f"--{name}", action="store_true", help=text)

    def parse(self, argv: Sequence[str]) -> Options:
        """The options of a command line.

        Raises:
            UsageError: an option is unknown, missing, or has a value of the wrong kind.
        """
        argv = self._written_out(argv)
        try:
            values = self.parser.parse_args(argv)
            given = self.parser.parse_args(argv, defaults=False)
            return Options(self, values, given)
        except ArgumentError as error:
            raise _usage_error(error, self.option_names()) from error
        except ValueError as error:  # of a nested configuration
            raise UsageError(option_of(error), field_sentence(error)) from error

    def option_names(self) -> list[str]:
        """Names of all options, without the hyphens."""
        return [option[2:] for action in self.parser._actions for option in action.option_strings]

    def _written_out(self, argv: Sequence[str]) -> list[str]:
        """Hyphens as underscores, and `true` behind a switch that stands alone."""
        switches = {
            option
            for action in self.parser._actions
            for option in action.option_strings
            if bool in (kind := getattr(action, "_typehint", None), *get_args(kind))
        }
        written = []
        for i, part in enumerate(argv):
            if not part.startswith("--"):
                written.append(part)
                continue
            name, equals, value = part.partition("=")
            written.append("--" + name[2:].replace("-", "_") + equals + value)
            alone = i + 1 == len(argv) or argv[i + 1].startswith("--")
            if written[-1] in switches and alone:
                written.append("true")
        return written


def _usage_error(error: ArgumentError, known: Iterable[str]) -> UsageError:
    message = one_line(error)
    if found := _REQUIRED.search(message):
        return UsageError(found.group(1) or found.group(2), "it must be given")
    if found := _UNKNOWN.search(message):
        name = found.group(1) or found.group(2)
        near = difflib.get_close_matches(name, known, n=1)
        return UsageError(name, "there is no such option" + (f"; did you mean --{near[0]}?" if near else ""))
    if found := _KEY.match(message):
        return UsageError(found.group(1), message[found.end() :])
    return UsageError(None, message)


class Options:
    """The values of a command's options.

    Attributes:
        given (`set[str]`): names of the options that the command line or a configuration file sets.
    """

    def __init__(self, arguments: Arguments, values: Namespace, given: Namespace):
        self._arguments, self._values = arguments, arguments.parser.instantiate(values)
        self._plain = values
        self.given = set(given.keys()) - {"config"}

    def __getattr__(self, name: str):
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        return self._values[name]

    def build(self, kind: type[T], blamed: str | None = None, **more) -> T:
        """An object of a class that was added, from its options and `more`.

        Args:
            kind: the class.
            blamed (`str`, *optional*): the option that an error names if it is not clear which value was refused.
            more: further arguments.

        Raises:
            UsageError: a value is refused; the message names its option.
        """
        try:
            return kind(**{**self.values(kind), **more})
        except (ValueError, TypeError, ImportError) as error:
            raise UsageError(self._refused(self._names(kind), str(error)) or blamed, error) from error

    def values(self, kind: type | Callable) -> dict:
        """The arguments of a class or function that was added."""
        return {parameter: self._values[name] for parameter, name in self._names(kind).items()}

    def _names(self, kind: type | Callable) -> dict[str, str]:
        return {name.rpartition(".")[2]: name for name in self._arguments.names[kind]}

    def _refused(self, names: dict[str, str], message: str) -> str | None:
        """The option that an error is about: it is named, or its value is."""
        if (named := option_of(message)) is not None:
            return names.get(named, named)
        words = re.findall(r"\w+", message)
        for parameter, name in names.items():
            if name in self.given and (parameter in words or [str(self._values[name])] == words[:1]):
                return name
        return None

    def as_dict(self) -> dict:
        """All options as JSON-ready values, as `--config` takes them."""
        text = self._arguments.parser.dump(self._plain, format="json", skip_validation=True)
        return {name: value for name, value in json.loads(text).items() if name != "config"}
