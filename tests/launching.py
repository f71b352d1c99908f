"""Starting tests/engine_run.py under a launcher, and reading what its ranks wrote."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("engine_run.py")

#: Ways to start processes; each is followed by the script.
ALONE = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"),
    *("--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"),
]

#: What each rank wrote, by case.
Results = dict[str, list[dict[str, Any]]]


def launch(
    folder: Path, launcher: list[str], settings: dict[str, Any], environment: dict[str, str] | None = None
) -> Results:
    """Run the script to its end; every case of every rank must have written something."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*launcher, str(SCRIPT), str(folder), json.dumps(settings)]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder), **(environment or {})}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, (done.stderr or done.stdout)[-4000:]
    ranks = 1 if launcher is ALONE else 2
    return {
        case: [json.loads((folder / case / f"rank{rank}.json").read_text()) for rank in range(ranks)]
        for case in settings["cases"]
    }
