"""What the command line says about going on: commands that keep the user's flags, --resume --dry-run, --no-verify."""

import pytest

from mifo.cli import main
from mifo.commands import command_line, program, without
from mifo.config.load import load_config

SMALL = [
    "tiny", "--train.steps", "2", "--train.threads", "1", "--method.buffer-size", "30", "--data.evaluation", "none",
    "--run.samples-per-step=0", "--run.no-export", "--train.seed", "7",
]  # fmt: skip


def test_flags_are_taken_out_in_every_spelling():
    flags = ["--a.b", "1", "--run.name", "x", "--method.freeze_top=0.3", "--c.d=2"]
    assert without(flags, "--run.name", "--method.freeze-top") == ["--a.b", "1", "--c.d=2"]
    assert without(flags, "--a.b") == flags[2:]
    assert without(flags) == flags


def test_commands_can_be_pasted_into_a_shell():
    recipe, _ = load_config("tiny")
    assert command_line(recipe, ["--run.folder", "my runs"], "--resume") == (
        "mifo train tiny --run.folder 'my runs' --resume"
    )


def test_suggestions_and_resuming_keep_the_flags(tmp_path, capsys):
    command = ["train", *SMALL, "--run.folder", str(tmp_path), "--run.name", "first"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    flags = " ".join(SMALL[1:])
    again = f"mifo train tiny {flags} --run.folder {tmp_path} --method.freeze-top 0 --run.name first-no-freezing"
    assert again in shown

    assert main([*command, "--resume", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"resumes from {tmp_path}/first/checkpoints/step-" in shown
    assert "2 of 2 steps" in shown
    assert "it is finished" in shown
    assert f"the run goes on in {tmp_path}/first" in shown

    newest = sorted((tmp_path / "first" / "checkpoints").iterdir())[-1]
    file = newest / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main([*command, "--resume", "--dry-run"]) == 2
    assert "model.safetensors is damaged (SHA-256" in capsys.readouterr().err
    assert main([*command, "--resume", "--dry-run", "--no-verify"]) == 0


def test_resuming_where_nothing_is(tmp_path, capsys):
    command = ["train", *SMALL, "--run.folder", str(tmp_path), "--resume"]
    for more in ([], ["--dry-run"]):
        assert main([*command, *more]) == 2
        assert "holds no run to resume" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_verify_without_resume(capsys):
    assert main(["train", "tiny", "--no-verify"]) == 2
    assert "--no-verify has no effect without --resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("minutes", "words"), [("0.01", "0:01 in all by train.minutes = 0.01"), ("60000", "for 48 steps")]
)
def test_the_estimate_knows_of_minutes(minutes, words, capsys, monkeypatch):
    monkeypatch.setattr("mifo.train.estimate._measured_flops", lambda *_: 1e6)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "tiny", "--train.minutes", minutes, "--dry-run"]) == 0
    assert words in " ".join(capsys.readouterr().out.split())


def test_the_estimate_knows_of_flops(capsys, monkeypatch):
    monkeypatch.setattr("mifo.train.estimate._measured_flops", lambda *_: 1e6)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["train", "tiny", "--train.max-flops", "1e6", "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    seconds = int(shown.partition(" in all by train.max_flops = 1e+06 (48 steps")[0].rpartition(":")[2])
    assert 1e6 / (1e6 * 0.35) - 1 < seconds < 1e6 / (1e6 * 0.15) + 1  # all training, or all generation


def test_keep_every_must_be_met(capsys):
    assert main(["train", "tiny", "--run.keep-every", "70", "--dry-run"]) == 2
    assert "run.keep_every = 70 is no multiple of run.checkpoint_steps = 50" in capsys.readouterr().err


def test_suggestions_name_what_was_started_where_the_shell_does_not_find_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [str(tmp_path / ".venv" / "bin" / "mifo"), "train", "tiny"])
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == ".venv/bin/mifo"
    monkeypatch.setenv("PATH", str(tmp_path / ".venv" / "bin"))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "mifo").touch(mode=0o755)
    assert program() == "mifo"
