"""Where LoRA adapters go in a ripple. Loaded by every command, so nothing heavy is imported here."""

from lora_plugins import Architecture, hookimpl


@hookimpl
def register_architectures():
    return [
        Architecture(
            "ripple",
            ("ask", "give"),
            scopes={"attention": ("ask", "seek", "give", "blend"), "mlp": ("rise", "fall")},
        )
    ]
