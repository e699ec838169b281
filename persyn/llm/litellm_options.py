"""The options of the engine `litellm`. Imports no model library, and not litellm."""

from __future__ import annotations

from persyn.llm.options import HostedOptions, require_no_secret

#: Arguments of `litellm.acompletion` that PerSyn sets itself, or that would replace what it does.
_OF_LITELLM = frozenset(
    {
        "api_base",
        "base_url",
        "caching",
        "drop_params",
        "fallbacks",
        "max_retries",
        "messages",
        "mock_response",
        "model",
        "num_retries",
        "stream",
        "timeout",
    }
)


class LiteLLMOptions(HostedOptions, frozen=True, kw_only=True):
    """The options of a teacher behind a provider's own protocol, which litellm speaks."""

    #: The provider's URL, where it is not litellm's own: `http://127.0.0.1:11434` for `ollama/...`. None: litellm's.
    base_url: str | None = None
    #: The environment variable with the key; the key itself is never stored. None: litellm reads the provider's own
    #: variables, such as `ANTHROPIC_API_KEY`, or `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_no_secret(self)
        if reserved := sorted(_OF_LITELLM.intersection(self.extra)):
            raise ValueError(f"extra contains {reserved[0]!r}, which PerSyn sets itself; remove it")

    @property
    def urls(self) -> list[str]:
        """The base URL, if there is one."""
        return [self.base_url] if self.base_url else []

    @property
    def key_source(self) -> str:
        """Where the key comes from, for messages."""
        return super().key_source if self.api_key_env else "the key in the environment variables that litellm reads"
