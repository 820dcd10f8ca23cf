"""Models that cannot be trained are refused by name before their weights are read."""

import json

import pytest
from lab_models import family_model
from transformers import Mamba2Config, MambaConfig

from mifo.config.schema import ModelConfig
from mifo.errors import ModelError
from mifo.train.model import load_model, read_model_config


@pytest.mark.parametrize("config", [MambaConfig(), Mamba2Config()], ids=lambda config: config.model_type)
def test_models_without_a_context_length_are_refused_with_a_remedy(tmp_path, config):
    config.save_pretrained(tmp_path)
    for read in (read_model_config, load_model):
        with pytest.raises(ModelError) as caught:
            read(ModelConfig(path=str(tmp_path)))
        message = str(caught.value)
        for part in (str(tmp_path), f"model type '{config.model_type}'", "max_position_embeddings", "such as Llama"):
            assert part in message


def test_a_model_whose_files_lack_a_tensor_is_refused(tmp_path):
    """transformers fills it at random and says so in a warning."""
    model = family_model("llama")
    kept = {name: value for name, value in model.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(
        ModelError, match=r"lack 1 of the model's tensors, such as model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        load_model(ModelConfig(path=str(tmp_path)))


def test_a_head_that_is_nowhere_is_refused_and_a_tied_one_is_not(tmp_path):
    model = family_model("qwen2")
    model.save_pretrained(tmp_path)
    load_model(ModelConfig(path=str(tmp_path)))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ModelError, match=r"lm_head\.weight.*tie_word_embeddings = true"):
        load_model(ModelConfig(path=str(tmp_path)))
