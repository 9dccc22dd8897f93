"""What accelerate was asked for is in the configuration, or the start is refused with the setting to use."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cpsp_dist.config import load_config
from cpsp_dist.training.engine.launcher_settings import (
    accelerate_conflicts,
    check_launcher_settings,
    process_conflicts,
)
from cpsp_dist.utils.errors import ConfigError
from tests.support.environment import REPO, environment
from tests.support.runs import KEYPAD, overrides

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_MIXED_PRECISION": "no"}


def conflicts(env: dict[str, str], *settings: str, device: str = "cpu") -> list[str]:
    return accelerate_conflicts(load_config(KEYPAD, settings), device, env)


@pytest.mark.parametrize(
    ("env", "line"),
    [
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "set engine.kind=deepspeed engine.zero=3"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "set train.precision=bf16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "mixed precision fp16, which no engine has"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "mixed precision fp8, which no engine has"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "set train.accumulation=4"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "7"}, "set train.grad_clip_norm=7"),
        ({"ACCELERATE_GRADIENT_CLIPPING": "junk"}, "set train.grad_clip_norm=junk"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "set engine.deepspeed=ds.json"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "offload of the optimizer"),
        ({"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "offload of the param"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP: set engine.zero=3"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo backend inductor, but engine.compile=none: set engine.com"),
        ({"ACCELERATE_DYNAMO_BACKEND": "TENSORRT"}, "dynamo backend tensorrt, which no engine has"),
    ],
)
def test_each_request_that_would_be_ignored_is_named(env: dict[str, str], line: str) -> None:
    (found,) = conflicts(env)
    assert line in found


def test_the_cpu_is_no_request_where_there_is_no_gpu() -> None:
    assert not conflicts({"ACCELERATE_USE_CPU": "True"})
    assert "CUDA_VISIBLE_DEVICES" in conflicts({"ACCELERATE_USE_CPU": "True"}, device="cuda")[0]


def test_what_agrees_is_no_conflict() -> None:
    asked = DEEPSPEED | {
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
        "ACCELERATE_GRADIENT_CLIPPING": "7.0",
        "ACCELERATE_DYNAMO_BACKEND": "NO",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    }
    same = ["engine.zero=2", "train.precision=bf16", "train.accumulation=4", "train.grad_clip_norm=7"]
    assert not conflicts(asked, *same)
    assert len(conflicts(asked, "train.grad_clip_norm=null")) == 4
    inductor = {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}
    assert not conflicts(inductor, "engine.compile=inductor")
    more = {"ACCELERATE_DYNAMO_MODE": "max-autotune", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"}
    assert len(conflicts(inductor | more, "engine.compile=inductor")) == 2


def test_all_are_named_at_once_and_a_setting_lets_them_pass() -> None:
    env = DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_CLIPPING": "7"}
    with pytest.raises(ConfigError) as raised:
        check_launcher_settings(load_config(KEYPAD), "cpu", env)
    assert len(str(raised.value).splitlines()) == 3
    check_launcher_settings(load_config(KEYPAD, ["engine.ignore_conflicts=true"]), "cpu", env)


def test_more_processes_than_started(tmp_path: Path) -> None:
    launch = ["/usr/bin/python3", "/opt/bin/accelerate", "launch", "--cpu"]
    file = tmp_path / "accelerate.yaml"
    file.write_text("num_processes: 4\nuse_cpu: true\n")
    assert "2 processes, but it started 1" in process_conflicts({}, [*launch, "--num_processes", "2", "train.py"])[0]
    assert "3 processes" in process_conflicts({}, [*launch, "--num-processes=3"])[0]
    assert "4 processes" in process_conflicts({}, [*launch, "--config_file", str(file)])[0]
    assert not process_conflicts({}, [*launch, "--num_processes", "1"])
    assert not process_conflicts({"WORLD_SIZE": "2"}, [*launch, "--num_processes", "2"])
    assert not process_conflicts({}, [*launch, "--config_file", str(tmp_path / "none.yaml")])
    assert not process_conflicts({}, ["/bin/bash", "run.sh", "--num_processes", "2"])


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        (
            ["--use_deepspeed", "--zero_stage", "3", "--mixed_precision", "bf16", "--num_processes", "1"]
            + ["--gradient_accumulation_steps", "4", "--gradient_clipping", "7"],
            ["engine.zero=3", "train.precision=bf16", "train.accumulation=4", "train.grad_clip_norm=7"],
        ),
        (["--cpu", "--num_processes", "2"], ["2 processes, but it started 1"]),
    ],
)
def test_under_the_real_accelerate(keypad_shards: Path, tmp_path: Path, flags: list[str], lines: list[str]) -> None:
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *flags, "-m", "cpsp_dist.train"]
    command += ["--config", str(KEYPAD), *overrides(keypad_shards, tmp_path / "run", "train.steps=1")]
    env = environment(HOME=str(tmp_path))
    done = subprocess.run(command, env=env, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "error: accelerate launch asks for what this run would not do" in done.stderr
    for line in lines:
        assert line in done.stderr
    assert not (tmp_path / "run").exists()
