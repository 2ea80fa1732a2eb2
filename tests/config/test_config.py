import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from helpers import tiny_config

from eiwtrain import flow
from eiwtrain.config import MAX_ERROR_LINES, Config, ConfigError, describe_fields, flatten
from eiwtrain.config.file import load_config
from eiwtrain.data.cache import DEFAULT_CACHE_BYTES
from eiwtrain.data.order import DEFAULT_BLOCK, DEFAULT_LANES
from eiwtrain.flow import PRESETS
from eiwtrain.flow.config import CONDITIONERS
from eiwtrain.storage.database import sqlite_path
from eiwtrain.tracking import tracking_uri
from eiwtrain.train.state import flow_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny_config(tmp_path)))
    return str(file)


def error(path, *overrides):
    with pytest.raises(ConfigError) as e:
        load_config(path, list(overrides))
    message = str(e.value)
    assert len(message.splitlines()) <= MAX_ERROR_LINES
    return message


@pytest.mark.parametrize("config", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid(config, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    load_config(str(config))


def test_overrides_reach_every_field(path):
    plain = load_config(path)
    values = {"run.name": "other", "model.conditioner.hidden": 5, "train.lr": 0.5, "eval.temperatures": [0.1, 0.2]}
    values |= {"data.prepare": "photos", "train.precision": "fp32", "data.augment": "eta", "train.max_hours": 2.0}
    changed = load_config(
        path, [f"{k}={yaml.safe_dump(v, default_flow_style=True).split(chr(10))[0]}" for k, v in values.items()]
    )
    flat, before = flatten(changed.model_dump(mode="json")), flatten(plain.model_dump(mode="json"))
    assert {k: flat[k] for k in values} == values
    assert {k: v for k, v in flat.items() if k not in values} == {k: v for k, v in before.items() if k not in values}


def test_a_field_whose_section_is_absent_can_be_overridden(path, tmp_path):
    raw = tiny_config(tmp_path)
    del raw["model"]
    Path(path).write_text(yaml.safe_dump(raw))
    assert load_config(path, ["model.conditioner.hidden=7", "model.levels=1"]).model.conditioner.hidden == 7


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", ["train.lrr", "did you mean train.lr?"]),
        ("data.flip=true", ["data.flip", "did you mean data.augment?"]),
        ("trian.lr=1", ["trian", "did you mean train?"]),
        ("lr=1", ["did you mean train.lr?"]),
        ("model.conditioner.hiden=1", ["did you mean model.conditioner.hidden?"]),
        ("train.max_steps=ten", ["train.max_steps", "'ten'", "integer"]),
        ("train.max_steps=0", ["train.max_steps", "greater than 0"]),
        ("checkpoint.every=soon", ["checkpoint.every", "'soon'", "10m", "auto"]),
        ("checkpoint.every=0", ["checkpoint.every", "0 is not an interval"]),
        ("model.shuffle=sof", ["model.shuffle", "'soft'"]),
        ("model.levels=4", ["model.levels", "2^4 = 16", "data.resolution is 8", "at most 3"]),
        ("data.resolution=7", ["data.resolution is 7", "multiple of 4"]),
        ("train.micro_batch=9", ["train.micro_batch", "global_batch = 8", "at most 8"]),
        ("workers.max=1", ["workers.max", "workers.min = 2"]),
        ("workers.max=9", ["workers.max", "global_batch = 8"]),
        ("run.storage=s3://bucket/x", ["tracking.uri", "must be set"]),
        ("model.anchor_every=2 model.backprop=stored", ["model.anchor_every"]),
        ("model.memory_budget=9", ["model.memory_budget", "model.backprop = invertible", "model.backprop=auto"]),
        ("model.preset=glo", ["model.preset", "'glow'"]),
        (
            "model.conditioner.kind=transformer model.conditioner.hidden=6",
            ["model.conditioner.heads: 4 does not divide", "use 3"],
        ),
        (
            "model.conditioner.kind=transformer model.conditioner.patch=4 model.conditioner.hidden=8",
            ["model.conditioner.patch: 4 does not divide the last level's side, 2", "use model.conditioner.patch=2"],
        ),
        ("model.preset=glow model.name=x", ["model.name"]),
        ("model.bins=17", ["model.bins", "less than or equal to 16"]),
        ("model.conditioner.dropout=1", ["model.conditioner.dropout", "less than 1"]),
        ("train.optimizer=adam", ["train.optimizer", "'adamw', 'adamax' or 'muon'"]),
        ("train.betas=[0.9,1]", ["train.betas", "less than 1"]),
        ("train.lr_decay=1.1", ["train.lr_decay", "less than or equal to 1"]),
        ("train.optimizer=muon train.zero_stage=1", ["train.optimizer", "train.zero_stage = 1", "train.zero_stage=0"]),
        ("train.finetune_steps=12", ["train.finetune_steps", "train.max_steps = 12", "at most 11"]),
        ("train.deterministic=1.5", ["train.deterministic"]),
        ("workers.price_per_hour=-1", ["workers.price_per_hour: -1", "0 or more"]),
        ("workers.price_per_hour=.inf", ["workers.price_per_hour", "0 or more"]),
        ("workers.price_per_hour=.nan", ["workers.price_per_hour", "0 or more"]),
        ("workers.price_per_hour=$3", ["workers.price_per_hour", "no currency"]),
        ("workers.price_per_hour='3'", ["workers.price_per_hour", "no currency"]),
        ("workers.price_per_hour=true", ["workers.price_per_hour", "must be a number"]),
        ("workers.price_per_hour=[1]", ["workers.price_per_hour", "must be a number"]),
        ("workers.price_per_hour={}", ["workers.price_per_hour", "no price in it"]),
        ("workers.price_per_hour={a:-1}", ["workers.price_per_hour", "{g6.xlarge: 0.8}"]),
        ("workers.price_per_hour={a:1}", ["workers.price_per_hour", "{g6.xlarge: 0.8}"]),
        ("workers.price_per_hour={1:1}", ["workers.price_per_hour", "{g6.xlarge: 0.8}"]),
        ("train.max_cost=0 workers.price_per_hour=1", ["train.max_cost", "greater than 0"]),
        ("train.max_cost=-2 workers.price_per_hour=1", ["train.max_cost", "greater than 0"]),
        ("train.max_cost=5", ["train.max_cost: 5", "workers.price_per_hour"]),
        ("run.name=${NOT_SET_ANYWHERE}", ["run.name", "NOT_SET_ANYWHERE", "export"]),
        ("run.name=a/b", ["run.name"]),
        ("run.storage=''", ["run.storage", "at least 1 character"]),
        ("train.max_steps=true", ["train.max_steps", "not true or false"]),
        ("train.lr=.inf", ["train.lr", "finite"]),
        ("eval.temperatures=[.nan,1]", ["eval.temperatures", "finite"]),
        ("train.seed=99999999999999999999", ["train.seed", "less than"]),
        ("tracking.uri=http://user:pw@host", ["tracking.uri", "MLFLOW_TRACKING_PASSWORD"]),
        ("tracking.uri=postgresql+psycopg2://user:pw@host/db", ["tracking.uri", "MLflow server"]),
        ("tracking.uri=http://x run.storage=s3://key:secret@bucket", ["run.storage", "AWS_SECRET_ACCESS_KEY"]),
        ("eval.temperatures=[1]", ["eval.temperatures"]),
        ("train=3", ["train"]),
        ("nonsense", ["'nonsense'", "section.field=value"]),
        ("train.lr=[", ["train.lr", "not valid YAML"]),
        ("run.name=123", ["run.name: 123", """run.name='"123"'"""]),
        ("run.name=2024-01-01", ["run.name", """run.name='"2024-01-01"'"""]),
        ("data.path=1.5", ["data.path", """data.path='"1.5"'"""]),
        ("run.name=yes", ["run.name", "quote it"]),
        ("model.levels=1000000000000", ["model.levels", "at most 3"]),
        ("data.cache_dir=s3://bucket/x", ["data.cache_dir", "local path"]),
        ("checkpoint.near=s3://bucket/x", ["checkpoint.near", "local path"]),
        ("data.cache_dir=s3://key:hunter2@bucket/x", ["data.cache_dir", "would be logged"]),
        ("tracking.experiment=http://a:b@c", ["tracking.experiment", "would be logged"]),
        ("train.lr=1:99:2024-99-99", ["train.lr"]),
        ("train.lr=2024-99-99", ["train.lr", "not valid YAML"]),
    ],
)
def test_a_bad_value_is_one_line_with_field_and_remedy(path, override, words):
    message = error(path, *override.split(" "))
    assert len(message.splitlines()) == 1
    assert [w for w in words if w not in message] == []


