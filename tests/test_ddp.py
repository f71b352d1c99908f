"""Two real processes under torchrun with gloo, against one process on the same global batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("ddp_run.py")


def run(folder: Path, quantization: str | None, processes: int, *extra: str) -> list[dict[str, Any]]:
    folder.mkdir()
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += [str(SCRIPT), str(folder), quantization or "none", *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_two_processes_equal_one(tmp_path: Path, quantization: str | None) -> None:
    (alone,) = run(tmp_path / "one", quantization, 1)
    ranks = run(tmp_path / "two", quantization, 2)
    assert alone["wrapper"] == "PeftModelForCausalLM"
    for rank in ranks:
        assert rank["world_size"] == 2
        assert rank["distributed_type"] == "DistributedType.MULTI_CPU"
        assert rank["wrapper"] == "DistributedDataParallel"
        assert rank["model"] == "PeftModelForCausalLM"
        assert rank["error"] == ""
    assert ranks[0]["adapter"] == ranks[1]["adapter"]
    assert len(alone["losses"]) == 6
    assert ranks[0]["losses"] == pytest.approx(alone["losses"], abs=2e-6)
    files = [load_file(tmp_path / name / "checkpoint-6" / "adapter_model.safetensors") for name in ("one", "two")]
    assert files[0].keys() == files[1].keys()
    for key in files[0]:
        assert files[1][key].isclose(files[0][key], atol=1e-4).all(), key


def test_a_bad_loss_on_one_rank_stops_both(tmp_path: Path) -> None:
    first, second = run(tmp_path / "two", None, 2, "broken")
    assert first["error"].startswith("NonFiniteLoss")
    assert "another rank" in first["error"]
    assert second["error"].startswith("NonFiniteLoss")
    assert "step 3" in second["error"]
