"""Lists of the objects of all tasks, page by page, of what the caller may list."""

from __future__ import annotations

import random

import pytest

import holdfast_coordinator.objects
from holdfast_core.model.errors import ErrorCode
from holdfast_proto.v1 import state_pb2
from tests.coordinator.rig import Client, empty_object_commit, refused


async def store(client: Client, task_id: str) -> str:
    """Store an object without bytes; return its id."""
    request = state_pb2.BeginObjectRequest(task_id=task_id, nonce=random.randbytes(16))
    begun = await client.state("BeginObject", request)
    await client.state("CommitObject", empty_object_commit(begun, task_id))
    return str(begun.session_id)


async def pages(client: Client) -> list[list[str]]:
    """Ids of all objects, by page."""
    found, token = [], ""
    while True:
        answer = await client.state("ListObjects", state_pb2.ListObjectsRequest(page_token=token))
        found.append([each.storage_id for each in answer.objects])
        token = answer.next_page_token
        if not token:
            return found


async def test_all_objects_come_in_pages_and_only_those_that_may_be_listed(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await pages(client) == [[]]
    made = {task: [await store(client, task) for _ in range(3)] for task in ("alpha", "beta", "gamma")}
    every = [each for task in sorted(made) for each in made[task]]
    assert sorted((await pages(client))[0]) == sorted(every)
    monkeypatch.setattr(holdfast_coordinator.objects, "LIST_ITEMS_MAX", 2)
    told = await pages(client)
    assert [len(page) for page in told] == [2, 2, 2, 2, 1]
    assert sorted(each for page in told for each in page) == sorted(every)
    monkeypatch.setattr(holdfast_coordinator.objects, "ANSWER_BYTES_MAX", 1)
    assert {len(page) for page in await pages(client)} == {1}
    agent = Client(client.address, token=await client.new_token("agent"))
    try:
        await client.bind(("agent", "app-reader", "task/alpha"), ("agent", "app-reader", "task/gamma"))
        seen = [each for page in await pages(agent) for each in page]
        assert sorted(seen) == sorted(made["alpha"] + made["gamma"])
        await client.bind(("agent", "app-writer", "task/nothing"))
        assert await pages(agent) == [[]]
    finally:
        await agent.close()


@pytest.mark.parametrize("token", ["x", "../y", "task/", "task/1.app-x", "task/" + "0" * 15 + ".", "a/" + "9" * 99])
async def test_tokens_that_came_with_no_page_are_refused(client: Client, token: str) -> None:
    request = state_pb2.ListObjectsRequest(page_token=token)
    await refused(ErrorCode.INVALID_ARGUMENT, client.state("ListObjects", request))
