"""Documents that must stay true: docs/flags.md is what the parsers say, README's commands parse and its files exist.

Write docs/flags.md anew with: python -m tests.test_docs
"""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
FLAGS_PAGE = ROOT / "docs" / "flags.md"


def list_commands() -> list[str]:
    """Modules with a build_parser: the commands, then those of dataset_utils and benchmarks."""
    files = [
        *sorted(ROOT.glob("*.py")),
        *sorted(ROOT.glob("dataset_utils/*.py")),
        *sorted(ROOT.glob("benchmarks/*.py")),
    ]
    found = [path for path in files if "def build_parser" in path.read_text(encoding="utf-8")]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in found]


def load_parser(name: str) -> argparse.ArgumentParser:
    return importlib.import_module(name).build_parser()


def flags_page() -> str:
    """The whole text of docs/flags.md."""
    lines = ["# Flags of every command", "", "Printed from the parsers by `python -m tests.test_docs`."]
    for name in list_commands():
        call = f"python {name}.py" if "." not in name else f"python -m {name}"
        parser = load_parser(name)
        lines += ["", f"## {call}", "", str(parser.description), "", "| flag | default | meaning |", "|---|---|---|"]
        for action in parser._actions:
            if not isinstance(action, argparse._HelpAction):
                lines.append(f"| {flag_words(action)} | {default_words(action)} | {action.help} |")
    return "\n".join(lines) + "\n"


def flag_words(action: argparse.Action) -> str:
    if action.choices:
        value = f" {{{','.join(map(str, action.choices))}}}"
    else:
        metavar = " ".join(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
        value = f" {metavar}" if metavar else ""
    return f"`{' '.join(action.option_strings)}{value}`"


def default_words(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default is None or action.default is False or action.default in ([], "", argparse.SUPPRESS):
        return ""
    value = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else action.default
    return f"`{value}`"


def test_flags_page_is_what_the_parsers_say():
    assert FLAGS_PAGE.read_text(encoding="utf-8") == flags_page(), "run: python -m tests.test_docs"


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def russian_readme() -> str:
    return (ROOT / "README.ru.md").read_text(encoding="utf-8")


def shell_lines(page: str) -> list[str]:
    """Lines of the shell blocks of a page without their comments, continuation lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = [
        " ".join(shlex.split(line, comments=True)) for text in blocks for line in text.replace("\\\n", " ").split("\n")
    ]
    return [line for line in lines if line]


def inline_commands(page: str) -> list[str]:
    """Commands within the text of a page, in its order."""
    return re.findall(r"`((?:python|bash|make|pip) [^`\n]+)`", page)


def page_links(page: str) -> list[str]:
    """Files of the repository that a page points to, the other README left out, in its order."""
    links = re.findall(r"\]\(([^)#]+)", page)
    return [link for link in links if "://" not in link and not link.startswith("README")]


def without_results(page: str, heading: str) -> str:
    """A page without the section of figures, which the Russian one does not repeat."""
    before, after = page.split(f"\n## {heading}\n")
    return before + after[after.index("\n## ") :]


def readme_commands() -> list[str]:
    """Command lines `python ...` in the shell blocks of README and its pages, continuation lines joined."""
    pages = [readme(), *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md")))]
    blocks = re.findall(r"```bash\n(.*?)```", "\n".join(pages), flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("python ")]


def test_readme_has_commands():
    assert len(readme_commands()) >= 5


@pytest.mark.parametrize("line", readme_commands())
def test_readme_commands_parse(line):
    words = shlex.split(line.replace("$D", "data"), comments=True)[1:]
    name = words[1] if words[0] == "-m" else words[0].removesuffix(".py")
    args = load_parser(name).parse_args(words[2:] if words[0] == "-m" else words[1:])
    if name == "train":
        args.encoder_weights = "none"  # a file that the reader has
        train.check_flags(args)  # names of networks, losses, presets, optimisers
    given = [word for word in words if word.startswith("--")]
    assert all(hasattr(args, word[2:].replace("-", "_")) for word in given)


def test_files_named_in_the_readme_exist():
    tree = readme().split("## Files")[1].split("```")[1]
    named = [word for line in tree.splitlines()[1:] for word in re.split(r"\s{3,}", line)[0].split()]
    missing = [name for name in named if not (ROOT / name).exists()]
    assert named and not missing
    assert {path.name for path in ROOT.glob("*.py")} - set(named) == set(), "every module has its line"


@pytest.mark.parametrize("page", ["README.md", "README.ru.md", "docs/guide.md"])
def test_links_of_the_pages_exist(page):
    path = ROOT / page
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    links = [link for link in links if "://" not in link]
    assert links and [link for link in links if not (path.parent / link).exists()] == []


def test_both_readmes_have_the_same_commands():
    assert shell_lines(readme()) == shell_lines(russian_readme())
    english, russian = without_results(readme(), "Results"), without_results(russian_readme(), "Результаты")
    assert inline_commands(english) == inline_commands(russian)


def test_both_readmes_have_the_same_sections_and_links():
    """Both point at each other; sections are counted, as their names are translated."""
    assert "[Русский](README.ru.md)" in readme() and "[English](README.md)" in russian_readme()
    assert readme().count("\n## ") == russian_readme().count("\n## ")
    assert set(page_links(readme())) == set(page_links(russian_readme()))
    english, russian = without_results(readme(), "Results"), without_results(russian_readme(), "Результаты")
    english, russian = english.split("\n## Limits\n")[0], russian.split("\n## Ограничения\n")[0]
    assert page_links(english) == page_links(russian)


def test_sections_of_readme_that_the_russian_one_points_to_exist():
    anchors = re.findall(r"\(README\.md#([^)]+)\)", russian_readme())
    headings = {line[3:].lower().replace(" ", "-") for line in readme().splitlines() if line.startswith("## ")}
    assert anchors and set(anchors) <= headings


def test_files_named_in_the_russian_readme_exist():
    tree = russian_readme().split("## Файлы")[1].split("```")[1]
    named = [word for line in tree.splitlines()[1:] for word in re.split(r"\s{3,}", line)[0].split()]
    assert named and [name for name in named if not (ROOT / name).exists()] == []


if __name__ == "__main__":
    FLAGS_PAGE.write_text(flags_page(), encoding="utf-8")
