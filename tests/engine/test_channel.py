"""The channel between the two processes, and the cost model that predicts a queue's length."""

from __future__ import annotations

import random
import socket
import threading

import msgspec
import pytest

from octavo_engine.core.channel import HEADER, Channel, ChannelClosedError, decode, encode
from octavo_engine.core.cost import StepCost
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
)
from octavo_engine.sampling_params import SamplingParams
from octavo_engine.status import Effective, Failure, FailureCode, Load, Stage

MESSAGES = [
    Start("/models/näme", "abc"),
    Start("/models/x"),
    Submit("1f", [1, 2**31 - 1], SamplingParams(stop=["ü", "\n"], stop_token_ids=(1,), seed=-5), (2, 3), -1, "salt"),
    Submit("0", [0], SamplingParams(seed=2**63 - 1, max_tokens=None)),
    Abort([]),
    Abort(["a", "b"]),
    Shutdown(),
    StageChanged(Stage.LOADING_WEIGHTS, 2**40, 2**41),
    Ready(Effective(model="m", num_blocks=3, driver=None)),
    StepOutput(
        [
            TokenEvent("a", [1], num_cached_tokens=0, queue_s=0.5, prefill_s=0.25),
            TokenEvent("b", [], FinishReason.ERROR, error="no"),
            TokenEvent("c", [2], FinishReason.STOP, stop_token_id=2),
        ],
        Load(1, 2, 3, 0.5, 0.1, None),
        StepStats(0.01, 3, 2, 1, 9),
    ),
    Fatal(Failure(FailureCode.DEVICE_ERROR, "It broke.", detail="ECC")),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_arrives_as_it_was_sent(message):
    frame = encode(message)
    length, kind = HEADER.unpack_from(frame)

    assert len(frame) == HEADER.size + length
    assert decode(kind, frame[HEADER.size :]) == message


def test_messages_cut_and_joined_by_the_socket_arrive_whole_and_in_order():
    ours, theirs = socket.socketpair()
    frames = b"".join(encode(message) for message in MESSAGES)
    rng = random.Random(1)

    def trickle() -> None:
        start = 0
        while start < len(frames):
            size = rng.randrange(1, 30)
            theirs.sendall(frames[start : start + size])
            start += size

    thread = threading.Thread(target=trickle)
    thread.start()
    channel = Channel(ours)

    assert [channel.receive() for _ in MESSAGES] == MESSAGES
    thread.join()
    theirs.close()
    channel.close()


@pytest.mark.parametrize("sent", [b"", b"\x05", encode(Shutdown())[:-1]])
def test_a_peer_that_goes_in_the_middle_of_a_frame_is_noticed(sent: bytes):
    ours, theirs = socket.socketpair()
    theirs.sendall(sent)
    theirs.close()
    channel = Channel(ours)

    with pytest.raises(ChannelClosedError):
        channel.receive()
    with pytest.raises(ChannelClosedError):
        channel.send(Shutdown())
    channel.close()


def test_a_frame_that_is_not_what_its_kind_says_is_refused():
    frame = encode(Abort(["a"]))
    submit = HEADER.unpack_from(encode(MESSAGES[2]))[1]

    with pytest.raises(msgspec.ValidationError):
        decode(submit, frame[HEADER.size :])


def test_sampling_outside_its_range_does_not_pass_the_channel_either():
    """Decoding makes the same dataclass, so the same checks hold on the engine's side."""
    body = encode(MESSAGES[3])[HEADER.size :].replace(b"\xa5top_p\xcb\x3f\xf0", b"\xa5top_p\xcb\x40\x00")

    with pytest.raises((msgspec.ValidationError, ValueError), match="top_p must be"):
        decode(1, body)


# ---- the cost of a step


def learned(observations: list[tuple[int, float]]) -> StepCost:
    cost = StepCost()
    for tokens, seconds in observations:
        cost.observe(tokens, seconds)
    return cost


def test_a_linear_cost_is_found():
    cost = learned([(tokens, 0.01 + 0.0002 * tokens) for tokens in (1, 2048, 16, 500) * 10])

    assert cost.base_s == pytest.approx(0.01, rel=0.01)
    assert cost.per_token_s == pytest.approx(0.0002, rel=0.01)


@pytest.mark.parametrize(
    ("observations", "base_s", "per_token_s"),
    [([], 0.0, 0.0), ([(4, 0.02)] * 5, 0.0, 0.005), ([(1, 0.5), (100, 0.1)], 0.3, 0.0)],
)
def test_what_cannot_be_told_apart_is_not_made_up(observations, base_s: float, per_token_s: float):
    cost = learned(observations)

    assert cost.base_s == pytest.approx(base_s, abs=0.01)
    assert cost.per_token_s == pytest.approx(per_token_s)


def test_new_steps_weigh_more_than_old_ones():
    cost = learned([(n, 0.001 * n) for n in (1, 100)] * 200 + [(n, 0.003 * n) for n in (1, 100)] * 400)

    assert cost.per_token_s == pytest.approx(0.003, rel=0.02)


def test_a_longer_queue_waits_longer_and_an_empty_one_not_at_all():
    cost = learned([(tokens, 0.01 + 0.001 * tokens) for tokens in (1, 100) * 5])
    predicted = [cost.predict_queue_s(tokens, 100, 10) for tokens in (0, 1, 90, 91, 1000)]

    assert predicted[0] == 0.0
    assert predicted == sorted(predicted)
    # 1,000 tokens in twelve steps of 90 beside ten that decode.
    assert predicted[-1] == pytest.approx(1000 * 0.001 + 12 * (0.01 + 10 * 0.001), rel=0.01)
