"""How long until something is there: the import, the program, the plugin host with a hundred plugins installed.

Each figure is the best of several new processes, so that it is the program's and not the machine's.
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
from lora_plugins.manager import PluginHost
imported = time.perf_counter()
host = PluginHost()
print(imported - start, time.perf_counter() - imported, len(host.plugins))
"""

_IMPORT = "import time; start = time.perf_counter(); import {0}; print(time.perf_counter() - start)"


def python(code: str, path: str = "") -> list[float]:
    """Run code in a new process and return the numbers that it prints."""
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    return [float(number) for number in done.stdout.split()]


def import_seconds(package: str) -> float:
    """Best time of importing a package in a new process."""
    return min(python(_IMPORT.format(package))[0] for _ in range(REPEATS))


def program_seconds(*arguments: str) -> float:
    """Best time of the whole program, interpreter start included."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "lora_plugins", *arguments], capture_output=True, check=True)
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


def host_seconds() -> tuple[float, int]:
    """Best time of making a plugin host with many plugins installed, and how many it found."""
    with tempfile.TemporaryDirectory() as folder:
        install_plugins(Path(folder))
        path = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        runs = [python(_HOST, path) for _ in range(REPEATS)]
    return min(host for _, host, _ in runs), int(runs[0][2])


def main() -> None:
    """Print the figures."""
    print(f"import lora_plugins        {import_seconds('lora_plugins'):.3f} s")
    print(f"import registry            {import_seconds('registry'):.3f} s")
    print(f"lora-plugins --help        {program_seconds('--help'):.3f} s")
    print(f"lora-plugins plugins       {program_seconds('plugins'):.3f} s")
    seconds, found = host_seconds()
    print(f"plugin host, {found} plugins  {seconds:.3f} s")


if __name__ == "__main__":
    main()
