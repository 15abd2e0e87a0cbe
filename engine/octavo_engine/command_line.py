"""Read a command line with what surrounds it: --config FILE, environment variables, flags of vLLM, --help=WORD.

What is given twice: the command line wins over the file, the file over the environment.
Standard library only (a YAML file needs pyyaml); called by cli.py.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo_engine.config import ArgumentParser, ConfigError, UsageError, flag_of
from octavo_engine.vllm_flags import BY_NAME, VLLM_FLAGS, Answer, Takes, VllmFlag, answers

ENVIRONMENT = {
    "OCTAVO_HOST": "host",
    "VLLM_LOGGING_LEVEL": "log_level",
    "VLLM_LOGGING_CONFIG_PATH": "log_config_file",
    "VLLM_LOG_STATS_INTERVAL": "log_stats_interval_s",
    "VLLM_BATCH_INVARIANT": "deterministic",
}
"""Variables that stand for a setting. Keys are read by api/auth.py, Hugging Face's own variables by its client."""
SWITCHES = frozenset({"deterministic"})
"""Settings among them that are on or off."""
SO_ANYWAY = frozenset({"VLLM_API_KEY", "VLLM_NO_USAGE_STATS", "VLLM_DO_NOT_TRACK", "VLLM_USE_V1"})
"""Variables that need no setting: the key is read elsewhere, nothing is sent to anybody."""
_OF_A_SERVICE = re.compile(r"_(SERVICE_(HOST|PORT.*)|PORT(_\d+_.*)?)$")
"""Kubernetes gives these to every pod beside a Service named vllm-…; nobody set them."""

ANSWERS = {
    Answer.ALWAYS: "so without the flag",
    Answer.MOOT: "accepted with a warning, without effect",
    Answer.MISSING: "refused, but for the values that ask for nothing",
}

