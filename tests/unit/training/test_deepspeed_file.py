"""The file of DeepSpeed settings: what it holds takes effect, agrees with the configuration, or is refused by name."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from cpsp_dist.config import Config, load_config
from cpsp_dist.training.engine import deepspeed_settings
from cpsp_dist.training.engine.deepspeed_file import (
    UNUSABLE,
    UNUSABLE_ZERO,
    FileSettings,
    ZeroSettings,
    refusals_named,
)
from cpsp_dist.utils.errors import ConfigError
from cpsp_dist.utils.logs import printable
from tests.support.examples import examples
from tests.support.file_damage import BYTES, of_json
from tests.support.limits import within_limits

GOOD = '{"zero_optimization": {"overlap_comm": true}}'


def config(path: Path, *more: str) -> Config:
    return load_config("keypad", ["train.global_batch=8", f"engine.deepspeed={path}", *more])


def merged(folder: Path, content: str | bytes, *more: str, world: int = 2) -> dict:
    path = folder / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return deepspeed_settings(config(path, *more), world)


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        ("", ["is not JSON"]),
        ("[]", ["holds no mapping of settings, but list"]),
        ("null", ["holds no mapping"]),
        ('"x"', ["holds no mapping"]),
        ("[" * 100_000, ["is not JSON"]),
        (b"\xff\xfe", ["is not JSON"]),
        ('{ // ours\n "zero_optimization": {}}', ["is not JSON", "line 1"]),
        ('{"zero_optimization": {}, "zero_optimization": {}}', ['the key "zero_optimization" is there twice']),
        ('{"gradient_predivide_factor": NaN}', ["not a finite number (NaN)"]),
        ('{"zero_optimization": null}', ["zero_optimization=null"]),
        ('{"zero_optimization": true}', ["zero_optimization=true"]),
        ('{"zero_optimization": []}', ["zero_optimization=[]"]),
        (
            '{"zero_optimization": {"overlap_com": true}}',
            ["overlap_com'; did you mean 'overlap_comm'"],
        ),
        ('{"zero_optimizatoin": {}}', ["'zero_optimizatoin'; did you mean 'zero_optimization'"]),
        ('{"zero_optimization": {"reduce_bucket_size": "many"}}', ['zero_optimization.reduce_bucket_size="many"']),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', ["zero_optimization.reduce_bucket_size", "'auto'"]),
        ('{"zero_optimization": {"reduce_bucket_size": 0}}', ["zero_optimization.reduce_bucket_size=0"]),
        ('{"zero_optimization": {"overlap_comm": 1}}', ["zero_optimization.overlap_comm=1"]),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', ["offload_optimizer is not used"]),
        ('{"optimizer": {"type": "Adam"}}', ["optimizer is not used by this trainer: set train.optimizer"]),
        ('{"communication_data_type": "fp16"}', ['communication_data_type="fp16"']),
        ('{"train_batch_size": 9}', ["train_batch_size=9, but train.global_batch=8"]),
        ('{"train_batch_size": "auto"}', ['train_batch_size="auto", but train.global_batch=8']),
        ('{"train_micro_batch_size_per_gpu": 3}', ["=3, but train.global_batch=8 and train.accumulation=1 on 2 ranks"]),
        ('{"gradient_accumulation_steps": true}', ["gradient_accumulation_steps=true, but train.accumulation=1"]),
        ('{"gradient_clipping": 7}', ["gradient_clipping=7, but train.grad_clip_norm=0.1"]),
        ('{"bf16": {"enabled": true}}', ["bf16.enabled=true, but train.precision=fp32"]),
        ('{"bf16": {"enabled": false, "x": 1}}', ["unknown key 'bf16'"]),
        ('{"fp16": {"enabled": true}}', ["fp16.enabled=true, but train.precision=fp32"]),
        ('{"zero_optimization": {"stage": 1}}', ["zero_optimization.stage=1, but engine.zero=0"]),
        ('{"\\u001b[31m": 1, "stage": 2}', ["unknown key '\\u001b[31m'", "unknown key 'stage'"]),
    ],
)
def test_mistakes_are_named_all_at_once(tmp_path, content, lines):
    with pytest.raises(ConfigError, match=r"^engine\.deepspeed: .*ds\.json") as raised:
        merged(tmp_path, content)
    for line in lines:
        assert line in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert len(str(raised.value).splitlines()) <= len(lines) + 1


@pytest.mark.parametrize("key", [*UNUSABLE, *(f"zero_optimization.{key}" for key in UNUSABLE_ZERO)])
def test_what_this_trainer_does_not_use_is_refused_with_a_reason(tmp_path, key):
    section, _, leaf = key.rpartition(".")
    content = {section: {leaf: {"enabled": True}}} if section else {leaf: {"params": 1}}
    with pytest.raises(ConfigError, match=f"{key} is not used by this trainer: "):
        merged(tmp_path, json.dumps(content))


def test_what_repeats_the_configuration_is_taken(tmp_path):
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.1,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_optimization": {"stage": 2, "overlap_comm": False},
    }
    overrides = ("engine.zero=2", "train.accumulation=2")
    assert merged(tmp_path, json.dumps(content), *overrides) == merged(
        tmp_path, '{"zero_optimization": {"overlap_comm": false}}', *overrides
    )


def test_a_setting_lets_conflicts_pass_and_ours_hold(tmp_path):
    content = '{"gradient_clipping": 7, "zero_optimization": {"stage": 3, "overlap_comm": true}}'
    taken = merged(tmp_path, content, "engine.ignore_conflicts=true", "engine.zero=2")
    assert taken == merged(tmp_path, GOOD, "engine.zero=2")
    assert taken["gradient_clipping"] == pytest.approx(0.1)


def test_a_file_that_is_missing_or_too_large(tmp_path):
    with pytest.raises(ConfigError, match=r"engine\.deepspeed: cannot read .*none\.json: .*No such file"):
        deepspeed_settings(config(tmp_path / "none.json"), world=1)
    with pytest.raises(ConfigError, match="more than 1 MiB"):
        merged(tmp_path, " " * 2_000_000 + "{}")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ConfigError, match="is a named pipe, not a file"):
        deepspeed_settings(config(tmp_path / "pipe.json"), world=1)


def test_a_byte_order_mark_is_no_mistake(tmp_path):
    assert merged(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()) == merged(tmp_path, GOOD)


def test_ddp_with_a_deepspeed_setting_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no ZeRO"):
        config("overlap.json", "engine.kind=ddp")
    with pytest.raises(ConfigError, match="has no ZeRO"):
        load_config("keypad", ["engine.kind=ddp", "engine.zero=2"])


def test_every_setting_that_is_taken_is_deepspeeds_with_its_default():
    """Else DeepSpeed would ignore it, as it ignores every key that it does not know."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    known = {field.alias or name: field.default for name, field in DeepSpeedZeroConfig.model_fields.items()}
    for name, field in ZeroSettings.model_fields.items():
        assert name in known
        assert str(known[name]).replace(",", "") == str(field.default), name


