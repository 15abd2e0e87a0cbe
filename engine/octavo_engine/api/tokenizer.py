"""Text to token ids and back, from the files beside a checkpoint. Used by the API process and by LLM.

Built on `tokenizers` alone: importing transformers takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from octavo_engine.config import ServerConfig
from octavo_engine.status import Failure, FailureCode, FatalError

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class GenerationDefaults:
    """What generation_config.json says for requests that say nothing; None where it says nothing either."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None


class Tokenizer:
    """The tokenizer of one checkpoint. Thread-safe; encoding releases the GIL.

    eos_token_ids: every id that ends an answer; checkpoints spread them over four files.
    vocab_size: rows of the model's embedding; an id beyond them must never reach the engine.
    max_token_chars: no token stands for more characters, so a text of n characters has at least n / this tokens.
    """

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        *,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        special_tokens: dict[str, str],
        add_bos_token: bool | None = None,
    ) -> None:
        self.core = core
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self.special_tokens = special_tokens
        added = core.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.max_token_chars = max(map(len, core.get_vocab()), default=1)
        self.is_byte_level = _decodes_bytes(json.loads(core.to_str()).get("decoder")) if core.decoder else False
        bos = special_tokens.get("bos_token")
        self._bos_id = core.token_to_id(bos) if bos else None
        self._add_bos_token = add_bos_token
        self._texts: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path, model_folder: Path | None = None) -> Tokenizer:
        """model_folder: the checkpoint, when the tokenizer comes from another folder.

        Raises FatalError(MODEL_INVALID) when a file is missing or is not what its name says.
        """
        model_folder = model_folder or folder
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise _invalid(
                f"{folder} has no tokenizer.json.",
                "copy it there from the model's repository, or give --tokenizer MODEL; where the repository has none, "
                "AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER) writes one",
            )
        try:
            core = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every bad file
            raise _invalid(f"{path} cannot be read.", "download the model again", detail=str(error)) from error
        # Files saved after training may still truncate or pad; a server's prompts are neither.
        core.no_truncation()
        core.no_padding()
        settings = read_json(folder / "tokenizer_config.json")
        special = _special_tokens(settings, read_json(folder / "special_tokens_map.json"))
        config = read_json(model_folder / "config.json")
        text_config = config.get("text_config")
        config = {**config, **(text_config if isinstance(text_config, dict) else {})}
        generation = read_json(model_folder / "generation_config.json")
        eos = {*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))}
        if (name := special.get("eos_token")) and (id := core.token_to_id(name)) is not None:
            eos.add(id)
        add_bos = settings.get("add_bos_token")
        return cls(
            core,
            vocab_size=int(config.get("vocab_size") or core.get_vocab_size()),
            eos_token_ids=tuple(sorted(eos)),
            special_tokens=special,
            add_bos_token=add_bos if isinstance(add_bos, bool) else None,
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.core.encode(text, add_special_tokens=add_special_tokens).ids
        if add_special_tokens and self._bos_id is not None and self._add_bos_token is not None:
            # tokenizer_config.json overrules the post-processor of tokenizer.json, as in transformers.
            has_bos = ids[:1] == [self._bos_id]
            if self._add_bos_token and not has_bos:
                ids.insert(0, self._bos_id)
            elif has_bos and not self._add_bos_token:
                del ids[0]
        return ids

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the whole list. Ids outside the vocabulary are skipped."""
        text: str = self.core.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def decode_one(self, token_id: int) -> str:
        """The text of a token on its own; a piece of a character becomes U+FFFD."""
        # Kept: scoring a long prompt asks for a hundred thousand of them, and a vocabulary is no larger.
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def spellings(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """The ids of each word, at the beginning of a text and after a space."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for text in (word.lstrip(), " " + word.lstrip()):
                ids = tuple(self.core.encode(text, add_special_tokens=False).ids)
                if ids and max(ids) < self.vocab_size:
                    found[ids] = None
        return tuple(found)

    def special_id(self, text: str) -> int | None:
        """The id of the special token that this text is, or None when it is no special token."""
        id: int | None = self.core.token_to_id(text)
        return id if id in self.special_ids else None

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it, or None for an id outside of it."""
        text: str | None = self.core.id_to_token(token_id)
        return text


def generation_defaults(folder: Path) -> GenerationDefaults:
    """The model's own sampling defaults (vLLM's --generation-config auto)."""
    document = read_json(folder / "generation_config.json")

    def number(name: str) -> float | None:
        value = document.get(name)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    top_k, max_tokens = number("top_k"), number("max_new_tokens")
    return GenerationDefaults(
        temperature=number("temperature"),
        top_p=number("top_p"),
        top_k=None if top_k is None else int(top_k),
        min_p=number("min_p"),
        repetition_penalty=number("repetition_penalty"),
        max_tokens=None if max_tokens is None else int(max_tokens),
    )


def chosen_defaults(folder: Path, config: ServerConfig) -> GenerationDefaults:
    """--generation-config and, over it, --override-generation-config, both of which have been checked."""
    match config.generation_config:
        case "auto":
            defaults = generation_defaults(folder)
        case "vllm":
            defaults = GenerationDefaults()
        case other:
            defaults = generation_defaults(Path(other))
    override = json.loads(config.override_generation_config or "{}")
    if "max_new_tokens" in override:
        override["max_tokens"] = override.pop("max_new_tokens")
    return replace(defaults, **override)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} when there is no such file. Raises FatalError(MODEL_INVALID) when it is something else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _invalid(f"{path} cannot be read.", "download the model again", detail=str(error)) from error
    if not isinstance(document, dict):
        raise _invalid(f"{path} is not a JSON object.", "download the model again")
    return document


def _invalid(message: str, fix: str, detail: str | None = None) -> FatalError:
    return FatalError(Failure(FailureCode.MODEL_INVALID, message, fix, detail=detail))


def _ids(value: object) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _special_tokens(settings: dict[str, Any], special_map: dict[str, Any]) -> dict[str, str]:
    """Name → text. A token is written as a string or as an object with its content."""
    tokens: dict[str, str] = {}
    for source in (special_map, settings):
        for name in SPECIAL_TOKEN_NAMES:
            value = source.get(name)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                tokens[name] = value
    return tokens


def _decodes_bytes(decoder: dict[str, Any] | None) -> bool:
    """Whether the text of ids is the concatenation of their bytes and nothing else."""
    if decoder is None:
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return len(parts) == 1 and _decodes_bytes(parts[0])
    return decoder.get("type") == "ByteLevel"