ABOUT_VLLM = (
    "Flags of vLLM are understood in both spellings (--max-model-len, --max_model_len). `--help=WORD` tells about one "
    "flag or group, `--help=vllm` about vLLM's flags that are not listed here."
)


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Let the parser take them; `read` answers them."""
    for flag in VLLM_FLAGS:
        options: dict[str, Any] = {"dest": flag.dest, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        match flag.takes:
            case Takes.NOTHING:
                options["action"] = argparse.BooleanOptionalAction
            case Takes.VALUES:
                options |= {"nargs": "*", "action": "extend"}
            case Takes.VALUE:
                pass
        parser.add_argument(*flag.aliases, flag.name, **options)


def read(
    parser: ArgumentParser, arguments: Sequence[str], environ: Mapping[str, str]
) -> tuple[argparse.Namespace, list[str]]:
    """The namespace, and warnings for what changes nothing. Raises UsageError and ConfigError."""
    given = vars(parser.parse_args(_without_dots(arguments)))
    settings: dict[str, Any] = {}
    known = {action.dest for action in parser._actions}
    for variable, dest in ENVIRONMENT.items():
        if (value := environ.get(variable)) and dest in known:
            settings |= _parse_from(variable, parser, [_flag_for(variable, dest, value)])
    if (path := given.pop("config", None)) is not None and "config" in known:
        settings |= _parse_from(path, parser, _arguments_of(parser, Path(path)))
    if given.get("model_positional") is not None:
        settings.pop("model", None)
    settings |= given
    warnings = [] if not any(dest.startswith("vllm:") for dest in known) else answers(settings)
    return argparse.Namespace(**settings), warnings + _unknown_variables(environ)


def _flag_for(variable: str, dest: str, value: str) -> str:
    """Raises UsageError."""
    if dest not in SWITCHES:
        return f"{flag_of(dest)}={value}"
    if value.lower() not in ("0", "1", "true", "false"):
        raise UsageError(f"{variable}: got {value!r}, expected 0 or 1")
    return flag_of(dest) if value.lower() in ("1", "true") else "--no-" + flag_of(dest)[2:]


def _without_dots(arguments: Sequence[str]) -> list[str]:
    """`--x.a.b 1 --x.c=true` as `--x {"a": {"b": 1}, "c": true}`: how vLLM lets objects be written in parts."""
    rest: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    words = iter(arguments)
    for word in words:
        found = re.fullmatch(r"(--[A-Za-z][\w-]*)\.([\w.-]+)(?:=(.*))?", word, re.DOTALL)
        if found is None:
            rest.append(word)
            continue
        flag, path, text = found.groups()
        if text is None and (text := next(words, None)) is None:
            raise UsageError(f"{word} has no value: write {word}=VALUE")
        place = objects.setdefault(flag.replace("_", "-"), {})
        *outer, last = path.split(".")
        for key in outer:
            place = place.setdefault(key, {})
            if not isinstance(place, dict):
                raise UsageError(f"{word}: {key} has a value of its own already, and so no {last}: leave one out")
        place[last] = _json_or_text(text)
    return rest + [f"{flag}={json.dumps(value)}" for flag, value in objects.items()]


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parse_from(source: str, parser: ArgumentParser, arguments: list[str]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = vars(parser.parse_args(arguments))
    except (ConfigError, UsageError) as error:
        raise UsageError(f"{parser.prog}: {source}: {str(error).removeprefix(parser.prog + ': ')}") from None
    found.pop("model_positional", None)
    return found


def _unknown_variables(environ: Mapping[str, str]) -> list[str]:
    return [
        f"{name} has no effect: it is a variable of vLLM that means nothing here"
        for name in sorted(environ)
        if name.startswith("VLLM_")
        and name not in ENVIRONMENT
        and name not in SO_ANYWAY
        and not _OF_A_SERVICE.search(name)
    ]


def _arguments_of(parser: ArgumentParser, file: Path) -> list[str]:
    """A YAML file of flags as a command line. Raises UsageError."""
    import yaml

    try:
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{parser.prog}: --config: {file} cannot be read: {error}") from None
    if document is None:
        document = {}
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UsageError(f"{parser.prog}: --config: {file} must hold flags and their values, as `max-model-len: 4096`")
    arguments = []
    for key, value in document.items():
        flag = "--" + key.lstrip("-").replace("_", "-")
        if flag == "--config" or not key.lstrip("-"):
            raise UsageError(
                f"{parser.prog}: {file}: {key!r} cannot stand in a file, where names are flags but --config: remove it"
            )
        match value:
            case True:
                arguments.append(flag)
            case False:
                arguments.append("--no-" + flag[2:])
            case None:
                raise UsageError(f"{parser.prog}: {file}: {key} has no value: write one behind the colon, or remove it")
            case list():
                arguments += [f"{flag}={_text(part)}" for part in value]
            case _:
                arguments.append(f"{flag}={_text(value)}")
    return arguments


def _text(value: object) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


# ---- help


def help_about(parser: ArgumentParser, word: str) -> str:
    """The help of one flag, of one group, or of every flag with the word in its name. Raises UsageError."""
    wanted = word.strip().lstrip("-").lower().replace("_", "-")
    if wanted in ("", "all"):
        return parser.format_help()
    if wanted == "vllm":
        return _vllm_help()
    if wanted == "markdown":
        return flags_page(parser)
    groups = {group.title.lower(): group for group in parser._action_groups if group.title and group._group_actions}
    if (group := groups.get(wanted) or groups.get(wanted.replace("-", " "))) is not None:
        return _section(parser, str(group.title), group._group_actions)
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    found = [action for action in actions if f"--{wanted}" in action.option_strings]
    foreign = [BY_NAME[f"--{wanted}"]] if f"--{wanted}" in BY_NAME else []
    if not found and not foreign:
        found = [action for action in actions if any(wanted in option for option in action.option_strings)]
        foreign = [flag for flag in VLLM_FLAGS if wanted in flag.name]
    if not found and not foreign:
        options = [option[2:] for action in actions for option in action.option_strings if option.startswith("--")]
        near = difflib.get_close_matches(wanted, [*options, *groups], n=1)
        hint = f"did you mean --help={near[0]}?" if near else f"groups are {', '.join(groups)}"
        raise UsageError(f"{parser.prog}: no flag and no group {word!r}: {hint}")
    texts = [_section(parser, None, found)] if found else []
    return "\n".join(texts + [_vllm_line(flag) for flag in foreign])


def flags_page(parser: argparse.ArgumentParser) -> str:
    """docs/flags.md: every flag of the parser, and vLLM's others, as tables."""
    lines = [
        "# Flags of `octavo serve`", "",
        "Made by `octavo serve --help=markdown`. Dashes may be underscores; a flag that is on or off has its `--no-…`.",
    ]  # fmt: skip
    for group in parser._action_groups:
        rows = [
            f"| {', '.join(f'`{name}`' for name in action.option_strings if not name.startswith('--no-'))} "
            f"| {_cell(str(action.help).replace('%%', '%'))} |"
            for action in group._group_actions
            if action.help != argparse.SUPPRESS and action.option_strings and action.dest != "help"
        ]
        if rows:
            title = "Configuration" if group.title == "options" else group.title
            lines += ["", f"## {title}", "", "| flag | |", "|---|---|", *rows]
    for answer, title in ANSWERS.items():
        rows = [
            f"| {', '.join(f'`{name}`' for name in (flag.name, *flag.aliases))} "
            f"| {', '.join(f'`{value}`' for value in flag.neutral if value)} | {_cell(flag.why)} |"
            for flag in VLLM_FLAGS
            if flag.answer is answer
        ]
        lines += ["", f"## vLLM's flags: {title}", "", "| flag | values that pass | why |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _section(parser: ArgumentParser, title: str | None, actions: Sequence[argparse.Action]) -> str:
    formatter = parser._get_formatter()
    formatter.start_section(title or "flags")
    formatter.add_arguments([action for action in actions if action.help != argparse.SUPPRESS])
    formatter.end_section()
    return formatter.format_help()


def _vllm_help() -> str:
    return "\n".join(
        title[0].upper()
        + title[1:]
        + ":\n"
        + "\n".join(_vllm_line(flag) for flag in VLLM_FLAGS if flag.answer is answer)
        + "\n"
        for answer, title in ANSWERS.items()
    )


def _vllm_line(flag: VllmFlag) -> str:
    values = " [" + " | ".join(flag.neutral) + "]" if any(flag.neutral) else ""
    return f"  {', '.join((*flag.aliases, flag.name))}{values}\n      {flag.why}"
