"""Entropies of models on pairs against plain forward passes, and what is counted of them."""

import gc
import json
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from lab_models import family_model, save
from transformers import AutoModelForCausalLM

from mifo.config.legacy import LegacyConfig
from mifo.config.schema import Config, DataConfig
from mifo.errors import ConfigError, DataError, ModelError
from mifo.lab.entropy import entropy
from mifo.lab.samples import PairSettings, _data_config, load_source, make_policy, read_pairs
from mifo.lab.source import find_source
from mifo.train.attribution import Attribution, Target
from mifo.train.calibration import quantiles, token_entropies


@pytest.fixture(scope="module")
def measured(checkpoints, demonstrations):
    """(report, pairs, entropies of both models by plain forward passes)."""
    settings = PairSettings(data=demonstrations, count=5)
    report = entropy(checkpoints, pairs=settings, fraction=0.3)
    pairs = read_pairs(find_source(checkpoints[0], "x"), settings)
    plain = [[slow_entropy(AutoModelForCausalLM.from_pretrained(c), p) for p in pairs.sequences] for c in checkpoints]
    return report, pairs, plain


@torch.no_grad()
def slow_entropy(model, pair):
    ids = torch.tensor([pair.prompt_ids + pair.response_ids])
    p = model.eval()(input_ids=ids).logits[0, len(pair.prompt_ids) - 1 : -1].double().softmax(-1)
    return -(p * p.log()).sum(-1)


def test_against_plain_forward_passes(measured, checkpoints):
    _, pairs, plain = measured
    for path, expected in zip(checkpoints, plain, strict=True):
        model = load_source(find_source(path, "x"), "stored")
        rows = token_entropies(make_policy(model), pairs.sequences, micro_batch_tokens=60)
        for row, slow in zip(rows, expected, strict=True):
            assert torch.allclose(row.double(), slow, atol=1e-5)


def test_the_report(measured):
    report, pairs, plain = measured
    flat = [torch.cat(rows) for rows in plain]
    assert report.tokens == len(flat[0]) == sum(len(p.response_ids) for p in pairs.sequences)
    for model, values in zip(report.models, flat, strict=True):
        assert model.entropy["mean"] == pytest.approx(float(values.mean()), abs=1e-5)
        assert model.entropy["max"] == pytest.approx(float(values.max()), abs=1e-5)
        assert sum(model.histogram) == report.tokens
    base, over = report.models
    assert base.gap == {}
    assert over.gap["mean"] == pytest.approx(float((flat[1] - flat[0]).mean()), abs=1e-5)
    assert over.fell == pytest.approx(float((flat[1] < flat[0]).float().mean()), abs=1e-6)


