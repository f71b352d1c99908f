"""How long until something is there: imports, the program, a host with a hundred plugins, a quantized model, a plan.

Each figure is the best of several new processes, so that it is the program's and not the machine's.

    python benchmarks/startup.py            prints
    python benchmarks/startup.py --write    renews the docs page
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPEATS = 7
PLUGINS = 100

_HOST = """
import time
start = time.perf_counter()
from lora_plugins.plugins.host import PluginHost
imported = time.perf_counter()
host = PluginHost()
print(imported - start, time.perf_counter() - imported, len(host.plugins))
"""

_PREPARATION = """
import time, torch
from transformers import AutoModelForCausalLM
from lora_plugins.commands.demo.model import demo_model
from lora_plugins.quantization.request import check_usable, parse_quantization, quantize_in_place
model = AutoModelForCausalLM.from_pretrained(demo_model(), dtype=torch.bfloat16)
quantization = parse_quantization("int8")
check_usable(quantization, torch.device("cpu"), torch.bfloat16)
start = time.perf_counter()
copies = [parameter.detach().clone() for parameter in model.parameters()]
copied = time.perf_counter()
quantize_in_place(model, quantization)
print(copied - start, time.perf_counter() - copied)
"""

_PLAN = """
import time
import peft, transformers
from transformers import BloomConfig, MixtralConfig
import lora_plugins.planning.variants
from lora_plugins import plan
from lora_plugins.plugins.host import plugin_host
bloom = BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)
plan(BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4), length=8)
for config in (bloom, MixtralConfig()):
    start = time.process_time()
    plan(config, dtype="bfloat16", device="cpu")
    print(time.process_time() - start)
print(len(plugin_host().quantizer_names()))
"""

_IMPORT = "import time; start = time.perf_counter(); import {0}; print(time.perf_counter() - start)"


def python(code: str, path: str = "") -> list[float]:
    """Run code in a new process and return the numbers that it prints."""
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)  # noqa: S603 - our own interpreter and arguments
    return [float(number) for number in done.stdout.split()]


def import_seconds(package: str) -> float:
    """Best time of importing a package in a new process."""
    return min(python(_IMPORT.format(package))[0] for _ in range(REPEATS))


def program_seconds(*arguments: str) -> float:
    """Best time of the whole program, interpreter start included."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lora_plugins", *arguments], capture_output=True, check=True)  # noqa: S603 - our own interpreter and arguments
        times.append(time.perf_counter() - start)
    return min(times)


def install_plugins(folder: Path) -> None:
    """Write fake distributions with a plugin each."""
    for number in range(PLUGINS):
        name = f"benchmark_plugin_{number}"
        information = folder / f"{name}-1.0.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(f"[lora_plugins]\n{name} = {name}\n")
        (folder / f"{name}.py").write_text(
            "from lora_plugins import Architecture, hookimpl\n\n\n@hookimpl\ndef register_architectures():\n"
            f'    return [Architecture("{name}", ("q", "v"))]\n'
        )


def preparation_seconds() -> list[float]:
    """Best times of copying the demo model's weights once, and of quantizing it in place."""
    runs = [python(_PREPARATION) for _ in range(3)]
    return [min(times) for times in zip(*runs, strict=True)]


def plan_seconds() -> tuple[float, float, int]:
    """Least CPU seconds of planning BLOOMZ-7B1 and Mixtral-8x7B without imports, and the number of backends."""
    runs = [python(_PLAN) for _ in range(3)]
    return min(run[0] for run in runs), min(run[1] for run in runs), int(runs[0][2])


def host_seconds() -> tuple[float, int]:
    """Best time of making a plugin host with many plugins installed, and how many it found."""
    with tempfile.TemporaryDirectory() as folder:
        install_plugins(Path(folder))
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        runs = [python(_HOST, path) for _ in range(REPEATS)]
    return min(host for _, host, _ in runs), int(runs[0][2])


def main() -> None:
    """Print the figures and, where asked, write them."""
    seconds, found = host_seconds()
    figures = {
        "import lora_plugins": import_seconds("lora_plugins"),
        "import registry": import_seconds("registry"),
        "lora-plugins --help": program_seconds("--help"),
        "lora-plugins plugins": program_seconds("plugins"),
        f"plugin host, {found} plugins installed": seconds,
    }
    copying, quantizing = preparation_seconds()
    figures["copying the weights of SmolLM2 once (bfloat16)"] = copying
    figures["quantizing SmolLM2 in place (int8)"] = quantizing
    bloom, mixtral, backends = plan_seconds()
    figures[f"plan of BLOOMZ-7B1, {backends} backends (CPU seconds)"] = bloom
    figures[f"plan of Mixtral-8x7B, {backends} backends (CPU seconds)"] = mixtral
    for name, value in figures.items():
        print(f"{name:52} {value:.3f} s")
    if "--write" in sys.argv[1:]:
        from measure import hardware, record, versions

        command = "python benchmarks/startup.py --write"
        record("startup", {"command": command, "hardware": hardware(), "versions": versions(), "seconds": figures})


if __name__ == "__main__":
    main()