PLANTED = "hunter2"


@pytest.mark.parametrize(
    "line",
    [
        f"uri: mysql://user:{PLANTED}@host: x",
        f"uri: *{PLANTED}",
        f"uri: !{PLANTED} x",
        f"uri: '{PLANTED}",
        f'uri: "{PLANTED}\\q"',
        f"uri: [{PLANTED}",
        f"{PLANTED}",
        f"uri: @{PLANTED}",
        f"uri: &{PLANTED} &{PLANTED} x",
        f"uri: {{password: {PLANTED}}}",
        f"uri: [{PLANTED}]",
        f"uri: http://user:{PLANTED}@host",
        f"uri: http://host/?pass={PLANTED}",
        f"uri: mssql+pyodbc:///?odbc_connect={PLANTED}",
        f"uri: %{PLANTED}",
        f"uri: `{PLANTED}",
        f"  uri: x\n {PLANTED}: y",
        f"uri: x\n---\n{PLANTED}: y",
        f"uri: {PLANTED}\x00",
    ],
)
def test_no_error_repeats_a_line_of_the_config(path, line):
    Path(path).write_text(Path(path).read_text() + f"tracking:\n  {line}\n")
    assert PLANTED not in error(path)


@pytest.mark.parametrize(
    "argument",
    [f"tracking.uri:mysql://user:{PLANTED}@host", f"password {PLANTED}", f"tracking.uri=*{PLANTED}", PLANTED,
     f"tracking.uri='{PLANTED}", f"tracking.uri={{a: {PLANTED}}}", f"mysql://user:{PLANTED}@host/?a=b"],
)  # fmt: skip
def test_no_error_repeats_the_value_of_an_override(path, argument):
    assert PLANTED not in error(path, argument)