def test_the_overlap_of_selections(measured):
    report, _, plain = measured
    shared = count = 0
    for base, over in zip(*plain, strict=True):
        keep = -(-3 * len(base) // 10)
        chosen = [set(v.argsort(descending=True, stable=True)[:keep].tolist()) for v in (base, over)]
        shared, count = shared + len(chosen[0] & chosen[1]), count + keep
    [pair] = report.overlaps
    assert pair.share == pytest.approx(shared / count)


def test_selected_tokens_are_counted(measured):
    report, pairs, _ = measured
    model = report.models[0]
    kept = sum(-(-3 * len(p.response_ids) // 10) for p in pairs.sequences)
    assert sum(token.selected for token in model.selected) == kept  # a character vocabulary: all fit the list
    assert all(0 < token.selected <= token.occurrences for token in model.selected)
    assert [t.selected for t in model.selected] == sorted((t.selected for t in model.selected), reverse=True)


def test_a_model_overlaps_with_itself(checkpoints, demonstrations):
    report = entropy([checkpoints[0]] * 2, pairs=PairSettings(data=demonstrations, count=3))
    assert report.overlaps[0].share == 1.0
    assert report.models[1].gap["max"] == report.models[1].gap["min"] == 0.0


def test_a_share_out_of_range(checkpoints, demonstrations):
    with pytest.raises(ConfigError, match="--token-fraction = 0 must be more than 0"):
        entropy(checkpoints, pairs=PairSettings(data=demonstrations), fraction=0.0)


def test_quantiles_by_hand():
    values = torch.arange(101.0).flip(0)
    assert quantiles(values) == {
        "mean": 50,
        "min": 0,
        "p25": 25,
        "median": 50,
        "p75": 75,
        "p90": 90,
        "p99": 99,
        "max": 100,
    }
    assert quantiles(torch.zeros(0)) == {}


def test_a_measured_model_leaves_memory_with_its_last_name(checkpoints, demonstrations):
    """One model at a time: nothing but the small norms, which are patched, waits for the garbage collector."""
    source = find_source(checkpoints[0], "x")
    pairs = read_pairs(source, PairSettings(data=demonstrations, count=2)).sequences

    def measure():
        model = load_source(source, "stored")
        token_entropies(make_policy(model), pairs)
        with Attribution(model) as attribution:
            attribution.scores(pairs[0].prompt_ids, [Target(2, 3)])
        return {name: weakref.ref(p) for name, p in model.named_parameters()}

    gc.disable()
    try:
        left = [name for name, reference in measure().items() if reference() is not None]
    finally:
        gc.enable()
    assert all("norm" in name for name in left)


def test_pairs_past_the_context_are_left_out(checkpoints, tmp_path):
    rows = [{"problem": f"{n}+0?", "answer": str(n), "demonstration": "1+1=2. " * n} for n in (1, 50)]
    data = tmp_path / "long.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    found = entropy(checkpoints, pairs=PairSettings(data=str(data)))
    assert "Measured on 1 pairs, without grading them; 1 of more than 256 tokens were left out" in found.note
    data.write_text(json.dumps(rows[1]))
    with pytest.raises(DataError, match="at most 256 tokens, which is the model's context"):
        entropy(checkpoints, pairs=PairSettings(data=str(data)))


def test_counts_below_one(checkpoints, demonstrations):
    with pytest.raises(ConfigError, match="--samples = 0 must be at least 1"):
        entropy(checkpoints, pairs=PairSettings(data=demonstrations, count=0))
    with pytest.raises(ConfigError, match="--max-tokens = -3 must be at least 1"):
        entropy(checkpoints, pairs=PairSettings(data=demonstrations, max_tokens=-3))


def test_a_tokenizer_of_another_model(checkpoints, demonstrations, tmp_path):
    folder = tmp_path / "small"
    small = family_model("qwen2")
    small.resize_token_embeddings(20)
    save(small, folder)
    with pytest.raises(ModelError, match=r"its tokenizer gives token \d+, and its embedding has 20 rows"):
        entropy([str(folder)], pairs=PairSettings(data=demonstrations))


def test_errors_speak_of_the_probe_s_own_flags(checkpoints, tmp_path):
    data = tmp_path / "bare.jsonl"
    data.write_text('{"problem": "1+1?", "answer": "2"}\n')
    with pytest.raises(DataError) as caught:
        entropy(checkpoints, pairs=PairSettings(data=str(data)))
    assert "--data = " in str(caught.value)
    assert "data.train" not in str(caught.value)
    assert "data.max" not in str(caught.value)


def test_the_record_names_the_models(measured, checkpoints):
    assert measured[0].sources == tuple(checkpoints)


def test_pairs_are_rendered_as_the_run_rendered_them(checkpoints):
    """Boxed answers, and demonstrations without their end token."""
    run = Config(data=DataConfig(box_answers=True), legacy=LegacyConfig(append_end=False))
    source = replace(find_source(checkpoints[1], "MODEL"), run=run)
    config = _data_config(source, PairSettings(data="file.jsonl"))
    assert (config.data.box_answers, config.legacy.append_end) == (True, False)
    assert not _data_config(source, PairSettings()).data.box_answers  # embedded ones are boxed


def test_gaps_are_of_the_weights_alone(demonstrations, tmp_path):
    """Neither rounding of the type that one is stored in, nor another RoPE base in its configuration, is a gap."""
    model = family_model("llama").bfloat16()
    coarse, fine = save(model, tmp_path / "coarse"), save(model.float(), tmp_path / "fine")
    report = entropy([coarse, fine], pairs=PairSettings(data=demonstrations, count=5))
    assert report.models[1].gap["max"] == report.models[1].gap["min"] == 0.0
    assert (report.models[1].fell, report.overlaps[0].share) == (0.0, 1.0)
    assert "stored in different types (bfloat16, float32); all were computed in the widest." in report.note
    config = json.loads((tmp_path / "fine" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 40.0
    (tmp_path / "fine" / "config.json").write_text(json.dumps(config))
    report = entropy([coarse, fine], pairs=PairSettings(data=demonstrations, count=5))
    assert report.models[1].gap["max"] == 0.0
    assert f"{coarse} is measured with the configuration of {fine}" in report.note
    with pytest.raises(ModelError, match=r"compute differently: rope_parameters.*one by one"):
        entropy([coarse, fine, coarse], pairs=PairSettings(data=demonstrations, count=5))
    assert "configuration" not in entropy([coarse, coarse], pairs=PairSettings(data=demonstrations, count=5)).note


def test_a_file_whose_name_begins_like_embedded_data_is_a_file(checkpoints, demonstrations, tmp_path):
    mine = tmp_path / "embedded_pairs.jsonl"
    shutil.copy(demonstrations, mine)
    source = find_source(checkpoints[0], "x")
    assert _data_config(source, PairSettings(data=str(mine.name))).data.system_prompt is None
    assert _data_config(source, PairSettings(data="embedded:test")).data.system_prompt is not None
    run = Config(data=DataConfig(labels=("no", "yes"), box_answers=True))
    made = _data_config(replace(source, run=run), PairSettings(data=str(mine.name)))
    assert (made.data.labels, made.data.box_answers) == (("no", "yes"), True)
