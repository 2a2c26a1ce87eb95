"""Weights of another run or file: all that fits is taken, what does not is told, nothing is guessed."""

import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from core.training.errors import UserError
from core.training.fit import fit
from core.training.pretrained import load_pretrained, read_weights
from core.training.run import load_run


def model(classes=3):
    return nn.ModuleDict({"encoder": nn.Linear(4, 5), "head": nn.Linear(5, classes)})


@pytest.fixture
def source():
    torch.manual_seed(1)
    return model()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "wrapped.pth"])
def test_weights_of_a_file_are_taken_over(tmp_path, source, name):
    path = tmp_path / name
    state = source.state_dict()
    if name.endswith("safetensors"):
        safetensors.torch.save_file(state, str(path))
    else:
        torch.save({"state_dict": state, "epoch": 3} if name.startswith("wrapped") else state, path)
    new = model()
    report = load_pretrained(new, path)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), state.values()))
    assert len(report.loaded) == 4
    assert (report.missing, report.unused, report.skipped) == ([], [], [])


def test_a_new_head_is_left_alone_and_a_part_can_be_chosen(tmp_path, source):
    safetensors.torch.save_file(source.state_dict(), str(tmp_path / "w.safetensors"))
    new = model(classes=7)
    before = new["head"].weight.clone()
    report = load_pretrained(new, tmp_path / "w.safetensors", skip=["head."])
    assert torch.equal(new["encoder"].weight, source["encoder"].weight)
    assert torch.equal(new["head"].weight, before)
    assert report.skipped == ["head.weight", "head.bias"]
    assert str(report) == "2 weights taken over; 2 skipped (head.weight, head.bias)"
    part = nn.Linear(4, 5)
    report = load_pretrained(part, tmp_path / "w.safetensors", prefix="encoder.")
    assert torch.equal(part.weight, source["encoder"].weight)
    assert report.unused == []
    more = nn.ModuleDict({**model(), "extra": nn.Linear(1, 1)})
    report = load_pretrained(more, tmp_path / "w.safetensors")
    assert report.missing == ["extra.weight", "extra.bias"]
    with pytest.raises(UserError, match=r"head.weight has the shape \[3, 5\], the model here needs \[7, 5\]"):
        load_pretrained(model(classes=7), tmp_path / "w.safetensors")


def test_a_run_gives_its_evaluation_weights(toy):
    result = fit("toy/demo", overrides=["trainer.epochs=2", "optim.ema=0.8"], run_dir=toy / "run", floors=False)
    new = load_run(result.run_dir).task.model
    expected = {name: w.clone() for name, w in new.state_dict().items()}
    for weight in new.parameters():
        nn.init.zeros_(weight)
    load_pretrained(new, toy / "run")
    assert all(torch.equal(w, expected[name]) for name, w in new.state_dict().items())
    file = read_weights(toy / "run" / "model.safetensors")
    assert all(torch.equal(w, expected[name]) for name, w in file.items())


class Trap:
    def __reduce__(self):
        return (print, ("code ran",))


def test_what_cannot_be_loaded_is_one_line(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "trap.pt").write_bytes(pickle.dumps({"a": Trap()}))
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    torch.save({"other": torch.zeros(2)}, tmp_path / "other.pt")
    for name, match in [
        ("nope.pt", r"there is no run or weights file .*nope.pt' \(did you mean 'none.pt'\?\)"),
        ("run", "holds no checkpoint"),
        ("trap.pt", "cannot be read as plain tensors"),
        ("cut.safetensors", "is not a whole safetensors file"),
        ("none.pt", "holds no weights by name"),
        ("other.pt", "no weight fits the model here; it has for example other"),
    ]:
        with pytest.raises(UserError, match=match) as caught:
            load_pretrained(model(), tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "code ran" not in capsys.readouterr().out
