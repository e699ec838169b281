"""Teachers of providers with a protocol of their own: litellm translates chat completions to it and back.

Scheduling, retries and doubts are those of `chat_server`. litellm itself retries, caches, logs and fetches nothing, and
a parameter that the provider lacks is an error rather than left out; only `seed` is not sent to those without seeds.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.request
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import msgspec

from persyn.errors import PermanentError, shorten
from persyn.llm import options
from persyn.llm.litellm_options import LiteLLMOptions
from persyn.llm.protocols import Engine, Generate, ModelSpec, Result, Tick
from persyn.llm.teachers import addresses, chat_completions, complaints
from persyn.llm.teachers.chat_server import ChatServerEngine
from persyn.llm.teachers.complaints import Complaint, RefusedError, RetryableError

#: Read by litellm when it is imported: it must not read a `.env` file, nor fetch prices and other catalogues.
_ENVIRONMENT = {"LITELLM_MODE": "PRODUCTION", "LITELLM_OFFLINE_MODE": "True", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
#: Shorter values of variables with names like PASSWORD are also words of messages.
_SHORTEST_SECRET = 8
_TIMEOUT = 408


def load(spec: ModelSpec, tick: Tick) -> Engine:
    """Prepare to use a provider's model, "provider/model"; nothing is sent before the first request.

    Options: `LiteLLMOptions`. The engine raises what that of `chat_server` does.
    """
    chosen = options.decode(spec, LiteLLMOptions)
    os.environ.update(_ENVIRONMENT)
    import litellm

    # Each may be set by a variable of the environment.
    litellm.drop_params = litellm.modify_params = False
    litellm.cache = litellm.num_retries = None
    litellm.callbacks = []
    litellm.suppress_debug_info = True
    try:
        _, provider, *_ = litellm.get_llm_provider(spec.model, api_base=chosen.base_url)
        supported = litellm.get_supported_openai_params(spec.model, custom_llm_provider=provider) or []
    except litellm.BadRequestError as error:
        raise PermanentError(
            f"litellm knows no provider for the model {spec.model!r}; give it as provider/model, such as "
            f"anthropic/claude-sonnet-4-5: {shorten(str(error))}"
        ) from error
    key = addresses.read_key(chosen)
    client = LiteLLMClient(spec.model, chosen, key, provider, has_seed="seed" in supported)
    return ChatServerEngine(spec.model, chosen, client, chosen.urls or [f"{provider} (by litellm)"])


class LiteLLMClient:
    """Sends requests by `litellm.acompletion`."""

    def __init__(
        self, model: str, chosen: LiteLLMOptions, key: str | None, provider: str, *, has_seed: bool = True
    ) -> None:
        self.version = f"litellm {version('litellm')} {provider}"
        self._model = model
        self._options = chosen
        self._key = key
        self._has_seed = has_seed
        self._secrets = _secrets(key)

    async def ask(self, url: str, request: Generate, began: float) -> Result:
        """Send a request; `url` is not needed, as there is one place."""
        import litellm

        try:
            response = await litellm.acompletion(**self._arguments(request))
            answer = json.dumps(_completion(response.model_dump()), default=str)
        except Exception as error:  # litellm raises other libraries' errors as well, depending on the provider
            raise self._trouble(error) from error
        seconds = time.perf_counter() - began
        return chat_completions.read(request.id, self._clean(answer), {}, seconds, self._options.inline_reasoning)

    async def close(self) -> None:
        """Close the connections, and end the tasks that litellm has begun."""
        import litellm

        await litellm.close_litellm_async_clients()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _arguments(self, request: Generate) -> dict[str, Any]:
        fields: dict[str, Any] = msgspec.json.decode(chat_completions.body(self._model, request, self._options))
        if not self._has_seed and "seed" not in self._options.extra:
            fields.pop("seed", None)
        if (budget := fields.pop("thinking_token_budget", None)) is not None:
            fields.setdefault("thinking", {"type": "enabled", "budget_tokens": budget})
        return fields | {
            "api_base": self._options.base_url,
            "api_key": self._key,
            "timeout": self._options.timeout_seconds,
            "max_retries": 0,
            "num_retries": 0,
            "drop_params": False,
            "caching": False,
        }

    def _trouble(self, error: Exception) -> RetryableError | RefusedError:
        """Classify an error of litellm, which has the provider's HTTP status, headers and message."""
        import litellm

        status = getattr(error, "status_code", None)
        found = self._complaint(error)
        if isinstance(error, litellm.Timeout) and status == _TIMEOUT:
            return RetryableError(f"no answer within {self._options.timeout_seconds:g} s", is_late=True)
        if not isinstance(status, int) or status < 300:
            return RetryableError(f"{type(error).__name__}: {found.said}")
        codes = set(found.codes)
        if isinstance(error, litellm.ContextWindowExceededError):
            codes.add("context_length_exceeded")
        if isinstance(error, litellm.ContentPolicyViolationError):
            codes.add("content_policy_violation")
        headers = getattr(getattr(error, "response", None), "headers", None) or {}
        return complaints.trouble(status, _capitalised(headers), found._replace(codes=frozenset(codes)))

    def _complaint(self, error: Exception) -> Complaint:
        """The provider's message: in the error's body, or behind litellm's words in its text."""
        if isinstance(body := getattr(error, "body", None), dict) and body:
            return complaints.complaint(chat_completions.parse(self._clean(json.dumps({"error": body}, default=str))))
        text = self._clean(str(error))
        said = text.rpartition("Exception - ")[2]
        return complaints.complaint(chat_completions.parse(said) or text)

    def _clean(self, text: str) -> str:
        """Remove keys from a message, in case the provider or litellm repeats one."""
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text


def _secrets(key: str | None) -> list[str]:
    """The key, everything in the environment that litellm may use as one, and passwords of proxies; longest first."""
    found = {value.strip() for name, value in os.environ.items() if options.is_secret(name)}
    found |= {urlsplit(proxy).password or "" for proxy in urllib.request.getproxies().values()}
    found = {value for value in found if len(value) >= _SHORTEST_SECRET} | ({key} if key else set())
    return sorted(found, key=len, reverse=True)


def _capitalised(headers: Mapping[str, str]) -> dict[str, str]:
    return {"-".join(word.capitalize() for word in name.split("-")): value for name, value in headers.items()}


def _completion(response: dict[str, Any]) -> dict[str, Any]:
    """A response with the provider's own finish reason where litellm reports one that it does not know as "stop"."""
    for choice in response.get("choices") or []:
        own = (choice.get("provider_specific_fields") or {}).get("native_finish_reason")
        if choice.get("finish_reason") == "stop" and isinstance(own, str) and own:
            choice["finish_reason"] = own
    return response
