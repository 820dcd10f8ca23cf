"""What a model must be for a run: found before its weights are read, or before anything is trained."""

import pytest
import torch
from builders import make_sequences
from transformers import BertConfig, BertLMHeadModel, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from mifo.cli import main
from mifo.data.pack import pack
from mifo.errors import ModelError
from mifo.train.model import tiny_model
from mifo.train.policy import Policy

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def mistral(window):
    torch.manual_seed(0)
    config = MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window, max_position_embeddings=128)
    return MistralForCausalLM(config)


@pytest.mark.parametrize(("window", "layout"), [(20, "padded"), (128, "packed"), (None, "packed")])
def test_a_window_shorter_than_the_context_is_kept(window, layout):
    """The probe is shorter than the window and cannot tell; a response longer than it would see too much."""
    policy = Policy(mistral(window))
    assert policy.layout == layout
    sequences = make_sequences([40, 33], vocabulary=64, terms=["ce"])
    logp_T, _ = policy.token_stats(pack(sequences, range(2)))
    plain = mistral(window).eval()
    expected = []
    for s in sequences:
        ids = torch.tensor([[*s.prompt_ids, *s.response_ids]])
        rows = plain(ids).logits[0].log_softmax(-1)
        expected += [rows[len(s.prompt_ids) - 1 + t, token] for t, token in enumerate(s.response_ids)]
    torch.testing.assert_close(logp_T, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_soft_caps_are_not_packed_away():
    torch.manual_seed(0)
    config = Gemma2Config(
        **SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, final_logit_softcapping=None
    )
    assert Policy(Gemma2ForCausalLM(config)).layout == "padded"


def test_capped_logits_are_refused_though_small_ones_hardly_show_it():
    torch.manual_seed(0)
    config = Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    with pytest.raises(ModelError, match="final_logit_softcapping = 30"):
        Policy(Gemma2ForCausalLM(config))


def test_a_model_that_sees_what_comes_is_refused():
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(**SIZES, max_position_embeddings=64, is_decoder=False))
    with pytest.raises(ModelError, match="lets a token see those behind it"):
        Policy(model)


def test_weights_far_too_large_are_not_blamed_on_the_architecture():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[0, 0] = 3e38  # finite; what it is multiplied with is not
    with pytest.raises(ModelError, match="logits that are not finite"):
        Policy(model)


def test_the_dry_run_refuses_what_the_run_would(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert main(["train", "tiny", "--dry-run", "--run.folder", "file"]) == 2
    assert "is no folder. Choose another --run.folder" in capsys.readouterr().err
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "metrics.jsonl").write_text("{}\n")
    assert main(["train", "tiny", "--dry-run"]) == 2
    said = capsys.readouterr()
    assert "memory in all" in said.out
    assert "already holds a run" in said.err


@pytest.mark.parametrize("damage", ["cut", "words"])
def test_a_model_that_cannot_be_read_or_belongs_to_another_tokenizer(
    model_folder, tmp_path, capsys, monkeypatch, damage
):
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    if damage == "cut":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    else:
        config = tiny_model().config
        config.vocab_size = 7
        config.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "smollm2-arithmetic", "--model.path", str(folder), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert ("cannot be read" if damage == "cut" else "embeddings for 7 tokens only") in said
