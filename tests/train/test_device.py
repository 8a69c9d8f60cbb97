"""Training on a GPU that this CPU plays: the CPU's bits, resumed too, and no tensor on the wrong side."""

import copy

import pytest
from tests.played_cuda import Played, a_card, played
from tests.train.test_run import fingerprint

from glmx.errors import ConfigError, UnsupportedError
from glmx.train import optim
from glmx.train.config import fingerprint as config_fingerprint
from glmx.train.config import make_config, refuse_changed
from glmx.train.loop import pretrain
from glmx.train.run import Run


def on(raw, device, out):
    changed = copy.deepcopy(raw) | {"out": str(out)}
    changed["train"]["device"] = device
    return make_config(changed)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_run_there_gives_the_bits_of_a_run_here_and_resumes(raw, tmp_path, dtype, monkeypatch):
    raw = {**raw, "mtp_steps": 2, "train": {**raw["train"], "dtype": dtype}}
    pretrain(on(raw, "cpu", tmp_path / "here"), quiet=True)
    with played():
        there = on(raw, "cuda", tmp_path / "there")
        pretrain(there, quiet=True)
        assert fingerprint(tmp_path / "there") == fingerprint(tmp_path / "here")

        # Stopped by an error in the fourth step, behind the checkpoint of the second, and continued.
        again, left = on(raw, "cuda:0", tmp_path / "again"), [4]

        def stop(self, *args, **kwargs):
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        step = optim.AdamW.step
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(optim.AdamW, "step", stop)
            pretrain(again, quiet=True)
        assert pretrain(again, quiet=True).step == 6
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "here")


def test_what_a_run_holds_lies_there(raw, tmp_path):
    with played():
        run = Run.start(on(raw, "cuda", tmp_path / "out"))
        run.close()
        held = [*run.model.tensors(), *run.biases, *run.optim.state_dict().values()]
        held += [slot.param.main_grad for group in run.optim.groups for slot in group.slots]
        assert len(held) > 50 and all(isinstance(tensor, Played) for tensor in held)


def test_a_device_that_is_not_there_leaves_nothing(raw, tmp_path):
    with pytest.raises(UnsupportedError, match="^device 'cuda:99': "):
        pretrain(on(raw, "cuda:99", tmp_path / "a" / "out"), quiet=True)
    with a_card(), pytest.raises(UnsupportedError, match=r"^device 'cuda:7': this machine has cuda:0 \(Played GPU\)$"):
        pretrain(on(raw, "cuda:7", tmp_path / "a" / "out"), quiet=True)
    assert not (tmp_path / "a").exists()


def test_other_families_train_on_the_cpu(dsa_raw, tmp_path):
    with a_card(), pytest.raises(UnsupportedError, match="^device 'cuda:0': glm_moe_dsa runs on cpu so far"):
        pretrain(on(dsa_raw, "cuda", tmp_path / "out"), quiet=True)


def test_a_run_stays_on_its_kind_of_device(raw):
    """A GPU rounds other than a CPU, so the resumed run would be another one; which card it is may change."""
    from glmx.train.config import as_dict

    cpu, auto, cuda, second = (on(raw, device, "out") for device in ("cpu", "auto", "cuda", "cuda:1"))
    refuse_changed(as_dict(cpu), auto)
    refuse_changed(as_dict(cuda), second)
    older = as_dict(cpu)
    del older["train"]["device"]  # of a checkpoint from before there was the key
    refuse_changed(older, cpu)
    with pytest.raises(ConfigError, match="^train.device is 'cuda', but the checkpoint in out was made with 'cpu'"):
        refuse_changed(older, second)
    with pytest.raises(ConfigError, match="^train.device is 'cpu', but the checkpoint in out was made with 'cuda'"):
        refuse_changed(as_dict(second), auto)
    assert config_fingerprint(cpu) == config_fingerprint(auto) != config_fingerprint(cuda)
