"""Lets accelerate use FSDP2 on a CPU; without it every request for FSDP is silently plain DDP there.

For tests only. ``test_the_shim_is_still_needed`` fails when accelerate can do it by itself.
"""

from __future__ import annotations

from typing import Any


def force_fsdp() -> None:
    """Make accelerate take FSDP when a plugin for it is given, on any kind of device.

    ``AcceleratorState`` does so only for a list of accelerators, and reads the kind of device every time
    it is asked, so the value must stay changed.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        if fsdp_plugin is not None:
            PartialState(cpu=True, backend="gloo")
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)

    AcceleratorState.__init__ = init
