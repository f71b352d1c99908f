"""The hooks of lora_plugins. Each collects; none decides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    import typer

    from lora_plugins.plugins.formats import Format
    from lora_plugins.plugins.servers import Server
    from lora_plugins.plugins.types import AdapterCheck, Architecture, Quantizer

__all__ = [
    "PROJECT",
    "hookimpl",
    "hookspec",
    "register_architectures",
    "register_checks",
    "register_commands",
    "register_formats",
    "register_quantizers",
    "register_servers",
]


#: pluggy's project name and the entry-point group.
PROJECT = "lora_plugins"

hookspec = pluggy.HookspecMarker(PROJECT)

#: Marks a function as an implementation of one of the hooks below.
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_architectures() -> Iterable[Architecture]:  # type: ignore[empty-body]
    """Return the model types that this plugin knows.

    ```python
    from lora_plugins import Architecture, hookimpl


    @hookimpl
    def register_architectures():
        return [Architecture("mytype", ("q", "v"))]
    ```
    """


@hookspec
def register_quantizers() -> Iterable[Quantizer]:  # type: ignore[empty-body]
    """Return the quantization backends that this plugin adds: subclasses of `Quantizer`.

    ```python
    from lora_plugins import hookimpl
    from lora_plugins.builtin.quantizers.bitsandbytes import Int8


    class CarefulInt8(Int8):
        # LLM.int8() that keeps more of the large activations in float.
        name = "int8-careful"

        def quantize_linear(self, linear, options):
            return super().quantize_linear(linear, {"threshold": 4.0, **options})


    @hookimpl
    def register_quantizers():
        return [CarefulInt8()]
    ```
    """


@hookspec
def register_formats() -> Iterable[Format]:  # type: ignore[empty-body]
    """Return the storage formats of checkpoints that this plugin knows.

    A base whose format has no record is refused before training. A format that your own backend trains on:

    ```python
    from lora_plugins import Format, hookimpl


    @hookimpl
    def register_formats():
        return [
            Format(
                "mymethod",
                "My format",
                "stored",
                layers=("mylibrary.MyLinear",),
                backends=("mybackend",),
                merges="after dequantize_model()",
            )
        ]
    ```
    """


@hookspec
def register_commands(app: typer.Typer) -> None:
    """Add commands to ``lora-plugins``.

    ```python
    from lora_plugins import hookimpl


    @hookimpl
    def register_commands(app):
        @app.command()
        def hello() -> None:
            print("hello")
    ```

    Args:
        app: The command-line program. Import heavy modules inside the command, not at module level.
    """


@hookspec
def register_checks() -> Iterable[AdapterCheck]:  # type: ignore[empty-body]
    """Return the checks of adapters that this plugin adds: records of type ``registry.Check``.

    ``lora-plugins doctor`` runs all of them. One that names a stage in ``refused`` is enforced there, too: ``push``,
    ``pull`` or ``load``. Its name is shown after that of the plugin, so it may be called like another one.

    ```python
    from lora_plugins import hookimpl
    from registry import Check, InvalidAdapter


    def find_large_rank(files):
        if max(files.config.ranks) > 64:
            yield f"The rank is {max(files.config.ranks)}; our servers take 64 at most"


    @hookimpl
    def register_checks():
        cure = "Train it with r=64"
        refused = {"push": InvalidAdapter}
        return [Check("servable-rank", "error", ("configuration",), find_large_rank, cure, refused)]
    ```
    """


@hookspec
def register_servers() -> Iterable[Server]:  # type: ignore[empty-body]
    """Return the inference servers that this plugin knows, with what they do not take of an adapter.

    ```python
    from lora_plugins import Server, ServerRule, hookimpl


    def refuse_high_ranks(traits):
        return f"rank {traits.rank} is refused; the highest is 64" if traits.rank > 64 else None


    @hookimpl
    def register_servers():
        rule = ServerRule("rank", "myserver/lora.py", refuse_high_ranks)
        return [Server("myserver", "2.1.0", (rule,), export="peft")]
    ```
    """