def test_a_small_file_that_stands_for_billions_of_values_is_refused_at_once(path):
    text = Path(path).read_text()
    lists = "".join(f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 2) if i else '1'}]\n" for i in range(10))
    nested = "".join(
        f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" if i else "m0: &m0 {x: 1}\n" for i in range(9)
    )
    for bomb in (lists, nested, "a: &a [*a]\n", "a: " + "[" * 30_000, "x" * 100_000):
        Path(path).write_text(f"{text}{bomb}")
        assert len(error(path).splitlines()) <= MAX_ERROR_LINES


def test_many_errors_are_cut_to_four_lines(path):
    message = error(path, *[f"train.nope{i}=1" for i in range(9)])
    assert len(message.splitlines()) == MAX_ERROR_LINES
    assert message.splitlines()[-1] == "... and 6 more"


def test_a_preset_stands_for_defaults_and_what_is_set_beside_it_counts(path):
    raw = yaml.safe_load(Path(path).read_text())
    del raw["model"]
    Path(path).write_text(yaml.safe_dump(raw))
    plain = load_config(path, ["model.levels=2"]).model
    sized = load_config(path, ["model.preset=jet", "model.levels=2", "model.conditioner.patch=1"]).model
    conditioner = PRESETS["jet"]["conditioner"] | {"patch": 1}
    assert sized.model_dump(exclude_unset=True) == PRESETS["jet"] | {
        "preset": "jet",
        "levels": 2,
        "conditioner": conditioner,
    }
    assert plain.preset is None
    assert plain.steps != sized.steps


