"""Flags from files: --settings FILE of any command, and the named recipes of train.py, put before the user's own words.

A file is a JSON object of flags by their names, or the args.json of a run, which holds one under "flags".
"""

import argparse
import difflib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parent / "recipes"
NEVER = {"settings", "recipe", "help", "version", "list_models"}  # they say what to do now, not how


def recipe_names() -> list[str]:
    """Names that --recipe takes."""
    return sorted(path.stem for path in RECIPES.glob("*.json"))


def with_settings(parser: argparse.ArgumentParser, words: Sequence[str]) -> list[str]:
    """The command line `words` behind the flags of its recipe and of its settings file; what comes later wins.

    A recipe is printed as the whole command that it stands for. A file or a recipe that cannot be used ends the
    command with status 2.
    """
    finder = argparse.ArgumentParser(prog=parser.prog, usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    finder.add_argument("--settings", type=Path)
    takes_recipe = any(action.dest == "recipe" for action in parser._actions)
    if takes_recipe:
        finder.add_argument("--recipe")
    given, rest = finder.parse_known_args(words)
    flags, written = _read_flags(parser, given.settings) if given.settings else ({}, False)
    recipe = (flags.pop("recipe", None) if takes_recipe and not written else None) or None
    recipe = getattr(given, "recipe", None) or recipe
    front = _file_words(parser, f"--settings {given.settings}", flags, words, lenient=written)
    if recipe:
        path = _find_recipe(parser, str(recipe))
        front = [*_file_words(parser, str(path), _read_flags(parser, path)[0], [*front, *words]), *front]
        sys.stdout.write(f"recipe {recipe}: python {parser.prog} {shlex.join([*front, *rest])}\n")
    return [*front, *words]


def _find_recipe(parser: argparse.ArgumentParser, name: str) -> Path:
    if name not in recipe_names():
        known = ", ".join(recipe_names())
        parser.error(f"--recipe {name} is unknown{_suggest(name, recipe_names())}; expected one of {known}")
    return RECIPES / f"{name}.json"


def _read_flags(parser: argparse.ArgumentParser, path: Path) -> tuple[dict[str, Any], bool]:
    """The flags of a file, and whether a command wrote it, as the object inside of another one tells."""
    try:
        flags = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        parser.error(f"--settings {path} cannot be read: {error.strerror}")
    except ValueError as error:
        parser.error(f"--settings {path} is not JSON: {error}")
    written = isinstance(flags, dict) and "flags" in flags
    if written:
        flags = flags["flags"]
    if not isinstance(flags, dict):
        parser.error(f"--settings {path} holds a {type(flags).__name__}; expected an object of flags")
    return flags, written


def _file_words(
    parser: argparse.ArgumentParser,
    source: str,
    flags: Mapping[str, Any],
    given: Sequence[str],
    *,
    lenient: bool = False,
) -> list[str]:
    """The flags of a file as words, without those that `given` words set, or exclude.

    Args:
        lenient: flags of another command, or of another version, are left out aloud; else they are refused.
    """
    actions = _actions_by_name(parser)
    excluded = _decided(parser, given)
    words: list[list[str]] = []
    unknown, seen = [], dict[str, str]()
    for name, value in flags.items():
        action = actions.get(_plain_name(name))
        if action is None:
            unknown.append(name)
        elif action.dest in seen:
            parser.error(f"{source} sets one flag twice: {seen[action.dest]!r} and {name!r}; leave one out")
        elif action.dest not in excluded:
            words.append(_flag_words(parser, source, name, action, value))
        if action is not None:
            seen[action.dest] = name
    if unknown:
        listed = " ".join(f"{name}{_suggest(_plain_name(name), actions)}" for name in unknown)
        if not lenient:
            parser.error(f"{source}: no flag of {parser.prog}: {listed}. Correct or remove it; --help lists the flags")
        sys.stderr.write(f"{source}: left out, for they are no flags of {parser.prog}: {listed}\n")
    words.sort(key=len, reverse=True)  # a list that came last would take what follows it
    return [word for group in words for word in group]


def _actions_by_name(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Flags by all their names, as _plain_name spells them."""
    flags = [action for action in parser._actions if action.option_strings and action.dest not in NEVER]
    named = {_plain_name(option): action for action in flags for option in action.option_strings}
    return named | {action.dest: action for action in flags}


def _plain_name(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _suggest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _decided(parser: argparse.ArgumentParser, given: Sequence[str]) -> set[str]:
    """Flags that the words set, and those that exclude these."""
    used = {option for word in given for option in (word, word.split("=", 1)[0])}
    found = {action.dest for action in parser._actions if used.intersection(action.option_strings)}
    for group in parser._mutually_exclusive_groups:
        dests = {action.dest for action in group._group_actions}
        if dests & found:
            found |= dests
    return found


def _flag_words(
    parser: argparse.ArgumentParser, source: str, name: str, action: argparse.Action, value: Any
) -> list[str]:
    """A flag as words, its value checked as if it had been typed; nothing for what is the default anyhow."""
    if value is None or (value == [] and not action.default):
        return []
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            parser.error(f"{source}: {name} is {json.dumps(value)}; expected true or false")
        off = value == _plain_name(name).startswith("no_")
        return [next(option for option in action.option_strings if option.startswith("--no-") == off)]
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, (bool, dict, list, type(None))) for item in items):
        parser.error(f"{source}: {name} is {json.dumps(value)}; expected a number, a text or a list of them")
    texts = [str(item) for item in items]
    if action.nargs is None:
        texts = [" ".join(texts)]
    try:
        parser._match_argument(action, "A" * len(texts))
        parser._get_values(action, texts)
    except argparse.ArgumentError as error:
        parser.error(f"{source}: {error}")
    option = max(action.option_strings, key=len)
    if len(texts) == 1 and option.startswith("--"):
        return [f"{option}={texts[0]}"]
    return [option, *texts]
