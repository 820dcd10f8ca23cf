"""Models that cannot be trained are refused by name before their weights are read."""

import pytest
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
