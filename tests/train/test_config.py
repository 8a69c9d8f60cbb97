"""The run configuration: every mistake is one line that names the key, the value and what is allowed."""

import pytest

from glmx.errors import ConfigError
from glmx.train.config import as_dict, fingerprint, load_config, make_config, refuse_changed

GOOD = {"model": "m", "out": "o", "data": {"shards": "s"}, "train": {"steps": 10}}


def changed(**sections):
    raw = {k: dict(v) if isinstance(v, dict) else v for k, v in GOOD.items()}
    for name, values in sections.items():
        raw[name] = {**raw.get(name, {}), **values} if isinstance(values, dict) else values
    return raw


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (changed(optim={"weigth_decay": 0.1}), ["'optim.weigth_decay'", "'optim.weight_decay'"]),
        (changed(optm={"lr": 0.1}), ["'optm'", "'optim'"]),
        (changed(train={"seq_len": 128}), ["'train.seq_len'", "'data.seq_len'"]),
        (changed(optim={"lr": "fast"}), ["optim.lr", "'fast'", "float"]),
        (changed(optim={"lr": -1.0}), ["optim.lr", "-1.0", "> 0"]),
        (changed(optim={"lr": float("nan")}), ["optim.lr", "nan", "> 0"]),
        (changed(optim={"lr": float("inf")}), ["optim.lr", "inf", "finite"]),
        (changed(train={"seed": 2**63}), ["train.seed", str(2**63), f"at most {2**63 - 1}"]),
        (changed(train={"dtype": "fp8"}), ["train.dtype", "'fp8'", "bf16", "fp32"]),
        (changed(train={"batch_rows": 2.5}), ["train.batch_rows", "2.5", "int"]),
        (
            changed(train={"batch_rows": 6, "micro_rows": 4}),
            ["train.micro_rows", "4", "train.batch_rows", "6"],
        ),
        (changed(train={"tokens": 5}), ["train.tokens", "train.steps", "exactly one"]),
        (changed(train={"steps": 0}), ["train.tokens", "train.steps", "exactly one"]),
        (changed(optim={"min_lr": 1.0}), ["optim.min_lr", "1.0", "optim.lr"]),
        (changed(optim={"warmup_tokens": 10**9}), ["optim.warmup_tokens", str(10**9)]),
        (changed(data=3), ["data", "3"]),
        ({k: v for k, v in GOOD.items() if k != "out"}, ["out", "missing"]),
        (changed(data={"shards": None}), ["data.shards", "None", "str"]),
    ],
)
def test_mistake_is_one_line_with_key_and_value(raw, words):
    with pytest.raises(ConfigError) as error:
        make_config(raw)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_toml_then_dotted_overrides(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\nout = "o"\n[data]\nshards = "s"\n[train]\nsteps = 4\n[optim]\nlr = 0.5\n')
    config = load_config(path, ["--optim.lr", "1e-3", "--train.dtype=fp32", "--model", "7", "--optim.clip", "2"])
    assert (config.optim.lr, config.train.dtype, config.model, config.optim.clip) == (1e-3, "fp32", "7", 2.0)
    assert config.train.steps == 4 and config.total_steps == 4
    with pytest.raises(ConfigError, match="'optim.lrr'.*'optim.lr'"):
        load_config(path, ["--optim.lrr", "1"])
    with pytest.raises(ConfigError, match="needs a value"):
        load_config(path, ["--optim.lr"])
    with pytest.raises(ConfigError, match="section.key"):
        load_config(path, ["optim.lr", "1"])
    with pytest.raises(ConfigError, match="optim.lr is 'x'"):
        load_config(path, ["--optim.lr", "x"])
    path.write_text("model = ")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")


def test_tokens_round_up_to_whole_steps():
    config = make_config(changed(train={"steps": 0, "tokens": 3 * 16 * 512 + 1}))
    assert config.total_steps == 4


def test_resume_refuses_a_changed_key_by_name():
    saved = as_dict(make_config(GOOD))
    refuse_changed(saved, make_config(changed(checkpoint={"every_steps": 3}, train={"minutes": 1.0}, out="p")))
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.01.*0\.003"):
        refuse_changed(saved, make_config(changed(optim={"lr": 0.01})))
    assert fingerprint(make_config(GOOD)) != fingerprint(make_config(changed(optim={"lr": 0.01})))
    assert fingerprint(make_config(GOOD)) == fingerprint(make_config(changed(train={"minutes": 1.0})))
