"""The documented part of litellm that PerSyn calls, for provider "openai" and, without seeds, "anthropic".

The tests use litellm itself where it is installed, and this where it is not: it is 240 MB, and takes seconds to import.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import aiohttp

_PARAMETERS = ["seed", "temperature", "top_p", "max_tokens", "stop", "tools", "response_format", "reasoning_effort"]


class BadRequestError(Exception):
    status_code = 400


class ContextWindowExceededError(BadRequestError): ...


class ContentPolicyViolationError(BadRequestError): ...


class UnsupportedParamsError(BadRequestError): ...


class APIError(Exception):
    def __init__(self, status: int, message: str, headers: Any, body: Any) -> None:
        super().__init__(f"litellm.APIError: APIError: OpenAIException - {message}")
        self.status_code, self.response, self.body = status, SimpleNamespace(headers=headers), body


class Timeout(Exception):
    status_code = 408


def get_llm_provider(model: str, api_base: str | None = None) -> tuple[str, str]:
    provider, _, name = model.partition("/")
    if provider not in ("openai", "anthropic") or not name:
        raise BadRequestError(f"litellm.BadRequestError: LLM Provider NOT provided. You passed model={model}")
    return name, provider


def get_supported_openai_params(model: str, custom_llm_provider: str) -> list[str]:
    return [name for name in _PARAMETERS if name != "seed" or custom_llm_provider != "anthropic"]


async def acompletion(*, model: str, api_base: str, api_key: str | None, timeout: float, **given: Any) -> Any:
    assert (given.pop("max_retries"), given.pop("num_retries")) == (0, 0)
    assert given.pop("drop_params") is given.pop("caching") is False
    if "thinking" in given:
        raise UnsupportedParamsError("openai does not support parameters: ['thinking']")
    headers = {"Authorization": f"Bearer {api_key}"}
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(timeout)) as session:
            body = {"model": model.partition("/")[2], **given}
            async with session.post(f"{api_base}/chat/completions", json=body) as answer:
                found = await answer.json()
    except TimeoutError as error:
        raise Timeout("litellm.Timeout") from error
    if answer.status != 200:
        raise APIError(answer.status, found["error"]["message"], answer.headers, found["error"])
    for choice in found["choices"]:
        if choice["finish_reason"] not in ("stop", "length", "tool_calls"):
            choice["provider_specific_fields"] = {"native_finish_reason": choice["finish_reason"]}
            choice["finish_reason"] = "stop"
    return SimpleNamespace(model_dump=lambda: found)


async def close_litellm_async_clients() -> None:
    await asyncio.sleep(0)
