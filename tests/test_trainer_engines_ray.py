"""Ray Train for real: two workers, one of which crashes, against one process on the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from launching import ALONE, launch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ray_run.py")

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed; run `make test-engines`")


@pytest.mark.parametrize("quantization", ["fp32", "int8"])
def test_a_crashed_worker_goes_on_from_the_last_checkpoint(tmp_path: Path, quantization: str) -> None:
    backend = None if quantization == "fp32" else quantization
    (one,) = launch(tmp_path / "one", ALONE, {"cases": {"run": {"quantization": backend, "resume": False}}})["run"]
    folder = tmp_path / "two"
    folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_TRAIN_V2_ENABLED": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), backend or "none"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (folder / "crashed").exists()
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["resumed"], "the second attempt got the checkpoint of step 4"
        assert rank["world_size"] == rank["processes"] == 2
        assert rank["distributed_type"] == "DistributedType.MULTI_CPU"
        assert rank["wrapper"] == "DistributedDataParallel"
        assert rank["losses"] == pytest.approx(one["losses"], abs=2e-6)
    assert ranks[0]["adapter"] == ranks[1]["adapter"]
    reported = Path(json.loads((folder / "result.json").read_text())["checkpoint"])
    stored = load_file(reported / "checkpoint" / "adapter_model.safetensors")
    live = {name.replace(".default", ""): value for name, value in ranks[0]["adapter"].items()}
    assert {name: tensor.double().flatten().tolist() for name, tensor in stored.items()} == live