@pytest.mark.parametrize("preset", PRESETS)
def test_the_flow_of_a_preset_is_the_library_s(path, preset):
    raw = yaml.safe_load(Path(path).read_text())
    raw |= {"model": {"preset": preset}, "train": raw["train"] | {"precision": "fp32"}}
    raw["data"]["resolution"] = 32
    Path(path).write_text(yaml.safe_dump(raw))
    expected = flow.FlowConfig.from_dict(flow.preset(preset, {"image_shape": [3, 32, 32]}))
    assert flow_config(load_config(path, []), 3) == expected


def test_the_kinds_of_conditioner_are_those_of_the_one_list(path, monkeypatch):
    assert f"model.conditioner.kind = conv  # {' | '.join(CONDITIONERS)}\n" in describe_fields()
    for kind in CONDITIONERS:
        overrides = [f"model.conditioner.kind={kind}", "model.conditioner.patch=1", "model.conditioner.heads=2"]
        assert type(flow_config(load_config(path, overrides), 3).conditioner) is flow.ConditionerConfig
    assert "'transformer'" in error(path, "model.conditioner.kind=conv2")


def test_every_field_of_the_flow_reaches_the_model(path):
    """Set each to another value than the default; FlowConfig's own fields come from the data and the precision."""
    other = {
        "backbone": "dense",
        "levels": 1,
        "units": [2],
        "steps": [3],
        "noise_channels": 2,
        "coupling": "spline",
        "bins": 4,
        "shuffle": "hard",
        "shuffle_block": 2,
    }
    other |= {"dequantization": "variational", "classes": 3, "backprop": "auto", "memory_budget": 9}
    other |= {"trunk_dtype": "float64", "anchor_every": 2, "n_bits": 5}
    other["conditioner"] = {"kind": "residual", "hidden": 7, "depth": 2, "activation": "relu", "dropout": 0.1}
    other["conditioner"] |= {"heads": 2, "patch": 4, "growth": 5, "attention": "none"}
    other |= {"order_input": "one", "kl": "true"}
    other["dequantizer"] = {"couplings": 1, "hidden": 2, "depth": 3, "growth": 5}
    raw = yaml.safe_load(Path(path).read_text()) | {"model": other}
    Path(path).write_text(yaml.safe_dump(raw))
    built = flow_config(load_config(path, ["train.precision=bf16"]), 3).to_dict()
    default = flow.FlowConfig((3, 8, 8)).to_dict()
    assert built == other | {"image_shape": [3, 8, 8], "conditioner_dtype": "bfloat16"}
    assert [name for name in built if built[name] == default[name] and name != "image_shape"] == []


def test_a_missing_required_field_is_named(path, tmp_path):
    raw = tiny_config(tmp_path)
    del raw["data"]["path"]
    Path(path).write_text(yaml.safe_dump(raw))
    assert "data.path: is missing" in error(path)


def test_a_missing_file_names_the_nearest(path):
    assert "did you mean" in error(path.replace("tiny", "tinny"))


def test_a_password_in_a_url_is_refused_without_repeating_it(path):
    assert "hunter2" not in error(path, "tracking.uri=http://me:hunter2@host")


def test_a_file_url_is_a_local_path(path):
    assert load_config(path, ["run.storage=file:///x/y"]).run.storage == "/x/y"


