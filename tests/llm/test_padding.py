"""Batches of similar length within a token budget, and recovery when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jinja2 import TemplateError

from persyn.llm.protocols import Failed, Judge, Judged, Result
from persyn.llm.scorers.padding import Padded, TokenRow, refused, right_pad


class Memory:
    """A model whose batches must not exceed `limit` tokens, including padding."""

    def __init__(self, limit: int = 10**9) -> None:
        self.limit = limit
        self.shapes: list[tuple[int, int]] = []

    def forward(self, rows: Sequence[TokenRow]) -> list[Judged]:
        shape = tuple(right_pad(rows, 0, torch.device("cpu")).shape)
        self.shapes.append((shape[0], shape[1]))
        if shape[0] * shape[1] > self.limit:
            raise torch.OutOfMemoryError
        return [Judged(row.id, float(len(row.ids))) for row in rows]


def row(request: Judge) -> TokenRow | Failed:
    if request.response == "refused":
        return refused(request, TemplateError("roles must alternate"))
    return TokenRow(request.id, [7] * len(request.response))


def encode(requests: Sequence[Judge]) -> list[TokenRow | Failed]:
    return [row(request) for request in requests]


def padded(memory: Memory, *, batch_tokens: int = 12, max_tokens: int | None = None) -> Padded:
    return Padded(encode, memory.forward, max_tokens=max_tokens, batch_tokens=batch_tokens, tick=lambda: None)


def judge(subject: Padded, *responses: str) -> dict[int, Result]:
    requests = [Judge(i, [], response) for i, response in enumerate(responses)]
    return {result.id: result for batch in subject.compute(requests) for result in batch}


def test_rows_are_padded_on_the_right() -> None:
    ids = right_pad([TokenRow(0, [1, 2, 3]), TokenRow(1, [4])], 9, torch.device("cpu"))

    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]


def test_batches_go_from_long_to_short_within_the_budget() -> None:
    memory = Memory()

    found = judge(padded(memory), *("x" * n for n in (2, 6, 3, 5, 2, 2)))

    # 12 tokens hold two rows of 6 (6 and 5), then four of 3 (3, 2, 2, 2).
    assert memory.shapes == [(2, 6), (4, 3)]
    assert [found[i].value for i in range(6)] == [2, 6, 3, 5, 2, 2]


def test_a_row_above_the_budget_is_a_batch_by_itself() -> None:
    memory = Memory()

    judge(padded(memory), "x" * 20, "x")

    assert memory.shapes == [(1, 20), (1, 1)]


def test_too_little_memory_halves_the_budget_and_goes_on() -> None:
    memory, responses = Memory(limit=6), ["x" * 3] * 4
    subject = padded(memory)

    found = judge(subject, *responses)

    assert memory.shapes == [(4, 3), (2, 3), (2, 3)]
    assert subject.batch_tokens == 6
    assert all(isinstance(result, Judged) for result in found.values())


def test_a_row_that_does_not_fit_by_itself_fails_alone() -> None:
    found = judge(padded(Memory(limit=6)), "x" * 8, "x" * 2)

    assert found[0] == Failed(0, "out_of_memory: 8 tokens do not fit even in a batch of one")
    assert found[1] == Judged(1, 2.0)


def test_what_is_longer_than_the_model_takes_is_refused_whole() -> None:
    found = judge(padded(Memory(), max_tokens=4), "x" * 5, "x" * 4)

    assert found[0] == Failed(0, "too_long: 5 tokens, the model takes 4")
    assert found[1] == Judged(1, 4.0)


def test_a_conversation_that_the_template_refuses_fails_alone() -> None:
    found = judge(padded(Memory()), "refused", "x")

    assert found[0] == Failed(0, "bad_request: the chat template rejects it: roles must alternate")
    assert found[1] == Judged(1, 1.0)
