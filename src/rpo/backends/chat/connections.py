"""HTTP connections to one chat server: one client, bodies of limited size, proxies only for hosts on other machines."""

import asyncio
import ipaddress
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from rpo.accounting.ledger import MAYBE_BILLED
from rpo.backends.chat.replies import Retry, StopRun, one_line
from rpo.errors import RpoError

BODY_MAX = 4_000_000
"""Bytes of a response that are read."""
_CONNECT_S = 5.0
_SECRET_MIN = 8
"""Characters of a key, at least: a shorter one could be a word of an answer, and redacting it would change the answer."""
_PLACEHOLDERS = ("empty", "none", "null", "key", "no-key", "nokey", "dummy", "local", "ollama", "token", "unused")
"""Words that clients of local servers send in place of a key: they are no secret, and are not redacted."""


def read_key(variable: str) -> str:
    """The key in an environment variable. Raises `RpoError` for one that cannot be sent or redacted, without repeating it."""
    key = os.environ.get(variable, "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise RpoError(
            f"the environment variable {variable} holds white space, control or non-ASCII characters inside the key; "
            "set it to the key alone, then go on with --resume"
        )
    if 0 < len(key) < _SECRET_MIN and key.lower() not in _PLACEHOLDERS:
        raise RpoError(
            f"the environment variable {variable} holds a key of {len(key)} characters, and under {_SECRET_MIN} it cannot be told from "
            "words of an answer, so it could not be redacted. Give the server a longer key; one that needs none takes EMPTY, or no "
            "variable. Then go on with --resume"
        )
    return key


def secret_of(key: str) -> str:
    """What is redacted: the key, unless it only stands in the place of one."""
    return "" if key.lower() in _PLACEHOLDERS else key


@dataclass(frozen=True, kw_only=True)
class Response:
    """A whole HTTP response."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine, without a look at DNS."""
    host = host.lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 127.1 and other short forms
        except OSError:
            return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback or (mapped or address).is_unspecified


def proxy_for(url: str) -> str | None:
    """The proxy that the environment (HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, NO_PROXY) names for a URL; never one for this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_loopback(host) or proxy_bypass(host) or proxy_bypass(parts.netloc):
        return None
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def unreachable(base_url: str) -> str | None:
    """Why the server's port takes no connection; `None` if it does, or where a proxy lies between and only it could tell."""
    if proxy_for(base_url):
        return None
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"no server takes connections at {base_url} ({error}); start it, or correct the address"
    return None


class Connections:
    """A client whose connections are kept for further requests. Lives in one event loop; `close` once nothing is under way."""

    def __init__(self, base_url: str, key: str) -> None:
        try:
            import httpx2
        except ImportError as error:
            raise RpoError("a served model needs the httpx2 package: pip install 'rpo-diffusion[vlm]'") from error
        self.url = f"{base_url.rstrip('/')}/chat/completions"
        proxy = proxy_for(self.url)
        self.through = ""
        """Which proxy lies between, for messages; empty without one."""
        if proxy:
            parts = urlsplit(proxy)
            self.through = f" (through the proxy {parts.scheme}://{parts.netloc.rpartition('@')[2]}; NO_PROXY lists hosts that need none)"
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        try:
            self._client = httpx2.AsyncClient(
                headers=headers,
                verify=httpx2.create_ssl_context(),
                proxy=proxy,
                trust_env=False,  # neither proxies nor a .netrc of the environment: the key and the proxy are decided above
                follow_redirects=False,
                timeout=httpx2.Timeout(None, connect=_CONNECT_S),
                limits=httpx2.Limits(),
            )
            self._request = httpx2.URL(self.url)
        except (httpx2.InvalidURL, ImportError, ValueError, OSError) as error:
            raise RpoError(f"requests to {self.url}{self.through} cannot be made: {error}") from error

    async def post(self, body: bytes, limit_s: float) -> Response | Retry | StopRun:
        """The response to a question, or why there is none. `limit_s` is for the whole exchange."""
        return await self._limited("POST", self._request, body, limit_s)

    async def models(self, limit_s: float) -> Response | Retry | StopRun:
        """The response to the question which models there are."""
        return await self._limited("GET", self._request.join("../models"), b"", limit_s)

    async def _limited(self, method: str, url: Any, body: bytes, limit_s: float) -> Response | Retry | StopRun:
        import httpx2

        try:
            async with asyncio.timeout(limit_s):  # httpx's own time-outs start anew with every byte of a slow drip
                return await self._exchanged(method, url, body)
        except TimeoutError:
            return Retry(trouble="late", why=f"no answer within {limit_s:.1f} s ({MAYBE_BILLED})")
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            return Retry(trouble="unreachable", why=f"no connection: {_words(error)}{self.through}")
        except httpx2.ProxyError as error:
            return Retry(trouble="unreachable", why=f"the proxy refused: {_words(error)}{self.through}")
        except (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, httpx2.InvalidURL, UnicodeError) as error:
            return StopRun(why=f"the request cannot be formed: {_words(error)}")
        except (httpx2.HTTPError, OSError) as error:
            return Retry(trouble="bad", why=f"the connection failed: {_words(error)} ({MAYBE_BILLED}){self.through}")

    async def _exchanged(self, method: str, url: Any, body: bytes) -> Response | Retry:
        async with self._client.stream(method, url, content=body) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            if headers.get("content-encoding", "identity").lower() not in ("", "identity"):
                return Retry(trouble="bad", why=f"the server compressed its answer unasked ({MAYBE_BILLED})")
            read = bytearray()
            async for chunk in response.aiter_raw():
                read += chunk
                if len(read) > BODY_MAX:
                    return Retry(trouble="bad", why=f"the server's answer is larger than {BODY_MAX:,} bytes ({MAYBE_BILLED})")
            return Response(status=response.status_code, headers=headers, body=bytes(read))

    async def close(self) -> None:
        await self._client.aclose()


def _words(error: Any) -> str:
    return one_line(str(error)) or type(error).__name__