def test_the_order_defaults_are_those_of_the_stream(path, tmp_path):
    raw = tiny_config(tmp_path)
    raw["data"] = {"path": "x", "resolution": 8}
    Path(path).write_text(yaml.safe_dump(raw))
    data = load_config(path).data
    assert (data.lanes, data.shuffle_block, data.cache_bytes) == (DEFAULT_LANES, DEFAULT_BLOCK, DEFAULT_CACHE_BYTES)


def test_a_file_that_is_no_mapping_or_no_yaml_is_refused(path):
    for text in ("- 1\n", "a: [\n"):
        Path(path).write_text(text)
        assert path in error(path)


def test_environment_variables_stand_in_values(path, monkeypatch):
    monkeypatch.setenv("WHERE", "/some/where")
    assert load_config(path, ["run.storage=${WHERE}/runs"]).run.storage == "/some/where/runs"
    assert load_config(path, ["run.storage=${NOT_SET_ANYWHERE:-/default}"]).run.storage == "/default"


def test_mlflow_s_own_variable_is_used_where_the_config_names_no_store(path, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server:5000")
    config = load_config(path)
    assert config.tracking.uri == "http://server:5000"
    assert load_config(path, ["run.storage=s3://bucket/x"]).tracking.uri == "http://server:5000"
    assert load_config(path, ["tracking.uri=http://other"]).tracking.uri == "http://other"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another")  # as in a worker, say
    assert tracking_uri(config) == "http://server:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(load_config(path)) == f"sqlite:///{tmp_path}/runs/mlflow.db"


def test_a_password_in_mlflow_s_variable_is_refused_without_repeating_it(path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host")
    assert "tracking.uri" in error(path)
    assert "hunter2" not in error(path)


def test_a_relative_database_in_mlflow_s_variable_becomes_absolute(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    assert load_config(path).tracking.uri == f"sqlite:///{tmp_path}/m.db"


def test_relative_paths_become_absolute(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert load_config(path, ["run.storage=here"]).run.storage == str(tmp_path / "here")
    assert load_config(path, ["tracking.uri=sqlite:///m.db"]).tracking.uri == f"sqlite:///{tmp_path}/m.db"
    assert load_config(path, ["tracking.uri=sqlite:////x/m.db"]).tracking.uri == "sqlite:////x/m.db"


ODD = ("a b", "a #b", "a?b=c", "a%41", "a%", "a#b", "a&b;c", "a::b", "a[1]*", "a ", "ä", "a'b", 'a"b', "~a")


@pytest.mark.parametrize("name", ODD)
def test_an_odd_path_stays_as_it_is_written(path, tmp_path, name):
    config = load_config(path, [f"run.storage={tmp_path}/{name}", f"data.path={tmp_path}/{name}/data"])
    assert (config.run.storage, config.data.path) == (f"{tmp_path}/{name}", f"{tmp_path}/{name}/data")
    assert sqlite_path(tracking_uri(config)) == tmp_path / name / "mlflow.db"


@pytest.mark.parametrize("text", ["5 # five", '"a" # b', "--- 5", "[1, 2] # x", "null #b"])
def test_what_yaml_would_leave_out_of_an_override_is_refused(path, text):
    assert "run.name: YAML takes a part of the value for a comment" in error(path, f"run.name={text}")


@pytest.mark.parametrize("text", ["010", "1:30", "-0_7", "12:30:45"])
def test_a_number_that_yaml_would_read_to_another_base_is_refused(path, text):
    assert "train.max_steps: YAML reads" in error(path, f"train.max_steps={text}")


def test_an_override_is_still_yaml(path):
    given = ["eval.temperatures=[0.5, 1]", "run.name='a'", 'data.path="/a #b"', "data.cache_dir=", "run.storage=#b"]
    config = load_config(path, [*given, "model.conditioner={hidden: 4}"])
    assert (config.eval.temperatures, config.run.name, config.data.path) == ((0.5, 1), "a", "/a #b")
    assert (config.data.cache_dir, config.model.conditioner.hidden) == (None, 4)
    assert config.run.storage.endswith("/#b")


def test_a_relative_database_keeps_its_odd_name(path, monkeypatch, tmp_path):
    (tmp_path / "a?b").mkdir()
    monkeypatch.chdir(tmp_path / "a?b")
    assert sqlite_path(load_config(path, ["tracking.uri=sqlite:///c%3Fd.db"]).tracking.uri) == tmp_path / "a?b/c?d.db"
    assert load_config(path, ["tracking.uri=sqlite:////x/m.db?timeout=3"]).tracking.uri.endswith("/x/m.db?timeout=3")


def test_a_question_mark_in_the_path_of_a_database_is_refused(path):
    assert "write ? in a path as %3F" in error(path, "tracking.uri=sqlite:////tmp/a?b/m.db")
    assert "write ? in a path as %3F" in error(path, "tracking.uri=sqlite:////tmp/a?b=c/m.db")


@pytest.mark.parametrize("name", ["mlflow.db", "mlflow.db-journal", "mlflow.db-wal", "mlartifacts", "x.db"])
def test_a_run_is_not_where_mlflow_keeps_its_files(path, tmp_path, name):
    more = [f"tracking.uri=sqlite:///{tmp_path}/runs/x.db"] if name == "x.db" else []
    assert f"run.name: '{name}' would be a folder at {tmp_path}/runs/{name}" in error(path, f"run.name={name}", *more)
    assert load_config(path, [f"run.name={name}", "tracking.uri=http://server"]).run.name == name


def test_a_name_that_no_folder_can_have_is_refused(path):
    assert "run.name" in error(path, "run.name=" + "x" * 300)
    assert load_config(path, ["run.name=" + "x" * 200])


def test_inside_a_ray_job_relative_paths_are_under_home(path, monkeypatch, tmp_path):
    job = tmp_path / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    assert load_config(path, ["run.storage=here"]).run.storage == str(Path.home() / "eiwtrain" / "here")


def test_a_file_that_is_absent_or_a_folder_or_not_to_be_read_is_one_line(path, tmp_path, monkeypatch):
    near = str(Path(path).with_name("x" + Path(path).name))
    folder = tmp_path / "configs"
    folder.mkdir()
    for wrong, words in (
        (near, f"no such config file; did you mean {path}?"),
        (f"{path}/x", "no such config file; give the path of a YAML file"),
        (str(folder), "is a folder; "),
    ):
        with pytest.raises(ConfigError) as e:
            load_config(wrong)
        assert str(e.value).startswith(f"{wrong}: {words}")

    def refused(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied", path)  # which root, as whom tests may run, never meets

    monkeypatch.setattr(Path, "read_text", refused)
    with pytest.raises(ConfigError) as e:
        load_config(path)
    assert str(e.value) == f"{path}: cannot be read (Permission denied); it must be a YAML file that you may read"


def test_every_field_has_a_meaning():
    text = describe_fields()
    assert "eval.temperatures = [0.7, 1.0]\n" in text
    lines = text.splitlines()
    assert len(lines) > 60
    assert all(meaning.strip() for meaning in lines[1::2])


def test_config_survives_json():
    raw = tiny_config(Path("/x"))
    config = Config.model_validate(raw)
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_a_typo_ends_with_code_2_before_ray_or_torch_are_imported(path):
    script = (
        "import sys; from eiwtrain.run import main; code = main(sys.argv[1:]);"
        "print([m for m in ('ray', 'torch', 'mlflow', 'deepspeed') if m in sys.modules]); sys.exit(code)"
    )
    began = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", script, path, "train.lrr=1"], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 2
    assert result.stdout.strip() == "[]"
    assert result.stderr.strip() == "error: train.lrr: no such field; did you mean train.lr?"
    assert time.perf_counter() - began < 30  # a hang, not a speed: that is a benchmark's
