"""How several devices share the memory of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod

from lora_plugins.errors import PlanError
from lora_plugins.planning.amounts import Memory
from lora_plugins.planning.optimizer import state_bytes

__all__ = ["BUCKET", "PERSISTENT", "REUSE_DISTANCE", "STRATEGIES", "Parts", "Sizes", "per_device"]


#: Shape of a tensor, and bytes per value.
Sizes = tuple[tuple[int, ...], int]

#: DeepSpeed's defaults, in values: the gradient bucket, the reuse distance within which a weight stays gathered, and
#: the size up to which a weight stays gathered for good.
BUCKET = 500_000_000
REUSE_DISTANCE = 1_000_000_000
PERSISTENT = 100_000


@dataclass(frozen=True)
class Parts:
    """What several devices divide among them, in bytes.

    Attributes:
        memory: What one device alone would hold.
        floats: The float parameters, adapters included.
        trained: The float parameters that get gradients.
        block: Float weights of the largest block.
        outside: Float weights outside of blocks: embeddings, heads.
        units: Of those, the weights of the input embedding and of the output head; one entry if they are tied.
        optim: Name of the optimizer.
        packed: Quantized weights that are parameters; ZeRO-3 divides them, FSDP does not.
        packed_block: Quantized parameters of the largest block.
        copied: Quantized weights that layers hold a second time, outside their parameters.
        flat: The parameters of layers that FSDP and ZeRO-3 divide with their scales, one for each layer.
        flat_block: Of those, the ones in the largest block.
        unflat: What the layers of ``flat`` take on one device alone.
    """

    memory: Memory
    floats: Sequence[Sizes]
    trained: Sequence[Sizes]
    block: int
    outside: int
    optim: str
    packed: int = 0
    packed_block: int = 0
    copied: int = 0
    flat: Sequence[int] = ()
    flat_block: int = 0
    unflat: int = 0
    units: Sequence[int] = ()


def _count_bytes(tensors: Iterable[Sizes]) -> int:
    return sum(prod(shape) * item for shape, item in tensors)


def _keep_whole(parts: Parts, devices: int) -> Memory:
    return parts.memory


def _replicate(parts: Parts, devices: int) -> Memory:
    """Return a device's share under DDP: everything, and the buckets that average the gradients."""
    m = parts.memory
    return Memory(m.weights, m.gradients, m.optimizer, m.activations, m.gradients)


def _shard(parts: Parts, devices: int) -> Memory:
    """Return a device's share under FSDP: float parameters divided by rows, quantized ones by bytes if a backend can.

    Blocks, the input embedding and the output head are gathered one at a time (accelerate 1.15), each into a buffer and
    from there into parameters; what is outside of them stays gathered. If rows cannot be divided evenly, this is the
    first device, which has the most.
    """
    m = parts.memory

    def shard(tensor: Sizes) -> Sizes:
        (rows, *others), item = tensor
        return (-(-rows // devices), *others), item

    trained = [shard(tensor) for tensor in parts.trained]
    whole = _count_bytes(parts.floats)
    weights = m.weights - whole + _count_bytes(map(shard, parts.floats)) - parts.unflat + _share_flat(parts, devices)
    largest = max(parts.block + parts.flat_block, *parts.units, 0)
    gathered = min(whole + sum(parts.flat), 2 * largest + parts.outside - sum(parts.units))
    return Memory(weights, _count_bytes(trained), state_bytes(parts.optim, trained), m.activations, gathered)


def _share_flat(parts: Parts, devices: int) -> int:
    """Return a device's share of the layers that are divided by bytes."""
    return sum(-(-size // devices) for size in parts.flat)


def _partition(parts: Parts, values: int) -> tuple[int, int, int]:
    """Return the bytes of a rank's gradients, optimizer and bucket under DeepSpeed.

    DeepSpeed concatenates the tensors; the optimizer steps one float32 vector, a copy of the rank's part of the
    trained weights.
    """
    item = max((item for _, item in parts.trained), default=4)
    return values * item, 4 * values + state_bytes(parts.optim, [((values,), 4)]), BUCKET * item


def _share_zero2(parts: Parts, devices: int) -> Memory:
    """Return a device's share under ZeRO-2: gradients and optimizer divided, and a bucket for the gradients."""
    m = parts.memory
    # Each part starts at an even index.
    aligned = 2 * -(-sum(prod(shape) for shape, _ in parts.trained) // (2 * devices))
    gradients, optimizer, bucket = _partition(parts, aligned)
    return Memory(m.weights, gradients, optimizer, m.activations, bucket)


def _share_zero3(parts: Parts, devices: int) -> Memory:
    """Return a device's share under ZeRO-3: every parameter is divided too, packed ones included.

    Gathered at one time are the block at work and the next one, or everything outside blocks, or the weights that are
    needed again soon: between forward and backward pass, the last ones. Small weights stay gathered.
    """
    m = parts.memory
    whole = _count_bytes(parts.floats) + parts.packed + parts.unflat
    divided = sum(-(-prod(shape) // devices) * item for shape, item in parts.floats)
    divided += -(-parts.packed // devices) + _share_flat(parts, devices)
    gradients, optimizer, bucket = _partition(parts, sum(-(-prod(shape) // devices) for shape, _ in parts.trained))
    item = max((item for _, item in parts.floats), default=2)
    small = _count_bytes((shape, item) for shape, item in parts.floats if prod(shape) <= PERSISTENT)
    small += sum(size for size in parts.flat if size <= PERSISTENT)
    block = parts.block + parts.packed_block + parts.flat_block
    at_work = max(2 * block, parts.outside, REUSE_DISTANCE // 2 * item)
    weights = m.weights - whole + divided + parts.copied
    gathered = min(whole - parts.unflat + sum(parts.flat), at_work + small)
    return Memory(weights, gradients, optimizer, m.activations, gathered + bucket)


#: Strategy -> function that returns what each device holds.
STRATEGIES: dict[str, Callable[[Parts, int], Memory]] = {
    "single": _keep_whole,
    "ddp": _replicate,
    "zero2": _share_zero2,
    "zero3": _share_zero3,
    "fsdp": _shard,
}


def per_device(parts: Parts, strategy: str, devices: int) -> Memory:
    """Return what each of several devices holds.

    Args:
        parts: What the devices divide.
        strategy: A key of `STRATEGIES`.
        devices: Number of devices.

    Raises:
        PlanError: The strategy is unknown, or does not go with the number of devices.
    """
    if strategy not in STRATEGIES:
        raise PlanError(f"Unknown strategy {strategy!r}. Known: {', '.join(STRATEGIES)}.")
    if devices < 1 or (strategy == "single" and devices != 1):
        raise PlanError(f"devices={devices} makes no sense with the strategy {strategy!r}.")
    return (STRATEGIES[strategy] if devices > 1 else _keep_whole)(parts, devices)
