"""Who may do what: user tokens, agent keys, enrolment tokens; and what a page may do in a browser.

Owns the secrets' making and checking. Each secret is 256 random bits, so that its plain
SHA-256 is safe at rest: there is nothing to guess, hence nothing for a slow hash to slow
down (OWASP Password Storage Cheat Sheet speaks of passwords, not of random keys). Looking a
digest up in an index leaks at most time about the digest, which nobody can steer.

User routes take user tokens and nothing else; agent routes take agent keys and nothing else.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Security
from fastapi.concurrency import run_in_threadpool
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from autotune.errors import AuthenticationError
from autotune.service.context import Context
from autotune.service.known_agents import Known
from storage.errors import InvalidToken
from storage.records import AgentRecord
from storage.repository import Repository

ENROLMENT_VALID_S = 3600.0
"""An enrolment token is good for an hour: long enough to walk to the device."""

KEY_VALID_S = 86_400.0
"""An agent is told to get a new key after a day. A choice: a key that leaks from a backup is
worth nothing the day after, and a device that is off for longer keeps the one it has."""

PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:",
    "X-Content-Type-Options": "nosniff",
}
"""Of a page or a picture for a browser: each is one file without a script, and whatever a name in
it holds cannot become one."""

_user_scheme = HTTPBearer(
    scheme_name="UserToken",
    description="The user token that the service made at its first start.",
    auto_error=False,
)
_agent_scheme = HTTPBearer(
    scheme_name="AgentKey",
    description="The key that the agent received at enrolment.",
    auto_error=False,
)


def new_secret(prefix: str) -> str:
    """A fresh secret of 256 bits; the prefix tells people (and secret scanners) what it is."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def hash_secret(secret: str) -> str:
    """How a secret is stored: its SHA-256, in hex."""
    return hashlib.sha256(secret.encode()).hexdigest()


async def require_user(
    context: Context,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_user_scheme)],
) -> None:
    """Let a request with a user token pass.

    Raises:
        AuthenticationError: there is no token, or it is not a user's.
    """
    if credentials is None:
        raise AuthenticationError(
            "this route needs a user token: send `Authorization: Bearer TOKEN`; the service "
            "wrote one to the file `token` of its data directory"
        )
    digest = hash_secret(credentials.credentials)
    if not await run_in_threadpool(context.repository.has_user_token, digest):
        raise AuthenticationError(
            "the user token is not known here; it may be of another service or revoked. This "
            "service's own lies in its data directory"
        )


async def require_agent(
    known: Known,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_agent_scheme)],
) -> AgentRecord:
    """The agent whose key the request carries.

    Raises:
        AuthenticationError: there is no key, or it is not a current agent's; it says why.
    """
    if credentials is None:
        raise AuthenticationError("this route needs an agent key; enroll the device first")
    digest = hash_secret(credentials.credentials)
    try:
        return await known.find(digest)
    except InvalidToken as error:
        raise AuthenticationError(f"{error} (`autotune device enroll`)") from error


Agent = Annotated[AgentRecord, Depends(require_agent)]


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalToken:
    """The user token of this data directory; `is_new` the first time."""

    token: str
    is_new: bool


def local_token(repository: Repository, token_file: Path) -> LocalToken:
    """The token in the file, or a new one where there is none that this database knows.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        token = ""
    if token and repository.has_user_token(hash_secret(token)):
        return LocalToken(token=token, is_new=False)
    token = new_secret("eat")
    write_private(token_file, token + "\n")
    repository.add_user_token(hash_secret(token), name="local")
    return LocalToken(token=token, is_new=True)


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, in one step.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
