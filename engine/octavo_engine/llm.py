"""The engine in this process: `LLM(model).generate(prompts, SamplingParams(...))`, as vLLM has it.

The same scheduler, runner and text as behind the server, without the two processes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from octavo_engine.api.chat_template import ChatTemplate
from octavo_engine.api.detokenizer import TextStream
from octavo_engine.api.engine_client import one_sequence
from octavo_engine.api.find_model import ModelFolder, download, local_folder, store_of
from octavo_engine.api.output.parser import REASONING_PARSERS, OutputFormat
from octavo_engine.api.output.reasoning import begun_by
from octavo_engine.api.structured import after_thinking
from octavo_engine.api.tokenizer import Tokenizer, chosen_defaults
from octavo_engine.api.tool_messages import calls_for_template
from octavo_engine.arguments import engine_config
from octavo_engine.beam_search import BeamSearchOutput, BeamSearchParams, search
from octavo_engine.config import ConfigError, EngineConfig, ServerConfig
from octavo_engine.core.messages import FinishReason, Grammar, Submit, TokenEvent, TokenLogprobs
from octavo_engine.outputs import CompletionOutput, Logprob, RequestOutput
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.status import Effective
from octavo_engine.structured.grammar import check, grammar_of
from octavo_engine.structured.params import StructuredOutputsParams
from octavo_engine.structured.settings import StructuredOutputsSettings

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, {"prompt": text} or {"prompt_token_ids": ids}; both of these may have a "cache_salt"."""
Message: TypeAlias = Mapping[str, Any]
UseTqdm: TypeAlias = bool | Callable[..., Any]

THINKING_TOKENS = 16
"""Of a prompt's end, in which the tag that begins the thinking would be."""
_POOLING = "this engine generates text; it has no pooling models"
NOT_HERE = {
    **dict.fromkeys(("encode", "embed", "classify", "score", "reward"), _POOLING),
    **dict.fromkeys(("sleep", "wake_up"), "weights stay on the device while the process lives"),
    **dict.fromkeys(("start_profile", "stop_profile"), "profile with the tools of the device"),
    **dict.fromkeys(("collective_rpc", "apply_model"), "no code is run in the engine on a caller's word"),
    **dict.fromkeys(("enqueue", "enqueue_chat", "wait_for_completion"), "AsyncLLM takes requests one by one"),
    **dict.fromkeys(("add_lora", "remove_lora", "list_loras", "pin_lora"), "adapters are not supported"),
    **dict.fromkeys(("pause_generation", "resume_generation", "is_paused"), "generating does not pause"),
    **dict.fromkeys(
        ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"),
        "weights are those of the checkpoint",
    ),
    **dict.fromkeys(("reset_mm_cache", "reset_encoder_cache"), "models of text alone are supported"),
    **dict.fromkeys(("from_engine_args", "from_vllm_config"), "give the engine's arguments to the class itself"),
    "is_sleeping": "weights stay on the device while the process lives",
    "llm_engine": "the engine has no interface of its own; AsyncLLM takes requests one by one",
    "get_metrics": "metrics belong to `octavo serve`",
}
"""What vLLM's LLM and AsyncLLM have beyond, with the reason why it is not here."""


class Encoded(NamedTuple):
    """A prompt as the engine gets it. text: None where it was given as ids alone."""

    text: str | None
    ids: list[int]
    cache_salt: str | None = None


