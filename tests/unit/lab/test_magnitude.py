"""Change of each tensor against numpy on whole tensors; runs and checkpoints as inputs; memory that does not grow."""

import json
import re

import numpy as np
import pytest
import torch
from lab_models import family_model, moved, save
from safetensors.torch import load_file, save_file

from mifo.config.decode import encode
from mifo.config.load import load_config
from mifo.errors import ConfigError, ModelError, NumericsError
from mifo.lab import source as source_module
from mifo.lab.magnitude import largest_changes, magnitude, magnitudes
from mifo.lab.source import Source, Tensors, find_source, labels_of, natural, place_of
from mifo.train.manifest import MANIFEST


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    base = family_model("qwen2")
    over = moved(base, 5, share=0.3)
    return base, over, save(base, folder / "base"), save(over, folder / "over", max_shard_size="30KB")


def test_against_numpy(pair):
    base, over, *paths = pair
    found = magnitude(*paths)
    parameters = {
        name: (p.numpy().astype(np.float64), dict(over.named_parameters())[name].numpy())
        for name, p in base.named_parameters()
    }
    assert {t.name for t in found.tensors} == parameters.keys()
    for tensor in found.tensors:
        old, new = parameters[tensor.name]
        change = new.astype(np.float64) - old
        assert tensor.norm == pytest.approx(np.linalg.norm(change), rel=1e-6)
        assert tensor.norm_before == pytest.approx(np.linalg.norm(old), rel=1e-6)
        assert tensor.relative == pytest.approx(np.linalg.norm(change) / np.linalg.norm(old), rel=1e-6)
        assert tensor.unchanged == pytest.approx((change == 0).mean())
        assert 0.5 < tensor.unchanged < 0.9 or tensor.elements < 100
        place = np.unravel_index(np.abs(change).argmax(), change.shape)
        assert tensor.largest[0].index == tuple(int(i) for i in place)
        assert tensor.largest[0].change == pytest.approx(change[place], rel=1e-5)
        assert tensor.largest[0].before == pytest.approx(old[place], rel=1e-6)
    whole = np.concatenate([(new - old).ravel() for old, new in parameters.values()])
    assert found.total().norm == pytest.approx(np.linalg.norm(whole), rel=1e-6)
    assert found.total().elements == whole.size
    assert found.total().unchanged == pytest.approx((whole == 0).mean())


def test_groups_join_weight_and_bias(pair):
    found = magnitude(*pair[2:])
    modules = {(g.layer, g.module): g for g in found.modules()}
    tensors = {t.name: t for t in found.tensors}
    weight, bias = (tensors[f"model.layers.1.self_attn.q_proj.{part}"] for part in ("weight", "bias"))
    group = modules[1, "self_attn.q_proj"]
    assert group.elements == weight.elements + bias.elements
    assert group.norm == pytest.approx((weight.norm**2 + bias.norm**2) ** 0.5)
    assert [g.layer for g in found.layers()] == [0, 1]
    inside = sum(g.norm**2 for g in found.layers())
    outside = sum(t.norm**2 for t in found.tensors if t.layer is None)
    assert found.total().norm == pytest.approx((inside + outside) ** 0.5)
    assert (None, "embed_tokens") in modules


def test_blocks_do_not_matter(pair, monkeypatch):
    whole = magnitude(*pair[2:])
    monkeypatch.setattr(source_module, "BLOCK_ELEMENTS", 64)
    pieces = magnitude(*pair[2:])
    for one, other in zip(whole.tensors, pieces.tensors, strict=True):
        assert one.norm == pytest.approx(other.norm, rel=1e-12)
        assert (one.name, one.unchanged, one.largest) == (other.name, other.unchanged, other.largest)


def test_a_model_against_itself_did_not_move(pair):
    found = magnitude(pair[2], pair[2])
    assert found.total().norm == 0.0
    assert found.total().unchanged == 1.0
    assert all(tensor.largest == () for tensor in found.tensors)


def test_a_second_copy_of_tied_weights_counts_once(pair, tmp_path):
    base, _, path, _ = pair
    save(base, tmp_path / "twice")
    tensors = {name: p.detach().clone() for name, p in base.named_parameters()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "twice" / "model.safetensors", metadata={"format": "pt"})
    found = magnitude(path, str(tmp_path / "twice"))
    assert found.total().norm == 0.0
    assert "lm_head.weight" not in {t.name for t in found.tensors}


def make_run(folder, model, checkpoint_model):
    """A run folder as a finished run leaves it, with one checkpoint."""
    _, config = load_config("tiny", [])
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(encode(config)))
    (folder / "metrics.jsonl").write_text("")
    save(model, folder / "export")
    step = folder / "checkpoints" / "step-000004"
    step.mkdir(parents=True)
    save_file({name: p.detach().clone() for name, p in checkpoint_model.named_parameters()}, step / "model.safetensors")
    (step / MANIFEST).write_text("{}")
    return folder, step


def test_runs_and_checkpoints(pair, tmp_path):
    base, over, base_path, over_path = pair
    run, step = make_run(tmp_path / "run", over, base)
    of_run = magnitude(base_path, str(run))
    assert of_run.label == "run"
    assert of_run.total().norm == magnitude(base_path, over_path).total().norm
    of_step = magnitude(str(step), over_path)
    assert of_step.total().norm == of_run.total().norm
    assert magnitude(base_path, str(step)).label == "run/step-000004"


def test_a_run_without_an_export(pair, tmp_path):
    run, _ = make_run(tmp_path / "run", pair[1], pair[0])
    (run / "export").rename(tmp_path / "away")
    with pytest.raises(ModelError, match=r"AFTER = .* is a run without an exported model. Finish it with --resume"):
        magnitude(pair[2], str(run))


