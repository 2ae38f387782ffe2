"""Compiled losses train the same weights."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_compiled_losses_train_the_same_weights_in_two_graphs(tmp_path: Path) -> None:
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}  # nothing was compiled before
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiling"], env=environment, check=True, stdout=subprocess.PIPE
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"].startswith("the losses of TD3BC cannot be compiled (") and "compiler" in found["refused"]
    assert found["apart"] < 1e-5 and found["moved"] > 0.01
    assert (found["graphs"], found["breaks"]) == (2, 0)  # with and without the policy, each in one piece