@pytest.mark.long
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_deepspeed_holds_what_the_file_sets(tmp_path, zero):
    """All of it at once, off its defaults, read back from DeepSpeed's own configuration."""
    from deepspeed.runtime.config import DeepSpeedConfig

    wanted = {
        "zero_optimization": {
            "contiguous_gradients": False,
            "reduce_scatter": False,
            "reduce_bucket_size": 1000,
            "allgather_partitions": False,
            "allgather_bucket_size": 2000,
            "overlap_comm": True,
            "round_robin_gradients": True,
            "sub_group_size": 3000,
            "stage3_max_live_parameters": 4000,
            "stage3_max_reuse_distance": 5000,
            "stage3_prefetch_bucket_size": 6000,
            "stage3_param_persistence_threshold": 7000,
        },
        "communication_data_type": "bf16",
        "prescale_gradients": True,
        "gradient_predivide_factor": 2.0,
        "wall_clock_breakdown": True,
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "comms_logger": {"enabled": True, "verbose": True},
    }
    assert set(wanted) == set(FileSettings.model_fields)
    assert set(wanted["zero_optimization"]) == set(ZeroSettings.model_fields)
    given_to = merged(tmp_path, json.dumps(wanted), f"engine.zero={zero}", world=1)
    held = DeepSpeedConfig(given_to)
    names = {field.alias or name: name for name, field in type(held.zero_config).model_fields.items()}
    for key, value in wanted["zero_optimization"].items():
        assert getattr(held.zero_config, names[key]) == value, key
    assert str(held.communication_data_type) == "torch.bfloat16"
    assert held.prescale_gradients
    assert held.gradient_predivide_factor == 2.0
    assert held.wall_clock_breakdown
    assert held.flops_profiler_config.profile_step == 3
    assert held.comms_config.comms_logger.verbose


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.just("auto"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=6), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from([*FileSettings.model_fields, "bf16", "train_batch_size", "optimizer"]) | st.text(max_size=8)
SECTIONS = st.dictionaries(st.sampled_from([*ZeroSettings.model_fields, "stage", "enabled"]), VALUES, max_size=3)