def test_weights_that_are_not_finite(pair, tmp_path):
    broken = moved(pair[0], 6)
    broken.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"model.layers.1.mlp.up_proj.weight holds numbers that are not finite"):
        magnitude(pair[2], save(broken, tmp_path / "broken"))


def test_quantised_weights(pair, tmp_path):
    save(pair[0], tmp_path / "q")
    tensors = {name: p.detach().clone() for name, p in pair[0].named_parameters()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    with pytest.raises(ModelError, match=r"model.norm.weight is stored as F8_E4M3, a quantised type"):
        magnitude(pair[2], str(tmp_path / "q"))


def test_a_number_out_of_range(pair):
    with pytest.raises(ConfigError, match="--largest = 0 must be at least 1"):
        magnitude(*pair[2:], largest=0)


def test_names():
    assert place_of("model.layers.13.self_attn.q_proj.bias") == (13, "self_attn.q_proj")
    assert place_of("model.layers.2.input_layernorm.weight") == (2, "input_layernorm")
    assert place_of("model.embed_tokens.weight") == (None, "embed_tokens")
    assert place_of("lm_head.weight") == (None, "lm_head")
    names = ["layers.10.a", "layers.2.a", "embed"]
    assert sorted(names, key=natural) == ["embed", "layers.2.a", "layers.10.a"]


def test_no_two_models_have_one_label(tmp_path):
    def source(given):
        return Source(given=given, field="x", folder=tmp_path, run=None, checkpoint=False)

    assert labels_of([source("runs/a/export"), source("models/b")]) == ["a", "b"]
    assert labels_of([source("x/model"), source("y/model")]) == ["x/model", "y/model"]
    assert labels_of([source("m"), source("m")]) == ["m (1)", "m (2)"]


def test_tensors_are_read_in_memory_of_their_own(pair):
    """Changing what was read must not change what is read next."""
    tensors = Tensors(find_source(pair[2], "x"))
    value = tensors.read("model.norm.weight")
    before = value.clone()
    value += 1
    assert torch.equal(tensors.read("model.norm.weight"), before)


def test_rows_name_the_largest_change_of_each_module(pair):
    found = magnitude(*pair[2:], largest=3)
    rows = {(row["layer"], row["module"]): row for row in found.rows()}
    tensors = {t.name: t for t in found.tensors}
    weight, bias = (tensors[f"model.layers.1.self_attn.q_proj.{part}"] for part in ("weight", "bias"))
    row, most = rows[1, "self_attn.q_proj"], max((weight, bias), key=lambda t: abs(t.largest[0].change))
    assert row["largest_tensor"] == most.name
    assert row["largest_change"] == most.largest[0].change
    assert row["largest_index"] == " ".join(map(str, most.largest[0].index))
    sizes = [abs(element.change) for _, element in largest_changes(found.tensors, 4)]
    assert sizes == sorted((abs(e.change) for t in found.tensors for e in t.largest), reverse=True)[:4]
    still = magnitude(pair[2], pair[2])
    assert {row["largest_tensor"] for row in still.rows()} == {None}


def test_the_random_model_is_named_with_its_remedy(pair):
    with pytest.raises(ModelError, match=r"made at random from the seed of each run.*--run\.keep-phases"):
        magnitude("tiny", pair[2])


def test_a_shard_that_lacks_what_its_index_names(pair, tmp_path):
    whole = family_model("qwen2")
    save(whole, tmp_path / "m", max_shard_size="40KB")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    name, file = next(iter(index["weight_map"].items()))
    kept = {key: value for key, value in load_file(tmp_path / "m" / file).items() if key != name}
    save_file(kept, tmp_path / "m" / file)
    with pytest.raises(ModelError, match=f"{re.escape(file)} lacks {re.escape(name)}, which .*1 are lost"):
        Tensors(find_source(str(tmp_path / "m"), "BEFORE"))


def test_a_head_that_is_said_to_be_the_embedding_and_is_not(tmp_path):
    model = family_model("qwen2")
    state = {**model.state_dict(), "lm_head.weight": model.state_dict()["lm_head.weight"] + 1.0}
    save(model, tmp_path / "m")
    save_file({name: value.clone() for name, value in state.items()}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"tie_word_embeddings = true, and lm_head\.weight is stored with other values"
    ):
        Tensors(find_source(str(tmp_path / "m"), "BEFORE"))


def test_types_that_differ_are_said(pair, tmp_path):
    _, _, before, after = pair
    assert magnitude(before, after).note == ""
    narrow = save(family_model("qwen2").bfloat16(), tmp_path / "narrow")
    assert "different types (bfloat16, float32): part of what moved is rounding" in magnitude(before, narrow).note


def test_models_of_one_folder_name_have_labels_of_their_own(pair, tmp_path):
    paths = [save(moved(family_model("qwen2"), seed), tmp_path / f"{seed}" / "final") for seed in (1, 2)]
    assert [one.label for one in magnitudes(pair[2], paths)] == paths
    start = save(family_model("qwen2"), tmp_path / "start" / "final")  # has a name of its own too
    assert [one.label for one in magnitudes(start, paths[:1])] == paths[:1]


def test_layers_of_other_families():
    assert place_of("transformer.h.3.attn.c_attn.weight") == (3, "attn.c_attn")
    assert place_of("h.3.ln_1.bias") == (3, "ln_1")
    assert place_of("gpt_neox.layers.11.mlp.dense.weight") == (11, "mlp.dense")
    assert place_of("transformer.wte.weight") == (None, "transformer.wte")
