"""Rejuvenation end to end on small models: what is reset has the base's bits, the rest is the fusion, the folder is plain."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from lab_models import FAMILIES, family_model, moved, save
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mifo.core.surgery import target_places
from mifo.errors import ConfigError, DataError, ModelError
from mifo.lab.rejuvenate import RejuvenationSettings, rejuvenate
from mifo.lab.samples import PairSettings, read_pairs
from mifo.lab.source import Tensors, find_source
from mifo.train.attribution import PREFIX, WRITERS, Attribution, Target
from mifo.train.calibration import reset_masks


def stored(folder):
    """Every tensor of a model folder."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def settings_of(demonstrations, **changes):
    plain = RejuvenationSettings(rho=0.05, targets=3, pairs=PairSettings(data=demonstrations, count=6))
    return dataclasses.replace(plain, **changes)


@pytest.fixture(scope="module")
def rejuvenated(checkpoints, demonstrations, tmp_path_factory):
    """(folder, what was done) with α = 0.25 and ρ = 0.05."""
    out = tmp_path_factory.mktemp("out") / "model"
    return out, rejuvenate(*checkpoints, str(out), settings_of(demonstrations, alpha=0.25))


def test_alpha_one_and_rho_zero_give_back_the_input_bit_for_bit(checkpoints, demonstrations, tmp_path):
    out = tmp_path / "same"
    done = rejuvenate(*checkpoints, str(out), settings_of(demonstrations, alpha=1.0, rho=0.0))
    before, after = stored(Tensors(find_source(checkpoints[1], "over")).source.folder), stored(out)
    assert before.keys() == after.keys()
    assert [n for n in before if before[n].numpy().tobytes() != after[n].numpy().tobytes()] == []
    assert done.neuron_share == 0.0
    assert done.selection.modules == ()
    assert done.target_entropies["over"] == done.target_entropies["rejuvenated"]


def test_reset_elements_are_the_bases_and_the_rest_is_the_fusion(rejuvenated, checkpoints):
    out, done = rejuvenated
    base, over = (stored(Tensors(find_source(path, "x")).source.folder) for path in checkpoints)
    made, masks = stored(out), reset_masks(done.selection.modules, set(over))
    assert any(name.endswith(".bias") for name in masks)
    assert {name.split(".")[4] for name in masks} >= {"o_proj", "v_proj", "k_proj"}
    counted = 0
    for name, tensor in made.items():
        reset = torch.zeros(tensor.shape, dtype=torch.bool)
        if name in masks:
            neurons, dimension = masks[name]
            reset.index_fill_(dimension, neurons.nonzero()[:, 0], True)
        counted += int(reset.sum())
        assert torch.equal(tensor[reset], base[name][reset]), name
        fusion = (0.25 * over[name].double() + 0.75 * base[name].double()).float()
        assert torch.allclose(tensor[~reset], fusion[~reset], rtol=0, atol=2e-7), name
        differs = ~reset & (over[name] != base[name])
        assert not torch.equal(tensor[differs], base[name][differs]) or not differs.any(), name
    assert counted == done.reset_elements
    assert 0 < done.neuron_share < 1
    assert done.all_elements == sum(t.numel() for t in made.values())


def test_writer_biases_norms_and_embeddings_are_only_fused(rejuvenated):
    _, done = rejuvenated
    names = reset_masks(done.selection.modules, {f"{m.name}.bias" for m in done.selection.modules})
    for name in names:
        assert "_proj." in name
        if name.endswith(".bias"):
            assert name.split(".")[-2] not in WRITERS


def test_the_selection_against_a_slow_oracle(rejuvenated, checkpoints, demonstrations):
    """Entropies, targets, ranks and union once more, from plain forward passes and Python's sort."""
    _, done = rejuvenated
    base, over = (AutoModelForCausalLM.from_pretrained(path).eval() for path in checkpoints)
    pairs = read_pairs(find_source(checkpoints[1], "over"), PairSettings(data=demonstrations, count=6)).sequences
    union, targets = set(), 0
    over.requires_grad_(False)
    with Attribution(over) as attribution:
        for pair in pairs:
            ids = torch.tensor([pair.prompt_ids + pair.response_ids])
            first, entropies = len(pair.prompt_ids) - 1, []
            for model in (base, over):
                with torch.no_grad():
                    p = model(input_ids=ids).logits[0, first:-1].double().softmax(-1)
                entropies.append(-(p * p.log()).sum(-1))
            gaps = (entropies[1] - entropies[0]).abs().tolist()
            places = sorted(sorted(range(len(gaps)), key=lambda i: (-gaps[i], i))[:3])
            for place in places:
                targets += 1
                target = Target(first + place, pair.response_ids[place])
                [scores] = attribution.scores(ids[0].tolist(), [target])
                values = scores.scores_S.tolist()
                budget = -(-5 * len(values) // 100)
                union |= set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:budget])
    found, start = set(), 0
    for module in done.selection.modules:
        found |= {start + i for i in module.reset}
        start += module.neurons
    assert targets == done.selection.targets
    assert start == done.all_neurons
    assert len(found ^ union) <= 2  # a rank may hang on the last digit of two ways to compute an entropy or a score
    assert len(found) == done.reset_neurons


