"""What a model folder may bring along: settings and safetensors; code and pickles are refused before anything is run."""

import json
import logging
import pickle
import shutil

import pytest
import torch

from mifo.cli import main
from mifo.config.schema import ModelConfig
from mifo.data.chartok import char_tokenizer
from mifo.errors import ModelError
from mifo.train import embedded
from mifo.train.model import load_model, load_tokenizer, read_model_config, tiny_model


@pytest.fixture
def folder(tmp_path):
    """A Hugging Face folder of the tiny model."""
    path = tmp_path / "model"
    tiny_model().save_pretrained(path)
    char_tokenizer().save_pretrained(path)
    return path


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refusal(folder, **settings):
    """The message with which both tokenizer and model are refused."""
    messages = set()
    for load in (load_tokenizer, read_model_config, load_model):
        with pytest.raises(ModelError) as caught:
            load(ModelConfig(path=str(folder), **settings))
        messages.add(str(caught.value))
    [message] = messages
    return message


def add_code(folder, canary):
    """A configuration class whose module leaves a canary when it is imported."""
    (folder / "configuration_own.py").write_text(
        f"open({str(canary)!r}, 'w')\nfrom transformers import Qwen2Config\nclass OwnConfig(Qwen2Config):\n    pass\n"
    )


@pytest.mark.parametrize("known", [True, False])
def test_code_in_the_configuration(folder, tmp_path, known):
    canary = tmp_path / "canary"
    add_code(folder, canary)
    change(folder / "config.json", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    if not known:
        change(folder / "config.json", model_type="own")
    message = refusal(folder)
    assert "config.json asks for Python code that comes with the model (auto_map)" in message
    assert "model.trust_remote_code = true" in message
    assert not canary.exists()


def test_code_in_the_tokenizer(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "tokenization_own.py").write_text(f"open({str(canary)!r}, 'w')")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    assert "tokenizer_config.json asks for Python code" in refusal(folder)
    assert not canary.exists()


def test_the_named_setting_lets_code_in(folder, tmp_path, monkeypatch):
    """Else the tests above could pass because transformers never runs such code."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    canary = tmp_path / "canary"
    add_code(folder, canary)
    change(folder / "config.json", auto_map={"AutoConfig": "configuration_own.OwnConfig"}, model_type="own")
    read_model_config(ModelConfig(path=str(folder), trust_remote_code=True))
    assert canary.exists()


class Deed:
    """Leaves a canary when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin", "weights.ckpt"])
def test_pickled_weights(folder, tmp_path, name, trusted):
    """Refused also where code is trusted: that setting is about code that one can read."""
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Deed(canary)))
    message = refusal(folder, trust_remote_code=trusted)
    assert f"has its weights only in {name}, a pickle" in message
    assert "convert it once" in message
    assert not canary.exists()


def test_the_conversion_that_is_named_works(folder, tmp_path):
    from transformers import AutoModelForCausalLM as M

    before = load_model(ModelConfig(path=str(folder)))
    (folder / "model.safetensors").unlink()
    torch.save(before.state_dict(), folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "from transformers import AutoModelForCausalLM as M; " in message
    assert "M.from_pretrained('FOLDER', use_safetensors=False).save_pretrained('NEW_FOLDER')" in message
    M.from_pretrained(str(folder), use_safetensors=False).save_pretrained(tmp_path / "new")
    after = load_model(ModelConfig(path=str(tmp_path / "new")))
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )


def test_pickles_beside_safetensors_are_not_read(folder, tmp_path):
    canary = tmp_path / "canary"
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Deed(canary)))
    load_tokenizer(ModelConfig(path=str(folder)))
    load_model(ModelConfig(path=str(folder)))
    assert not canary.exists()


@pytest.mark.parametrize("shard", ["pytorch_model.bin", "../outside.safetensors", "/etc/passwd", 3, None])
def test_an_index_names_safetensors_beside_it(folder, tmp_path, shard):
    shutil.move(folder / "model.safetensors", tmp_path / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is no safetensors file of that folder" in refusal(folder)


def test_an_adapter_is_refused(folder):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/name"}')
    assert "Merge it into that model" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '"auto_map"', "\ufeff{}"])
def test_a_description_that_is_no_json_object(folder, text):
    (folder / "config.json").write_text(text, encoding="utf-8")
    assert "config.json" in refusal(folder)


def test_the_command_line_says_it_before_weights_are_loaded(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    for arguments in (["train", "smollm2-arithmetic", "--model.path", str(folder)], ["eval", str(folder)]):
        assert main(arguments) == 2
        assert "set model.trust_remote_code = true" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def copy(tmp_path):
    """A listed copy as the cache has one."""
    path = tmp_path / "copy"
    path.mkdir()
    for name in ("model.safetensors", "config.json"):
        (path / name).write_bytes(name.encode() * 10)
    embedded.write_list(path)
    return path


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_damage_of_the_unpacked_model_is_found(copy):
    assert embedded.copy_damage(copy) is None
    flip(copy / "model.safetensors")
    assert embedded.copy_damage(copy) == "model.safetensors has changed"
    flip(copy / "model.safetensors")
    (copy / "extra.py").touch()
    assert embedded.copy_damage(copy) == "missing or added: extra.py"
    (copy / "extra.py").unlink()
    (copy / "config.json").unlink()
    assert embedded.copy_damage(copy) == "missing or added: config.json"
    (copy / embedded.LIST).write_text("[" * 10)
    assert "cannot be read" in embedded.copy_damage(copy)


def test_a_damaged_copy_is_written_again_and_said_so(tmp_path, monkeypatch, caplog):
    """With a small file in place of the model; what unpacking makes of it does not matter here."""
    source = tmp_path / embedded.FILE
    source.write_bytes(b"gguf")
    monkeypatch.setenv("MIFO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_embedded_file", lambda: source)
    monkeypatch.setattr(embedded, "FILE_SHA256", embedded.sha256(source))
    made = []

    def unpack(file, folder):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        embedded.write_list(folder)
        made.append(folder)

    monkeypatch.setattr(embedded, "_dequantise", unpack)
    locate = embedded.embedded_model_folder.__wrapped__  # each call as another process would make it
    folder = locate()
    assert locate() == folder
    assert len(made) == 1
    flip(folder / "model.safetensors")
    with caplog.at_level(logging.WARNING):
        assert locate() == folder
    assert "is damaged (model.safetensors has changed)" in caplog.text
    assert len(made) == 2
    assert embedded.copy_damage(folder) is None
    source.write_bytes(b"another")
    with pytest.raises(ModelError, match="is not the file that this version was made with"):
        locate()