class LLM:
    """A loaded model. Takes the fields of EngineConfig as keyword arguments, under vLLM's names; what vLLM takes beyond
    them is answered as on the command line: warned of when it changes nothing, refused when it would.

    chat_template: a file, or the template itself. reasoning_parser: how the model marks its thinking, after which
    structured output begins. generation_config: where default sampling parameters come from, as for
    --generation-config; override_generation_config: further ones, which win. structured_outputs_config: as for the flag
    of that name. max_decode_slowdown: unless it is given, prompts may fill the steps of `generate`, `chat` and
    `beam_search`, which return when all is done; AsyncLLM, whose answers are read as they grow, has the default of
    `octavo serve`.

    Raises ValueError for a setting that cannot be had, TypeError for one that does not exist, FatalError
    (octavo_engine.status) when the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        chat_template: str | Path | None = None,
        skip_tokenizer_init: bool = False,
        reasoning_parser: str | None = None,
        structured_outputs_config: str | Mapping[str, Any] | None = None,
        generation_config: str = "auto",
        override_generation_config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if settings.get("max_decode_slowdown") is None:
            # Nobody reads along where all comes at once, and full steps are the quickest.
            settings["max_decode_slowdown"] = 0.0
        self._config = engine_config(model, tokenizer, settings)
        self._structured = StructuredOutputsSettings.of(structured_outputs_config)
        if reasoning_parser and reasoning_parser not in REASONING_PARSERS:
            known = ", ".join(REASONING_PARSERS)
            raise ValueError(f"reasoning_parser: got {reasoning_parser!r}, expected one of {known}")
        self._thinking = REASONING_PARSERS[reasoning_parser] if reasoning_parser else None
        # As in the engine process: waiting threads must not starve each other. Too late once torch is imported.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from octavo_engine.core.process import engine_of
        from octavo_engine.runner.model_runner import ModelRunner
        from octavo_engine.structured.matcher import Matchers

        found = _find(model, self._config)
        texts = found.path
        if tokenizer is not None or self._config.tokenizer_revision is not None:
            texts = _find(tokenizer or model, self._config, weights=False).path
        try:
            runner = ModelRunner(self._config)
            loaded = runner.load(found.path, lambda stage, done, total: None, found.resolved_revision)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        self.effective: Effective = loaded.effective
        self._tokenizer = None if skip_tokenizer_init else Tokenizer.load(texts, model_folder=found.path)
        self._template = None
        if self._tokenizer is not None:
            self._template = ChatTemplate.load(texts, self._tokenizer.special_tokens, chat_template or None)
        self._special_tokens = self._tokenizer.special_tokens if self._tokenizer else {}
        self._eos = self._tokenizer.eos_token_ids if self._tokenizer else ()
        self.vocab_size: int = self._tokenizer.vocab_size if self._tokenizer else loaded.model.vocab_size
        overridden = json.dumps(dict(override_generation_config or {}))
        of_server = ServerConfig(generation_config=generation_config, override_generation_config=overridden)
        self._defaults = chosen_defaults(found.path, of_server)
        constraints = None
        if self._tokenizer is not None:
            constraints = Matchers(texts / "tokenizer.json", loaded.model.vocab_size)
        self._engine = engine_of(self._config, runner, loaded, constraints)
        while self._engine.prepare():  # there is no idle moment later on
            pass
        self._num_requests = 0
        self._grammars: dict[StructuredOutputsParams, str] = {}
        """The last one, made and tried: many prompts share it."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        priority: Sequence[int] | None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """One RequestOutput for each prompt, in order; all of them are computed together.

        sampling_params: one for all prompts, or one for each; None takes the model's defaults. use_tqdm: whether there
        is a progress bar, or what makes one in place of tqdm. priority: of each prompt, smaller ones go first.
        Raises ValueError for a prompt that is empty, too long or holds ids outside the vocabulary.
        """
        refuse(
            lora_request=lora_request, tokenization_kwargs=tokenization_kwargs, mm_processor_kwargs=mm_processor_kwargs
        )
        listed = cast(list[Prompt], [prompts] if _is_one_prompt(prompts) else list(prompts))
        encoded = [self._encode(prompt) for prompt in listed]
        return self._run(encoded, self._sampling(sampling_params, len(encoded)), use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: None = None,
        mm_processor_kwargs: None = None,
        *,
        documents: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation ([{"role": …, "content": …}, …]) or a list of them.

        chat_template: a Jinja template in place of the model's. tools: functions as OpenAI writes them; what the model
        says of them is in the text, in its own format. chat_template_kwargs: further variables of the template.
        """
        refuse(
            lora_request=lora_request, tokenization_kwargs=tokenization_kwargs, mm_processor_kwargs=mm_processor_kwargs
        )
        if chat_template_content_format not in ("auto", "string"):
            raise ValueError('chat_template_content_format must be "auto" or "string": templates get text')
        if continue_final_message and add_generation_prompt:
            raise ValueError("continue_final_message needs add_generation_prompt=False: one message or another goes on")
        template = self._template if chat_template is None else ChatTemplate(chat_template, self._special_tokens)
        if template is None:
            raise ValueError(f"{self._config.model} has no chat template; use generate, or give chat_template")
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Sequence[Sequence[Message]] = [messages] if one else messages  # type: ignore[list-item,assignment]
        texts = [
            template.render(
                [_for_template(message) for message in conversation], add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, tools=tools, documents=documents,
                variables=chat_template_kwargs,
            )
            for conversation in conversations
        ]  # fmt: skip
        encoded = [
            Encoded(text, self._checked(self.get_tokenizer().encode(text, add_special_tokens=False))) for text in texts
        ]
        return self._run(encoded, self._sampling(sampling_params, len(encoded)), use_tqdm)

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The beam_width likeliest answers to each prompt. concurrency_limit: prompts that are searched at once.

        Raises ValueError as `generate` does.
        """
        refuse(lora_request=lora_request)
        from tqdm import tqdm

        listed = cast(list[Prompt], [prompts] if _is_one_prompt(prompts) else list(prompts))
        encoded = [self._encode(prompt).ids for prompt in listed]
        room = self.effective.max_model_len - max(map(len, encoded), default=0)
        if params.max_tokens > room:
            raise ValueError(f"max_tokens must be at most {room}, which is the room that the longest prompt leaves")

        def next_tokens(beams: Sequence[list[int]], many: int) -> list[dict[int, Logprob]]:
            greedy = SamplingParams(temperature=0.0, max_tokens=1, logprobs=many, detokenize=False, ignore_eos=True)
            outputs = self._run([Encoded(None, beam) for beam in beams], [greedy] * len(beams), False)
            return [(output.outputs[0].logprobs or [{}])[0] for output in outputs]

        many = max(1, len(encoded) if concurrency_limit is None else concurrency_limit)
        total = params.max_tokens * -(-len(encoded) // many)
        with tqdm(total=total, desc="Beam search", disable=not use_tqdm, dynamic_ncols=True) as bar:
            found = []
            for start in range(0, len(encoded), many):
                found += search(encoded[start : start + many], params, self._eos, next_tokens, bar.update)
        for sequence in (one for sequences in found for one in sequences):
            sequence.text = self.get_tokenizer().decode(sequence.tokens)
        return [BeamSearchOutput(sequences) for sequences in found]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget the blocks of earlier prompts; True when it is done."""
        # Nothing runs between two calls, and there is no connector.
        self._engine.scheduler.pool.forget_cached()
        return True

    if not TYPE_CHECKING:  # to which a method that is not there is an error as it stands

        def __getattr__(self, name: str) -> Any:
            raise AttributeError(f"LLM.{name}: {NOT_HERE.get(name, 'there is no such attribute')}")

    def get_tokenizer(self) -> Tokenizer:
        """Raises ValueError when it was skipped."""
        if self._tokenizer is None:
            raise ValueError("skip_tokenizer_init: prompts must be token ids, and there is no text")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """SamplingParams with what the model's generation_config.json says."""
        d = self._defaults
        given = {
            "temperature": d.temperature, "top_p": d.top_p, "top_k": d.top_k, "min_p": d.min_p,
            "repetition_penalty": d.repetition_penalty, "max_tokens": d.max_tokens,
        }  # fmt: skip
        known: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(**known)

    def _run(
        self,
        prompts: Sequence[Encoded],
        sampling: list[SamplingParams],
        use_tqdm: UseTqdm,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        if priority is not None and len(priority) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(priority)} priorities: give one for each prompt")
        outputs, answers, submits = [], {}, []
        for index, (prompt, params) in enumerate(zip(prompts, sampling, strict=True)):
            of_prompt = self.begin(str(self._num_requests), prompt, params, 0 if priority is None else priority[index])
            self._num_requests += 1
            outputs.append(of_prompt.output)
            answers.update(of_prompt.answers)
            submits += of_prompt.submits
        for submit in submits:
            self._engine.submit(submit)
        try:
            self._drain(answers, use_tqdm)
        finally:
            # An interrupt in the middle (Ctrl-C in a notebook) must not leave requests behind for the next call.
            self._engine.abort(list(answers))
            while self._engine.has_work:
                self._engine.step()
        return outputs

    def begin(self, request_id: str, prompt: Encoded, params: SamplingParams, priority: int = 0) -> Begun:
        """What is to be submitted for a prompt, and where its answers will be. Raises ValueError."""
        ids = prompt.ids
        params = self._resolved(params)
        grammar = self._grammar(params, prompt.text, ids)
        begun = Begun(RequestOutput(request_id, prompt.text, ids, finished=False), {}, [])
        room = self.effective.max_model_len - len(ids)
        for index in range(params.n):
            each = one_sequence(params, index, min(params.max_tokens or room, room))
            stream = None
            if params.detokenize and self._tokenizer is not None:
                stream = TextStream(self._tokenizer, each)
            id = f"{request_id}-{index}"
            begun.answers[id] = _Answer(begun.output, index, stream, frozenset(params.stop_token_ids), self._tokenizer)
            salt = prompt.cache_salt
            begun.submits.append(Submit(id, ids, each, self._eos, priority=priority, cache_salt=salt, grammar=grammar))
        return begun

    def _resolved(self, params: SamplingParams) -> SamplingParams:
        """With bad words spelled in ids. Raises ValueError for an id outside the vocabulary."""
        for name, largest in params.named_ids.items():
            if largest >= self.vocab_size:
                raise ValueError(f"{name}: {largest} is outside the vocabulary of {self.vocab_size}")
        if not params.bad_words:
            return params
        return replace(params, bad_words_ids=self.get_tokenizer().spellings(params.bad_words))

    def _grammar(self, params: SamplingParams, prompt: str | None, ids: list[int]) -> Grammar | None:
        """Raises ValueError for one that cannot be compiled."""
        if params.structured_outputs is None:
            return None
        text = self._grammars.get(params.structured_outputs)
        if text is None:
            text = grammar_of(self._structured.applied(params.structured_outputs), self.get_tokenizer().special_id)
            check(text)
            self._grammars = {params.structured_outputs: text}
        grammar = Grammar(text)
        if self._thinking is None or self._structured.enable_in_reasoning:
            return grammar
        tokenizer = self.get_tokenizer()
        end = prompt if prompt is not None else tokenizer.decode(ids[-THINKING_TOKENS:], skip_special_tokens=False)
        return after_thinking(grammar, OutputFormat(reasoning=self._thinking, begun=begun_by(end)), tokenizer)

    def _drain(self, answers: dict[str, _Answer], use_tqdm: UseTqdm) -> None:
        from tqdm import tqdm

        make = use_tqdm if callable(use_tqdm) else tqdm
        with make(total=len(answers), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            num_tokens, started = 0, time.monotonic()
            while self._engine.has_work:
                for event in self._engine.step().events:
                    answer = answers[event.request_id]
                    num_tokens += len(event.token_ids)
                    if answer.take(event):
                        self._engine.abort([event.request_id])
                    if event.finish_reason is not None:
                        bar.update()
                        bar.set_postfix_str(f"{num_tokens / (time.monotonic() - started):.0f} output tokens/s")

    def _encode(self, prompt: Prompt) -> Encoded:
        if isinstance(prompt, Mapping):
            return self._encode_mapping(prompt)
        if isinstance(prompt, str):
            return Encoded(prompt, self._checked(self.get_tokenizer().encode(prompt)))
        return Encoded(None, self._checked(list(prompt)))

    def _encode_mapping(self, prompt: Mapping[str, Any]) -> Encoded:
        asked = {name for name, value in prompt.items() if value not in (None, {}, [])}
        if unknown := sorted(asked - {"prompt", "prompt_token_ids", "cache_salt"}):
            raise ValueError(
                f"a prompt's {unknown[0]} is not supported: it has prompt, prompt_token_ids and cache_salt"
            )
        text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if ids is None and text is None:
            raise ValueError(f'a prompt needs "prompt" or "prompt_token_ids", got the keys {sorted(prompt)}')
        encoded = self._encode(text) if ids is None else self._encode(list(ids))  # type: ignore[arg-type]
        return Encoded(text, encoded.ids, prompt.get("cache_salt"))

    def _checked(self, ids: list[int]) -> list[int]:
        limit = self.effective.max_model_len
        if not 0 < len(ids) < limit:
            raise ValueError(f"a prompt must have 1 to {limit - 1} tokens (max_model_len {limit}), got {len(ids)}")
        for token in (min(ids), max(ids)):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return ids

    def _sampling(self, params: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise ValueError(f"{count} prompts and {len(params)} sampling_params: give one, or one for each prompt")
        return list(params)


@dataclass
class Begun:
    """One prompt on its way: its output, the answers in it by the id of their sequence, and what to submit."""

    output: RequestOutput
    answers: dict[str, _Answer]
    submits: list[Submit]


@dataclass
class _Answer:
    """One sequence on its way into its RequestOutput."""

    output: RequestOutput
    index: int
    text: TextStream | None
    stop_token_ids: frozenset[int]
    tokenizer: Tokenizer | None

    def __post_init__(self) -> None:
        self.completion = CompletionOutput(self.index, "", [])
        self.output.outputs.append(self.completion)
        self._stopped = False

    def take(self, event: TokenEvent) -> bool:
        """Add what an event brings; True when a stop string ended the answer and the engine should be told.

        Raises ValueError when the engine found that the request itself is at fault.
        """
        if event.error_param is not None:
            raise ValueError(f"{event.error_param}: {event.error}")
        if event.prompt_logprobs is not None:
            ids = self.output.prompt_token_ids[1:]
            scored = [self._logprob(*of) for of in zip(ids, event.prompt_logprobs, strict=True)]
            self.output.prompt_logprobs = [None, *scored]
        if event.num_cached_tokens is not None:
            self.output.num_cached_tokens = event.num_cached_tokens
        if self._stopped:
            return False
        done = self.completion
        for token, chances in zip(event.token_ids, event.logprobs, strict=False):
            done.logprobs = done.logprobs or []
            done.logprobs.append(self._logprob(token, chances))
        num_tokens, stop = len(event.token_ids), None
        if self.text is not None:
            delta = self.text.push(
                event.token_ids, last=event.finish_reason is not None, stop_token_id=event.stop_token_id
            )
            done.text += delta.text
            num_tokens, stop = delta.num_tokens, delta.stop
        done.token_ids += event.token_ids[:num_tokens]
        if done.logprobs is not None:
            del done.logprobs[len(done.token_ids) :]
            done.cumulative_logprob = sum(
                of[token].logprob for of, token in zip(done.logprobs, done.token_ids, strict=True)
            )
        if stop is not None:
            self._stopped = True
            done.finish_reason, done.stop_reason = FinishReason.STOP.value, stop
            self._ended()
            return event.finish_reason is None
        if event.finish_reason is not None:
            done.finish_reason = event.finish_reason.value
            if event.stop_token_id in self.stop_token_ids:
                done.stop_reason = event.stop_token_id
            self._ended()
        return False

    def _ended(self) -> None:
        self.output.finished = all(one.finish_reason is not None for one in self.output.outputs)

    def _logprob(self, token: int, chances: TokenLogprobs) -> dict[int, Logprob]:
        def text(id: int) -> str | None:
            return self.tokenizer.decode_one(id) if self.tokenizer is not None else None

        found = {id: Logprob(value, rank, text(id)) for rank, (id, value) in enumerate(chances.top, 1)}
        found[token] = Logprob(chances.logprob, chances.rank, text(token))
        return found


def _find(name: str, config: EngineConfig, weights: bool = True) -> ModelFolder:
    folder = local_folder(name, of="model" if weights else "tokenizer")
    if folder is not None:
        return folder
    revision = config.revision if weights else config.tokenizer_revision
    store = store_of(config, name)
    return download(name, revision, config.download_dir, lambda done, total: None, weights=weights, store=store)


def _is_one_prompt(prompts: Any) -> bool:
    if isinstance(prompts, (str, Mapping)):
        return True
    return bool(prompts) and isinstance(prompts[0], int)


def _for_template(message: Message) -> dict[str, Any]:
    """As templates read it: text parts joined, arguments of earlier calls as objects."""
    document = dict(message)
    if isinstance(content := document.get("content"), list):
        if any(not isinstance(part, Mapping) or not isinstance(part.get("text"), str) for part in content):
            raise ValueError("a message's content must be text, or a list of text parts: this model reads text")
        document["content"] = "\n".join(part["text"] for part in content)
    calls_for_template(document)
    return document


def refuse(**given: object) -> None:
    """Raises ValueError for an argument of vLLM's that asks for what is not here."""
    for name, value in given.items():
        if value not in (None, {}, []):
            raise ValueError(f"{name}: {_REFUSED[name]}")


_REFUSED = {
    "lora_request": "adapters are not supported; merge the adapter into the checkpoint",
    "tokenization_kwargs": 'not supported; tokenize the prompt yourself and give {"prompt_token_ids": ids}',
    "mm_processor_kwargs": "models of text alone are supported",
    "trace_headers": "traces are of the requests of `octavo serve`",
}