def test_the_folder_is_a_plain_model(rejuvenated, checkpoints):
    out, done = rejuvenated
    assert len(list(out.glob("*.safetensors"))) > 1  # the shards of the over-trained model
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.tie_word_embeddings
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, stored(out)[name])
    assert AutoTokenizer.from_pretrained(out) is not None
    assert not list(out.parent.glob("writing-*"))
    record = json.loads((out / "rejuvenation.json").read_text())
    assert record["settings"]["alpha"] == 0.25
    assert record["neuron_share"] == done.neuron_share
    modules = record["selection"]["modules"]
    assert sum(len(m["reset"]) for m in modules) == done.reset_neurons
    assert [e["model"] for e in record["entropies"]] == ["base", "over", "rejuvenated"]
    assert done.selection.reconstruction_error["max"] < 1e-4


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "qwen2"])
def test_every_family(family, demonstrations, tmp_path):
    """Tied and untied heads, biases on all projections, norms of queries and keys."""
    model = family_model(family)
    over = moved(model, 2)
    names = save(model, tmp_path / "base"), save(over, tmp_path / "over")
    done = rejuvenate(*names, str(tmp_path / "out"), settings_of(demonstrations))
    base, trained, made = (stored(tmp_path / name) for name in ("base", "over", "out"))
    masks = reset_masks(done.selection.modules, set(made))
    for name, tensor in made.items():
        fusion = torch.lerp(base[name], trained[name], 0.5)
        if name in masks:
            rows = masks[name][0].nonzero()[:, 0]
            fusion.index_copy_(masks[name][1], rows, base[name].index_select(masks[name][1], rows))
        assert torch.equal(tensor, fusion), name
    assert done.reset_neurons > 0


def test_targets_by_hand():
    before, after = torch.tensor([1.0, 2.0, 0.5, 0.5, 3.0]), torch.tensor([0.5, 2.0, 2.0, 0.0, 2.9])
    assert target_places(before, after, 2, signed=False) == [0, 2]  # position 2 rose by 1.5; ties 0.5 go to the earlier
    assert target_places(before, after, 3, signed=True) == [0, 3, 4]
    assert target_places(before, after, 9, signed=True) == [0, 3, 4]  # never one whose entropy rose or stood
    assert target_places(before, after, 9, signed=False) == [0, 1, 2, 3, 4]


def test_a_quota_for_each_module_takes_from_all_of_them(checkpoints, demonstrations, tmp_path):
    done = rejuvenate(*checkpoints, str(tmp_path / "q"), settings_of(demonstrations, per_module_quota=True))
    assert all(module.reset for module in done.selection.modules)


def test_mixed_types_end_in_the_wider_one(demonstrations, tmp_path):
    model = family_model("qwen2")
    base = save(model.bfloat16(), tmp_path / "base")
    over = save(moved(model.float(), 3), tmp_path / "over")
    rejuvenate(base, over, str(tmp_path / "out"), settings_of(demonstrations, compute="float32"))
    assert {t.dtype for t in stored(tmp_path / "out").values()} == {torch.float32}
    rejuvenate(over, base, str(tmp_path / "back"), settings_of(demonstrations, compute="float32"))
    assert {t.dtype for t in stored(tmp_path / "back").values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("seed", range(3))
def test_models_stored_in_bfloat16_are_computed_in_it(demonstrations, tmp_path, seed):
    model = family_model("llama", seed)
    folders = save(model.bfloat16(), tmp_path / "base"), save(moved(model.float(), seed).bfloat16(), tmp_path / "over")
    done = rejuvenate(*folders, str(tmp_path / "out"), settings_of(demonstrations))
    assert {t.dtype for t in stored(tmp_path / "out").values()} == {torch.bfloat16}
    assert done.reset_neurons > 0
    assert 1e-5 < done.selection.reconstruction_error["max"] < 1.0  # rounding of bfloat16, and no more


def test_prefix_modules_are_ranked_with_the_others(rejuvenated):
    _, done = rejuvenated
    assert any(module.reset for module in done.selection.modules if module.kind in PREFIX)


# --- what a user can get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": 1.5}, ["--alpha = 1.5 must be at least 0 and at most 1"]),
        ({"rho": -0.1}, ["--rho = -0.1"]),
        ({"targets": 0}, ["--targets = 0 must be at least 1"]),
    ],
)
def test_settings_out_of_range(changes, words, checkpoints, demonstrations, tmp_path):
    with pytest.raises(ConfigError) as caught:
        rejuvenate(*checkpoints, str(tmp_path / "out"), settings_of(demonstrations, **changes))
    for word in words:
        assert word in str(caught.value)


