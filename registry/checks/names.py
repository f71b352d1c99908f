"""Checks of tensor names: layouts that PEFT loads nothing from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

from registry.checks.adapter_files import AdapterFiles
from registry.checks.record import Changes, Check, Finding
from registry.errors import InvalidAdapter
from registry.formats.tensors import PREFIX, lora_modules

__all__ = [
    "CHECKS",
    "add_prefix",
    "collapse_prefix",
    "remove_adapter_name",
    "spell_down_up",
    "spell_parameter",
]

#: What FSDP and activation checkpointing insert into names.
_WRAPPERS = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
#: LoRA's A and B as diffusers and kohya named them, and as loralib did: a parameter of the layer itself.
_DOWN_UP = re.compile(r"\.lora[._](down|up)\.weight$")
_PARAMETER = re.compile(r"\.lora_[AB]$")
#: The adapter's name, which PEFT leaves out of the file; ``torch.save(model.state_dict())`` keeps it.
_NAMED = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)\.(?!(?:weight|bias)$)(\w+)(\.(?:weight|bias))?$"
)
_SAVED = re.compile(r"\.modules_to_save\.\w+\.")


def _find_compiled(files: AdapterFiles) -> Iterator[Finding]:
    compiled = [name for name in files.tensors if "_orig_mod." in name]
    renames = {name: name.replace("_orig_mod.", "") for name in compiled}
    if compiled and _has_lora(files, renames):
        yield Finding(
            f"{len(compiled)} tensors have names with _orig_mod., first {compiled[0]}: the adapter was saved from a "
            "compiled model, and nothing could load it. Save it from the model itself (model._orig_mod).",
            "Leave _orig_mod. out of the names",
            Changes(renames),
        )


def _find_foreign(files: AdapterFiles) -> Iterator[Finding]:
    strange = [name for name in files.tensors if not name.startswith(PREFIX)]
    renames = {name: add_prefix(name) for name in strange}
    if strange and _has_lora(files, renames):
        before, after = strange[0], renames[strange[0]]
        old, new = (
            before[: len(before) - len(_end_of(before, after))],
            after[: len(after) - len(_end_of(before, after))],
        )
        yield Finding(
            f"{len(strange)} tensors have names that do not begin with {PREFIX}, first {strange[0]}: this is not what "
            "PEFT's save_pretrained writes. Save it with that.",
            _describe_rename(old, new),
            Changes(renames),
        )


def _describe_rename(old: str, new: str) -> str:
    if not new:
        return f"Leave {old!r} out at the beginning of the names"
    return f"Rename {old!r} to {new!r} at the beginning of the names" if old else f"Put {new!r} before the names"


def add_prefix(name: str) -> str:
    """Return a name with PEFT's prefix: after a wrapper's own, which goes, or before all."""
    place = name.find(PREFIX)
    if place >= 0:
        return name[place:]
    return PREFIX + name.removeprefix("module.").removeprefix("base_model.")


def _end_of(one: str, other: str) -> str:
    """Return the dotted parts at the end that two names share."""
    a, b = one.split("."), other.split(".")
    count = 0
    while count < min(len(a), len(b)) and a[-1 - count] == b[-1 - count]:
        count += 1
    return ".".join(a[len(a) - count :])


def _has_lora(files: AdapterFiles, renames: dict[str, str]) -> bool:
    """Whether the file holds LoRA tensors at all, perhaps under names that another check cures."""
    names = {renames.get(name, name): record for name, record in files.tensors.items()}
    return bool(lora_modules(names))


def _make_finder(
    rename: Callable[[str], str], what: str, cure: str, *, every: bool = False
) -> Callable[[AdapterFiles], Iterable[Finding]]:
    """Return the function of a check that finds names which ``rename`` changes.

    Args:
        rename: Returns the name that PEFT would have written.
        what: What is wrong with the names.
        cure: What to do.
        every: Only if it changes all names: a part of the base may be called so, too.
    """

    def find(files: AdapterFiles) -> Iterator[Finding]:
        renames = {name: new for name in files.tensors if (new := rename(name)) != name}
        if renames and not (every and len(renames) < len(files.tensors)):
            first = next(iter(renames))
            yield Finding(f"{len(renames)} tensors {what}, first {first}", cure, Changes(renames))

    return find


def collapse_prefix(name: str) -> str:
    """Return a name with PEFT's prefix once: a PeftModel that was wrapped again has it twice."""
    while name.startswith(2 * PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def remove_adapter_name(name: str) -> str:
    """Return the name of a LoRA tensor without the adapter's name."""
    return _NAMED.sub(lambda found: f".{found[1]}{found[3] or ''}", name)


def _leave_name_out(name: str) -> str:
    return _SAVED.sub(".", remove_adapter_name(name))


def spell_down_up(name: str) -> str:
    """Return a name with A and B instead of down and up."""
    return _DOWN_UP.sub(lambda found: f".lora_{'A' if found[1] == 'down' else 'B'}.weight", name)


def spell_parameter(name: str) -> str:
    """Return loralib's name of a parameter as that of a layer's weight."""
    return f"{name}.weight" if _PARAMETER.search(name) else name


def _spell_as_peft(name: str) -> str:
    return spell_parameter(spell_down_up(name))


#: In the order in which a copy is cured; each sees the names that the ones before it have cured.
CHECKS = (
    Check(
        "compiled-names", "error", ("header",), _find_compiled,
        refused={"push": InvalidAdapter, "pull": InvalidAdapter},
    ),
    Check(
        "wrapper-names", "error", ("header",),
        _make_finder(
            lambda name: _WRAPPERS.sub("", name),
            "have names with parts that FSDP or activation checkpointing inserts",
            "Leave _fsdp_wrapped_module. and _checkpoint_wrapped_module. out of the names",
        ),
    ),
    Check(
        "foreign-prefix", "error", ("header",), _find_foreign,
        refused={"push": InvalidAdapter, "pull": InvalidAdapter},
    ),
    Check(
        "doubled-prefix", "error", ("header",),
        _make_finder(
            collapse_prefix, f"have names that begin with {PREFIX} twice: a PeftModel was wrapped again",
            f"Rename {2 * PREFIX!r} to {PREFIX!r} at the beginning of the names",
        ),
    ),
    Check(
        "inner-wrapper", "error", ("header",),
        _make_finder(
            lambda name: name.replace(f"{PREFIX}module.", PREFIX, 1),
            "have names with module. after PEFT's prefix: the base was wrapped for several processes",
            f"Rename '{PREFIX}module.' to {PREFIX!r} at the beginning of the names", every=True,
        ),
    ),
    Check(
        "adapter-name", "warning", ("header",),
        _make_finder(
            _leave_name_out,
            "have names with the adapter's name in them: PEFT 0.21 loads them, and other programs do not",
            "Leave the adapter's name out of the names: .lora_A.default.weight is .lora_A.weight in a file",
        ),
    ),
    Check(
        "older-layout", "error", ("header",),
        _make_finder(
            _spell_as_peft, "have names of another layout (loralib's, kohya's or an old one of diffusers)",
            "Rename .lora_A or .lora_down.weight to .lora_A.weight, and .lora_B or .lora_up.weight to .lora_B.weight",
        ),
    ),
)  # fmt: skip
