"""Commands that must not take the program down."""

from lora_plugins import Architecture, hookimpl


class Raises:
    @staticmethod
    @hookimpl
    def register_architectures():
        return [Architecture("kept", ("q",))]

    @staticmethod
    @hookimpl
    def register_commands(app):
        @app.command()
        def half_done():
            """Must not be there."""

        raise OSError("configuration not found")


class Unbuildable:
    @staticmethod
    @hookimpl
    def register_commands(app):
        @app.command()
        def unbuildable(value: "DefinedNowhere"):  # noqa: F821
            """Must not be there."""


class Callback:
    @staticmethod
    @hookimpl
    def register_commands(app):
        @app.callback()
        def replaced():
            """Would replace the program's own options."""