@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.dictionaries(KEYS, VALUES | SECTIONS, max_size=3), cut=st.integers(0, 200))
def test_any_file_is_taken_as_it_is_or_refused(tmp_path, content, cut):
    """Complete, and cut off anywhere: what is taken reaches DeepSpeed unchanged, with our values of what we own."""
    ours = merged(tmp_path, "{}")
    for text in (json.dumps(content), json.dumps(content)[:cut]):
        refused = taken = None
        try:
            taken = merged(tmp_path, text)
        except ConfigError as error:
            refused = str(error)
        if taken is None:
            assert "ds.json" in refused
            assert len(refused) < 5000
            continue
        owned = {*ours, "train_batch_size", "fp16"}
        left = {key: value for key, value in json.loads(text).items() if key not in owned}
        assert {key: value for key, value in taken.items() if key not in ours} == left
        assert taken["zero_optimization"] == {**json.loads(text).get("zero_optimization", {}), "stage": 0}
        assert all(taken[key] == value for key, value in ours.items() if key != "zero_optimization")


LARGE = {
    "train_batch_size": 8,
    "gradient_clipping": 0.1,
    "gradient_predivide_factor": 2.0,
    "communication_data_type": "bf16",
    "prescale_gradients": True,
    "bf16": {"enabled": False},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5000, "sub_group_size": 10**9},
    "flops_profiler": {"enabled": False, "profile_step": 3, "module_depth": 2, "output_file": "f.txt"},
    "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
}


@pytest.mark.parametrize("count", [60, pytest.param(800, marks=pytest.mark.long)])
def test_every_damage_is_taken_as_it_stands_or_refused(tmp_path, count):
    """What is taken is what Python's own reader finds."""
    path, good = tmp_path / "ds.json", json.dumps(LARGE, indent=1).encode()
    ours = config(path, "engine.zero=2")
    taken = 0
    for number in range(count):
        draw = random.Random(number)
        mutation = draw.choice((*BYTES, of_json, of_json, of_json, of_json, of_json, of_json))
        path.write_bytes(mutation(good, draw))
        what = f"{number}: {mutation.__name__}"
        try:
            with within_limits(what):
                found = deepspeed_settings(ours, 1)
        except ConfigError as error:
            text = printable(str(error))
            assert str(path) in text, what
            assert len(text.splitlines()) < 20, what
            assert max(map(len, text.splitlines())) < 500, what
            continue
        taken += 1
        content = json.loads(path.read_bytes().decode("utf-8-sig"))
        for key, value in content.items():
            if isinstance(value, dict) and key in found:
                assert all(found[key][name] == inner for name, inner in value.items()), what
            else:
                assert key in found or key in ("train_batch_size", "bf16"), what  # these follow from the configuration
                assert found.get(key, value) == value, what
        assert all(abs(value) <= 2**53 for value in found["zero_optimization"].values() if value is not None), what
    assert 0 < taken < count


def test_what_deepspeed_itself_refuses_names_the_file(tmp_path: Path) -> None:
    """As gradient_predivide_factor under ZeRO-2, which it asserts."""
    refused = r"engine.deepspeed: .*ds.json: DeepSpeed refuses it: not yet supported"
    with pytest.raises(ConfigError, match=refused), refusals_named(config(tmp_path / "ds.json")):
        raise AssertionError("not yet supported")
    with pytest.raises(AssertionError), refusals_named(load_config("keypad")):
        raise AssertionError("a mistake of the program")
