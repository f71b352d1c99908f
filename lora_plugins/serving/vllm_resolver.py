"""vLLM's resolver of adapters: names are references to the registry."""

from __future__ import annotations

import asyncio
import inspect
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import HTTPException
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from lora_plugins.errors import LoraPluginsError, RefusedAdapter
from lora_plugins.serving.finder import FoundRelease, ReleaseFinder, ServedBase, ServedNames
from lora_plugins.serving.resolver_settings import ResolverSettings
from registry import (
    HubUnavailable,
    InvalidReference,
    Reference,
    RegistryError,
    RepositoryNotFound,
    VersionNotFound,
)

__all__ = ["PinnedRequest", "RegistryResolver", "add_resolver"]

# vLLM shows the lines of its own loggers only.
_log = init_logger("vllm.lora_plugins")
_NAME = "lora-plugins"
#: Names that are served at most, and looked up again.
_MOST_NAMES = 4096


class PinnedRequest(LoRARequest, array_like=True, omit_defaults=True):  # type: ignore[misc, call-arg]
    """A request for an adapter whose number stays as it was made.

    vLLM 0.32 overwrites it with a counter of the process. Two processes of one engine would then give one number to two
    adapters, and the engine answers from the one that it has. The number here follows from the release.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name != "lora_int_id":
            super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRARequest) and self.lora_name == other.lora_name

    def __hash__(self) -> int:
        return hash(self.lora_name)


def add_resolver(settings: ResolverSettings) -> None:
    """Register a resolver in vLLM; a second call in one process replaces the first one's."""
    LoRAResolverRegistry.resolvers.pop(_NAME, None)
    LoRAResolverRegistry.register_resolver(_NAME, RegistryResolver(settings))
    _log.info("Adapters come from %s; names are looked up again every %gs", settings.registry, settings.refresh)


class RegistryResolver(LoRAResolver):  # type: ignore[misc]
    """Answers requests for ``org/name@…`` from the registry.

    vLLM asks once for a name and keeps the answer. So a task looks all names up again: an alias or a range follows what
    it means, and a release that was withdrawn meanwhile is warned of.

    Args:
        settings: The registry, the allowed names, and the seconds between two looks.
    """

    def __init__(self, settings: ResolverSettings) -> None:
        self.finder = ReleaseFinder(settings, "vllm")
        # One thread: what many requests want at once is pulled once.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lora-plugins")
        self._served = ServedNames(_MOST_NAMES)
        self._told: set[str] = set()
        self._follower: asyncio.Task[None] | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the adapter that a name means; ``None``, which vLLM answers with 404, if it means nothing here.

        Raises:
            HTTPException: 400 if the adapter is refused, 503 if the registry does not answer. The log says why.
        """
        owner = self._find_owner(inspect.currentframe())
        base = ServedBase(base_model_name, getattr(getattr(owner, "model_config", None), "revision", None))
        try:
            self.finder.require_allowed(Reference.parse(lora_name).name)
        except (InvalidReference, LoraPluginsError) as error:
            _log.warning("No adapter for %r: %s", lora_name, error)
            return None
        try:
            found = await self._find(lora_name, base)
        except (VersionNotFound, RepositoryNotFound) as error:
            _log.warning("No adapter for %r: %s", lora_name, error)
            return None
        except HubUnavailable as error:
            _log.error("No adapter for %r: %s", lora_name, error)
            raise HTTPException(503, f"The registry of {lora_name!r} does not answer.") from error
        except (RegistryError, LoraPluginsError) as error:
            raise self._refuse(lora_name, error) from error
        if owner is None and _is_moving(lora_name):
            # Its answers would stay the first one's for ever.
            reason = RefusedAdapter("This release of vLLM keeps adapters elsewhere, so none can follow; give a version")
            raise self._refuse(lora_name, reason)
        gone = self._served.keep(lora_name, found.title)
        if gone is not None and owner is not None:
            # vLLM asks again for it; its answer would not be followed any more.
            owner.lora_requests.pop(gone, None)
        if self._follower is None and owner is not None:
            self._follower = asyncio.create_task(self._follow(owner, base))
        return self._make_request(lora_name, found)

    def _find_owner(self, frame: Any) -> Any:
        """Return vLLM's object that keeps the adapters by name: the one that is waiting for the answer."""
        caller = frame.f_back if frame is not None else None
        owner = caller.f_locals.get("self") if caller is not None else None
        return owner if isinstance(getattr(owner, "lora_requests", None), dict) else None

    async def _find(self, name: str, base: ServedBase) -> FoundRelease:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self.finder.find, name, base)

    def _refuse(self, name: str, reason: Exception) -> HTTPException:
        _log.error("Refused %r: %s: %s", name, type(reason).__name__, reason)
        # Reasons name folders of this machine.
        told = f"The adapter {name!r} is refused ({type(reason).__name__}). The server's log says why."
        return HTTPException(400, told)

    def _make_request(self, name: str, found: FoundRelease) -> PinnedRequest:
        for message in found.warnings:
            self._warn(f"{name!r}: {message}")
        _log.info("%r is %s, sha256:%s, in %s", name, found.title, found.digest[:16], found.path)
        # vLLM shows this name in answers and in /v1/models, and its cache of prefixes keeps by it.
        return PinnedRequest(lora_name=found.title, lora_int_id=found.number, lora_path=found.path)

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            _log.warning("%s", message)

    # -- names that move -----------------------------------------------------------------------

    async def _follow(self, owner: Any, base: ServedBase) -> None:
        """Look all served names up again and again."""
        while True:
            await asyncio.sleep(self.finder.settings.refresh)
            for name in list(self._served.titles):
                try:
                    await self._renew(owner, name, base)
                except Exception as error:
                    # Another name must not wait for this one's fault.
                    self._warn(f"{name!r} stays {self._served.titles.get(name)}: {type(error).__name__}: {error}")

    async def _renew(self, owner: Any, name: str, base: ServedBase) -> None:
        if name not in owner.lora_requests:
            # Not loaded yet, refused by the engine, or unloaded by vLLM's own endpoint.
            self._served.miss(name)
            return
        try:
            found = await self._find(name, base)
        except VersionNotFound as error:
            owner.lora_requests.pop(name, None)
            self._served.forget(name)
            _log.warning("%r is not served any more: %s", name, error)
            return
        known = self._served.titles.get(name)
        if known is None:
            # It went meanwhile, for a newer name.
            return
        self._served.keep(name, known)
        if found.title == known:
            for message in found.warnings:
                self._warn(f"{name!r}: {message}")
            return
        request = self._make_request(name, found)
        await owner.engine_client.add_lora(request)
        if name in owner.lora_requests:
            owner.lora_requests[name] = request
            self._served.keep(name, found.title)


def _is_moving(name: str) -> bool:
    """Whether a reference may mean another release later."""
    reference = Reference.parse(name)
    return reference.version is None and reference.commit is None
