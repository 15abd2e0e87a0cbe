"""The cache of what the watches told: the newest state counts, whoever brings it."""

from __future__ import annotations

from typing import Any

from octavo_operator.cache import GRAVES, Cache

KEY = ("ns", "qwen")


def document(kind: str, version: int, uid: str = "u1", name: str = "qwen", **more: Any) -> dict[str, Any]:
    metadata = {"namespace": "ns", "name": name, "uid": uid, "resourceVersion": str(version)}
    metadata["labels"] = {"octavo.dev/server": "qwen"}
    metadata["managedFields"] = [{"manager": "x"}]
    return {"kind": kind, "metadata": metadata, **more}


def filled() -> Cache:
    cache = Cache()
    cache.put("LLMServer", document("LLMServer", 5))
    return cache


def test_an_older_state_never_replaces_a_newer_one():
    cache = filled()
    newer = cache.put("Service", document("Service", 9, spec={"port": 2}))
    older = cache.put("Service", document("Service", 8, spec={"port": 1}))
    echo = cache.put("Service", document("Service", 9, spec={"port": 2}))
    seen = cache.seen(KEY)

    assert (newer, older, echo) == (True, False, False)
    assert seen is not None
    assert seen.children["Service"]["spec"] == {"port": 2}


def test_what_is_deleted_does_not_come_back_by_a_late_answer():
    cache = filled()
    cache.put("Service", document("Service", 9))
    dropped = cache.drop("Service", document("Service", 12)["metadata"])
    late = cache.put("Service", document("Service", 11))
    again = cache.put("Service", document("Service", 13, uid="u2"))

    assert (dropped, late, again) == (True, False, True)


def test_a_late_word_of_a_deletion_does_not_take_the_one_that_came_after_it():
    cache = filled()
    cache.put("Service", document("Service", 13, uid="u2"))

    assert not cache.drop("Service", document("Service", 12)["metadata"])
    assert cache.version("Service", document("Service", 1)["metadata"]) == 13


def test_children_without_their_server_are_not_a_server():
    cache = Cache()
    cache.put("Service", document("Service", 9))

    assert cache.seen(KEY) is None
    assert cache.servers() == [KEY]


def test_nothing_is_left_of_a_server_that_is_gone_with_its_children():
    cache = filled()
    cache.drop("LLMServer", document("LLMServer", 6)["metadata"])

    assert cache.servers() == []


def test_managed_fields_are_not_kept_and_graves_are_bounded():
    cache = filled()
    for number in range(GRAVES + 10):
        cache.drop("Pod", document("Pod", 10, name=f"p{number}")["metadata"])
    seen = cache.seen(KEY)

    assert seen is not None
    assert "managedFields" not in seen.resource["metadata"]
    assert len(cache._graves) == GRAVES


def test_what_a_list_brought_can_be_deleted_and_scaled_though_its_items_do_not_name_their_kind():
    """An operator that had just started could neither delete nor scale what no watch had told it anew."""
    cache = Cache()
    for version, kind in enumerate(("LLMServer", "Ingress"), start=5):
        item = document(kind, version)
        del item["kind"]
        cache.put(kind, item)
    seen = cache.seen(KEY)

    assert seen is not None
    assert (seen.resource["kind"], seen.children["Ingress"]["kind"]) == ("LLMServer", "Ingress")
