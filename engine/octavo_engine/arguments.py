"""The keyword arguments of LLM, in vLLM's names: those that are settings, and what the others are answered.

What vLLM_FLAGS answers on the command line it answers here. Pure but for warnings; called by llm.py.
"""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from octavo_engine.config import ConfigError, EngineConfig, ServerConfig
from octavo_engine.vllm_flags import BY_NAME, Takes, VllmFlag, answers

_MOOT = {
    "served_model_name": "requests name no model here",
    "disable_log_stats": "no statistics are logged",
    "shutdown_timeout": "requests end with the call that made them",
    "mamba_config": "no model with Mamba layers is served by this version",
    "max_logprobs": "up to 20 log-probabilities may be asked for",
}
"""What vLLM's LLM takes too and no flag of vLLM's in the table stands for."""


def engine_config(model: str, tokenizer: str | None, given: Mapping[str, Any]) -> EngineConfig:
    """None is as if it was not given. Warns of what has no effect. Raises TypeError for what does not exist, ValueError
    for what cannot be had."""
    names = {f.name for f in fields(EngineConfig)}
    try:
        for said in _answered({name: value for name, value in given.items() if name not in names}):
            warnings.warn(said, stacklevel=4)
        settings = {name: _plain(name, value) for name, value in given.items() if name in names and value is not None}
        config = EngineConfig(model=model, tokenizer=tokenizer, **settings)
        config.check()
    except ConfigError as error:
        raise ValueError(str(error)) from error
    return config


def _plain(name: str, value: Any) -> Any:
    """torch.bfloat16 as "bfloat16"; a length of -1 or "auto" as None: as long as the model allows."""
    if name == "dtype":
        return str(value).removeprefix("torch.")
    return None if name == "max_model_len" and value in (-1, "auto") else value


def _answered(given: Mapping[str, Any]) -> Iterable[str]:
    of_vllm: dict[str, object] = {}
    for name, value in given.items():
        flag = BY_NAME.get("--" + name.replace("_", "-"))
        if flag is not None:
            if value is not None and value != []:
                of_vllm[flag.dest] = _as_on_a_command_line(flag, value)
        elif name == "max_logprobs" and value is not None and not -1 < value <= 20:
            raise ConfigError(name, value, f"at most 20: {_MOOT[name]}")
        elif name == "otlp_traces_endpoint":
            if value is not None:
                raise ConfigError(name, value, "it to be absent: traces are of the requests of `octavo serve`")
        elif name in _MOOT:
            if value not in (None, False, [], 0, 20):
                yield f"{name} has no effect: {_MOOT[name]}"
        else:
            raise TypeError(_unknown(name))
    yield from answers(of_vllm)


def _as_on_a_command_line(flag: VllmFlag, value: Any) -> object:
    if flag.takes is Takes.NOTHING:
        return bool(value)
    if flag.takes is Takes.VALUES:
        return list(value) if isinstance(value, (list, tuple, set)) else [value]
    return json.dumps(value, default=str) if isinstance(value, (dict, list)) else str(value)


def _unknown(name: str) -> str:
    if name in {f.name for f in fields(ServerConfig)}:
        return f"LLM has no setting {name!r}: it belongs to `octavo serve`"
    known = [f.name for f in fields(EngineConfig)]
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"LLM has no setting {name!r}" + (f"; did you mean {near[0]}?" if near else "")
