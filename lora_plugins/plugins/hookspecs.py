"""The hooks of lora_plugins. Each collects the results of all plugins."""

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
    """Return a record for each model type that this plugin supports.

    ```python
    from lora_plugins import Architecture, hookimpl


    @hookimpl
    def register_architectures():
        return [Architecture("mytype", ("q", "v"))]
    ```
    """


@hookspec
def register_quantizers() -> Iterable[Quantizer]:  # type: ignore[empty-body]
    """Return the quantization backends that this plugin adds: instances of subclasses of `Quantizer`.

    ```python
    from lora_plugins import hookimpl
    from lora_plugins.builtin.quantizers.bitsandbytes import Int8


    class CarefulInt8(Int8):
        # LLM.int8() with more of the large activations in float.
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
    """Return the checkpoint formats that this plugin supports.

    A base whose format has no record is refused before training. This format is trained by your own backend:

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
    """Return the adapter checks that this plugin adds: records of type ``registry.Check``.

    ``lora-plugins doctor`` runs all of them. A check also refuses adapters at each stage that it names in ``refused``:
    ``push``, ``pull`` or ``load``. Names are shown as ``plugin/check``, so two plugins may use the same one.

    ```python
    from lora_plugins import hookimpl
    from registry import Check, InvalidAdapter


    def find_large_rank(files):
        rank = max(files.config.ranks)
        if rank > 64:
            yield f"The rank is {rank}; our servers take 64 at most"


    @hookimpl
    def register_checks():
        return [
            Check(
                "servable-rank",
                "error",
                reads=("configuration",),
                find=find_large_rank,
                cure="Train it with r=64",
                refused={"push": InvalidAdapter},
            )
        ]
    ```
    """


@hookspec
def register_servers() -> Iterable[Server]:  # type: ignore[empty-body]
    """Return the inference servers that this plugin knows, with rules for the adapters that each refuses.

    ```python
    from lora_plugins import Server, ServerRule, hookimpl


    def refuse_high_ranks(traits):
        if traits.rank > 64:
            return f"rank {traits.rank} is refused; the highest is 64"
        return None


    @hookimpl
    def register_servers():
        rule = ServerRule("rank", "myserver/lora.py", refuse_high_ranks)
        return [Server("myserver", "2.1.0", (rule,), export="peft")]
    ```
    """
