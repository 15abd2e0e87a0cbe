"""An engine without a model: it speaks the channel, and its answer to a prompt is the prompt itself, then end of text.

With ignore_eos it repeats the prompt. A prompt that begins with "!" is an order:
  !die     end by SIGKILL            !fatal   announce a failure and exit with its status
  !error   end this request in error !late    the same, after three tokens
  !hang    take no further step
Its pace and its start-up come from the environment, as JSON in OCTAVO_SCRIPT.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from octavo_engine.config import ArgumentParser, EngineConfig, add_arguments, from_namespace
from octavo_engine.core.channel import Channel, ChannelClosedError
from octavo_engine.core.messages import (
    Abort,
    Fatal,
    FinishReason,
    Ready,
    Shutdown,
    StageChanged,
    Start,
    StepOutput,
    StepStats,
    Submit,
    TokenEvent,
    TokenLogprobs,
)
from octavo_engine.status import Effective, Failure, FailureCode, Load, Stage

SCRIPT = {
    "step_s": 0.001,
    "load_s": 0.0,
    "max_model_len": 512,
    "deaf": False,  # ignore aborts
    "fail_loading": None,  # a FailureCode
    "predicted_queue_s": 3.0,
    "error": "the model's output was not finite",
    **json.loads(os.environ.get("OCTAVO_SCRIPT", "{}")),
}


class Sequence:
    def __init__(self, submit: Submit, order: str) -> None:
        self.submit, self.order, self.made = submit, order, 0

    def next(self) -> TokenEvent:
        sampling, prompt = self.submit.sampling, self.submit.prompt_token_ids
        eos = self.submit.eos_token_ids[0]
        index, self.made = self.made, self.made + 1
        token = eos if index == len(prompt) and not sampling.ignore_eos else prompt[index % len(prompt)]
        stops = {*sampling.stop_token_ids, *(() if sampling.ignore_eos else self.submit.eos_token_ids)}
        stop = token if token in stops and self.made >= sampling.min_tokens else None
        reason = FinishReason.STOP if stop is not None else None
        if reason is None and self.made == sampling.max_tokens:
            reason = FinishReason.LENGTH
        first = index == 0
        return TokenEvent(
            self.submit.request_id, [token], reason, stop,
            num_cached_tokens=0 if first else None, queue_s=0.0 if first else None, prefill_s=0.001 if first else None,
            logprobs=[] if sampling.logprobs is None else [chances(token, sampling.logprobs)],
            prompt_logprobs=None if sampling.prompt_logprobs is None or not first
            else [chances(token, sampling.prompt_logprobs) for token in prompt[1:]],
        )  # fmt: skip


def chances(token: int, count: int) -> TokenLogprobs:
    """A made-up distribution: the token's own id tells its log-probability, and ids from 65 ("b") on are likelier."""
    return TokenLogprobs(-token / 100, count + 1, [(65 + i, -0.01 * (i + 1)) for i in range(count)])


class ScriptedEngine:
    def __init__(self, channel: Channel, config: EngineConfig) -> None:
        self.channel, self.config = channel, config
        self.max_num_seqs = config.max_num_seqs or 256
        self.inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.running: dict[str, Sequence] = {}
        self.waiting: dict[str, Sequence] = {}
        self.events: list[TokenEvent] = []
        self.steps = 0
        self.texts: dict[int, str] = {}

    def read(self) -> None:
        while True:
            try:
                self.inbox.put(self.channel.receive())
            except ChannelClosedError:
                os._exit(0)

    def run(self) -> None:
        threading.Thread(target=self.read, daemon=True).start()
        start = self.inbox.get()
        if isinstance(start, Shutdown):
            return
        assert isinstance(start, Start)
        vocabulary = json.loads((Path(start.model_path) / "tokenizer.json").read_text())["model"]["vocab"]
        self.texts = {id: token for token, id in vocabulary.items()}
        self.load()
        effective = Effective(
            model=start.model_path, dtype="float32", kv_dtype="float32", max_model_len=SCRIPT["max_model_len"],
            block_size=16, num_blocks=100, kv_tokens=1600, attention_backend="none", engine_version="scripted",
        )  # fmt: skip
        self.channel.send(Ready(effective))
        while True:
            while not self.inbox.empty() or not (self.running or self.waiting or self.events):
                message = self.inbox.get()
                if isinstance(message, Shutdown):
                    return
                self.take(message)
            self.step()

    def load(self) -> None:
        if code := SCRIPT["fail_loading"]:
            self.channel.send(Fatal(Failure(FailureCode(code), "The script says so.", "change the script")))
            os._exit(FailureCode(code).exit_status)
        total, parts = 1000, 20
        for part in range(parts + 1):
            self.channel.send(StageChanged(Stage.LOADING_WEIGHTS, total * part // parts, total))
            time.sleep(SCRIPT["load_s"] / parts)

    def take(self, message: object) -> None:
        if isinstance(message, Submit):
            text = "".join(self.texts.get(id, "") for id in message.prompt_token_ids[:8])
            order = text[1:].split("Ġ")[0].split("!")[0] if text.startswith("!") else ""
            self.waiting[message.request_id] = Sequence(message, order)
        elif isinstance(message, Abort) and not SCRIPT["deaf"]:
            for id in message.request_ids:
                if self.running.pop(id, None) or self.waiting.pop(id, None):
                    self.events.append(TokenEvent(id, [], FinishReason.ABORT))

    def step(self) -> None:
        time.sleep(SCRIPT["step_s"])
        while self.waiting and len(self.running) < self.max_num_seqs:
            id = next(iter(self.waiting))
            self.running[id] = self.waiting.pop(id)
        events, self.events = self.events, []
        for id, sequence in list(self.running.items()):
            event = self.obey(sequence) or sequence.next()
            if event.finish_reason is not None:
                del self.running[id]
            events.append(event)
        self.steps += 1
        queue_s = SCRIPT["predicted_queue_s"] if self.waiting else 0.0
        load = Load(
            running=len(self.running), waiting=len(self.waiting),
            waiting_prefill_tokens=sum(len(s.submit.prompt_token_ids) for s in self.waiting.values()),
            kv_usage=len(self.running) / self.max_num_seqs, predicted_queue_s=queue_s,
        )  # fmt: skip
        self.channel.send(StepOutput(events, load, StepStats(step_s=0.001, num_steps=self.steps)))

    def obey(self, sequence: Sequence) -> TokenEvent | None:
        match sequence.order:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "fatal":
                self.channel.send(Fatal(Failure(FailureCode.DEVICE_ERROR, "The GPU fell off the bus.", "replace it")))
                os._exit(FailureCode.DEVICE_ERROR.exit_status)
            case "hang":
                time.sleep(3600)
            case "error" | "late" if sequence.order == "error" or sequence.made == 3:
                return TokenEvent(sequence.submit.request_id, [], FinishReason.ERROR, error=SCRIPT["error"])
        return None


def main() -> int:
    parser = ArgumentParser(prog="scripted-engine")
    parser.add_argument("--fd", type=int, required=True)
    add_arguments(parser, [EngineConfig])
    namespace = parser.parse_args()
    channel = Channel(socket.socket(fileno=namespace.fd))
    with contextlib.suppress(ChannelClosedError):  # the server has ended while we loaded
        ScriptedEngine(channel, from_namespace(EngineConfig, namespace)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
