"""The OpenAI SDK as what carries one request: its retries off, its body limited, at no more of the processor's time than it needs."""

from collections.abc import AsyncIterator
from typing import Any

from rpo.errors import RpoError

BODY_MAX = 4_000_000
"""Bytes of a response that are read."""
_NO_KEY = "none"
_UNTOLD = ("Lang", "Package-Version", "OS", "Arch", "Runtime", "Runtime-Version", "Async", "Retry-Count", "Read-Timeout")
"""What the SDK tells every server of this machine and of itself: no part of a question, and every layer works on each header."""


class Connections:
    """A client of the SDK, and in it one connection, for every request under way. One client for all of them would have its pool
    look at every connection, and at the socket of every idle one, twice in every request. Lives in one event loop."""

    def __init__(self, base_url: str, key: str, timeout_s: float) -> None:
        try:
            import httpx2
            from openai import Omit
        except ImportError as error:
            raise RpoError("asking a served model needs the openai package: pip install 'rpo-diffusion[vlm]'") from error
        self._base_url, self._key, self._timeout = base_url, key or _NO_KEY, httpx2.Timeout(timeout_s, connect=5.0)
        self._url = f"{base_url.rstrip('/')}/chat/completions"
        self._headers = {"Content-Type": "application/json"} | {f"X-Stainless-{name}": Omit() for name in _UNTOLD}
        self._certificates = httpx2.create_ssl_context()
        self._idle = [self._client()]  # the first takes long, for what it imports: not in the time that a request has

    async def post(self, body: bytes) -> Any:
        """The response to a question, read to its end. Raises what the SDK raises."""
        import httpx2

        client = self._idle.pop() if self._idle else self._client()
        try:
            return await client.post(self._url, cast_to=httpx2.Response, content=body, options={"headers": self._headers})
        finally:
            self._idle.append(client)

    async def close(self) -> None:
        """Once nothing is under way."""
        for client in self._idle:
            await client.close()

    def _client(self) -> Any:
        import httpx2
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        class Limited(httpx2.AsyncByteStream):
            """Refuses to read more than is good for us."""

            def __init__(self, stream: Any) -> None:
                self.stream = stream

            async def __aiter__(self) -> AsyncIterator[bytes]:
                read = 0
                async for chunk in self.stream:
                    if (read := read + len(chunk)) > BODY_MAX:
                        raise httpx2.DecodingError(f"the server's answer is larger than {BODY_MAX:,} bytes")
                    yield chunk

            async def aclose(self) -> None:
                await self.stream.aclose()

        async def limit_body(response: Any) -> None:
            if response.headers.get("content-encoding", "identity").lower() != "identity":
                raise httpx2.DecodingError("the server compressed its answer unasked", request=response.request)
            response.stream = Limited(response.stream)

        http = DefaultAsyncHttpxClient(
            event_hooks={"response": [limit_body]},
            follow_redirects=False,
            headers={"Accept-Encoding": "identity"},
            verify=self._certificates,
        )
        return AsyncOpenAI(api_key=self._key, base_url=self._base_url, max_retries=0, timeout=self._timeout, http_client=http)