def refused(base, over, out, demonstrations):
    with pytest.raises(ModelError) as caught:
        rejuvenate(str(base), str(over), str(out), settings_of(demonstrations))
    return str(caught.value)


def test_folders_that_are_no_models(checkpoints, demonstrations, tmp_path):
    base, over = checkpoints
    out = tmp_path / "out"
    assert "--base = './nowhere' does not exist" in refused("./nowhere", over, out, demonstrations)
    (tmp_path / "empty").mkdir()
    message = refused(base, tmp_path / "empty", out, demonstrations)
    assert message.startswith(f"--over = '{tmp_path / 'empty'}': config.json is missing. A model folder needs")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    assert "neither model.safetensors nor" in refused(tmp_path / "bare", over, out, demonstrations)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"x")
    assert "a pickle, which can run code" in refused(tmp_path / "pickled", over, out, demonstrations)
    assert "is no folder here" in refused("owner/name", over, out, demonstrations)
    assert not out.exists()


def test_a_missing_or_damaged_shard(checkpoints, demonstrations, tmp_path):
    base = family_model("qwen2")
    over = save(moved(base, 1), tmp_path / "over", max_shard_size="40KB")
    shards = sorted((tmp_path / "over").glob("*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    message = refused(checkpoints[0], over, tmp_path / "out", demonstrations)
    assert f"--over = '{over}': 1 of {len(shards)} weight files are missing, the first is {shards[1].name}" in message
    shards[1].write_bytes(kept[: len(kept) // 2])
    assert f"{shards[1].name} cannot be read" in refused(checkpoints[0], over, tmp_path / "out", demonstrations)


def test_different_architectures(checkpoints, demonstrations, tmp_path):
    other = save(family_model("llama"), tmp_path / "llama")
    message = refused(checkpoints[0], other, tmp_path / "out", demonstrations)
    assert "are different architectures" in message
    assert "lm_head.weight" in message or "bias" in message
    wide = family_model("qwen2")
    wide.resize_token_embeddings(200)
    wider = save(wide, tmp_path / "wide")
    message = refused(checkpoints[0], wider, tmp_path / "out", demonstrations)
    assert "model.embed_tokens.weight has shape" in message


def test_an_output_folder_that_is_taken(checkpoints, demonstrations, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert "is there already and not empty" in refused(*checkpoints, tmp_path / "out", demonstrations)
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    assert "there is no folder" in refused(*checkpoints, tmp_path / "no" / "out", demonstrations)


def test_pairs_that_cannot_be_used(checkpoints, tmp_path):
    data = tmp_path / "plain.jsonl"
    data.write_text('{"problem": "1+1?", "answer": "2"}\n')
    with pytest.raises(DataError, match="without a demonstration"):
        rejuvenate(*checkpoints, str(tmp_path / "out"), settings_of(str(data)))
    data.write_text('{"problem": "1+1?", "answer": "2", "demonstration": "1+1=2"}\n')
    short = RejuvenationSettings(pairs=PairSettings(data=str(data), max_tokens=4))
    with pytest.raises(DataError):
        rejuvenate(*checkpoints, str(tmp_path / "out"), short)
    assert not (tmp_path / "out").exists()


def test_another_family_may_only_be_fused(demonstrations, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from mifo.data.chartok import char_tokenizer

    size = len(char_tokenizer())
    config = GPT2Config(
        vocab_size=size, n_positions=256, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    paths = save(model, tmp_path / "base"), save(moved(model, 4), tmp_path / "over")
    assert "model type 'gpt2'" in refused(*paths, tmp_path / "out", demonstrations)
    assert not list(tmp_path.glob("*out*"))
    rejuvenate(*paths, str(tmp_path / "out"), settings_of(demonstrations, rho=0.0))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_nothing_beside_the_output_is_touched(checkpoints, demonstrations, tmp_path):
    (tmp_path / "writing-out").mkdir()
    (tmp_path / "writing-out" / "thesis.txt").write_text("years of work")
    rejuvenate(*checkpoints, str(tmp_path / "out"), settings_of(demonstrations))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "writing-out"]
    assert (tmp_path / "writing-out" / "thesis.txt").read_text() == "years of work"


def test_the_folder_may_be_the_one_that_we_are_in(checkpoints, demonstrations, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "here")
    rejuvenate(*checkpoints, ".", settings_of(demonstrations, rho=0.0))
    rejuvenate(*checkpoints, str(tmp_path / "link"), settings_of(demonstrations, rho=0.0))
    assert (tmp_path / "here" / "config.json").is_file()
    assert (tmp_path / "there" / "config.json").is_file()


def test_all_chat_templates_come_along(checkpoints, demonstrations, tmp_path):
    shutil.copytree(checkpoints[1], tmp_path / "over")
    (tmp_path / "over" / "additional_chat_templates").mkdir()
    (tmp_path / "over" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    rejuvenate(checkpoints[0], str(tmp_path / "over"), str(tmp_path / "out"), settings_of(demonstrations, rho=0.0))
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"


def test_the_base_is_measured_with_the_configuration_of_the_over_trained_model(checkpoints, demonstrations, tmp_path):
    """As a run does that began with these weights under another RoPE base."""
    done = {}
    for name, sources in (("both", (0, 1)), ("over", (1,))):
        paths = list(checkpoints)
        for number in sources:
            paths[number] = str(tmp_path / f"{name}{number}")
            shutil.copytree(checkpoints[number], paths[number])
            config = json.loads((tmp_path / f"{name}{number}" / "config.json").read_text())
            config["rope_parameters"]["rope_theta"] = 40.0
            (tmp_path / f"{name}{number}" / "config.json").write_text(json.dumps(config))
        done[name] = rejuvenate(*paths, str(tmp_path / name), settings_of(demonstrations))
    assert done["over"].selection == done["both"].selection
    assert done["over"].target_entropies == done["both"].target_entropies
    assert "--base is measured with the configuration of --over" in done["over"].note
    assert "configuration" not in done["both"].note
    assert stored(tmp_path / "over").keys() == stored(tmp_path / "both").keys()
    for name, tensor in stored(tmp_path / "over").items():
        assert torch.equal(tensor, stored(tmp_path / "both")[name]), name


def test_equal_models_are_said_to_be_equal(checkpoints, demonstrations, tmp_path):
    done = rejuvenate(checkpoints[1], checkpoints[1], str(tmp_path / "out"), settings_of(demonstrations))
    assert "the same everywhere, so the targets are arbitrary" in done.note


def test_one_shard_of_another_name_keeps_its_index(checkpoints, demonstrations, tmp_path):
    """As sharding exporters write small models: model-00001-of-00001 and an index."""
    paths = []
    for number, path in enumerate(checkpoints):
        folder = Path(shutil.copytree(path, tmp_path / f"model{number}"))
        tensors = stored(folder)
        for file in folder.glob("model*"):
            file.unlink()
        shard = "model-00001-of-00001.safetensors"
        save_file(tensors, folder / shard, {"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        paths.append(str(folder))
    done = rejuvenate(*paths, str(tmp_path / "out"), settings_of(demonstrations))
    plain = rejuvenate(*checkpoints, str(tmp_path / "plain"), settings_of(demonstrations))
    assert done.selection == plain.selection
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "plain").state_dict().items():
        assert torch.equal(made[name], tensor), name


def test_rounding_of_one_model_moves_no_target(demonstrations, tmp_path):
    """A base in bfloat16 beside an over-trained model in fp32: both are computed in fp32."""
    model = family_model("llama").bfloat16()
    coarse, fine = save(model, tmp_path / "coarse"), save(model.float(), tmp_path / "fine")
    over = save(moved(model.float(), 3), tmp_path / "over")
    found = [
        rejuvenate(base, over, str(tmp_path / name), settings_of(demonstrations))
        for name, base in (("a", coarse), ("b", fine))
    ]
    assert found[0].selection == found[1].selection
    assert found[0].target_entropies == found[1].target_entropies
    same = rejuvenate(coarse, fine, str(tmp_path / "c"), settings_of(demonstrations))
    assert "the targets are arbitrary" in same.note


def test_constants_that_old_exports_store_are_no_weights(checkpoints, demonstrations, tmp_path):
    old = Path(shutil.copytree(checkpoints[0], tmp_path / "old"))
    tensors = stored(old)
    constants = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    save_file(tensors | constants, old / "model.safetensors", {"format": "pt"})
    done = rejuvenate(str(old), checkpoints[1], str(tmp_path / "out"), settings_of(demonstrations))
    assert done.selection.modules
    assert stored(tmp_path / "out").keys() == tensors.keys()
