"""The redundancy ratio on a case by hand, and against plain autograd."""

import json
import math
import shutil

import pytest
import torch
from lab_models import family_model, moved, save
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from mifo.data.chartok import char_tokenizer
from mifo.errors import ConfigError, ModelError, NumericsError
from mifo.lab.redundancy import Ratios, RatioToken, ratios, redundancy
from mifo.lab.samples import PairSettings, read_pairs, stored_names
from mifo.lab.source import Tensors, find_source


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redundancy")
    base = family_model("qwen3")
    over = moved(base, 3, scale=0.05)
    return base, over, save(base, folder / "start"), save(over, folder / "end")


def test_against_plain_autograd(trained, demonstrations):
    base, over, *paths = trained
    settings = PairSettings(data=demonstrations, count=4)
    [found] = redundancy(paths[0], paths[1:], pairs=settings, tokens=8, reward=0.5)
    pairs = read_pairs(find_source(paths[0], "x"), settings).sequences
    vectors = [torch.cat([p.detach().double().view(-1) for p in model.parameters()]) for model in (base, over)]
    change = vectors[1] - vectors[0]
    assert found.change_norm == pytest.approx(float(change.norm()), rel=1e-6)
    assert len(found.tokens) == 8
    model = type(base)(base.config).double()
    model.load_state_dict(base.state_dict())
    for token in found.tokens:
        pair = pairs[token.pair]
        ids = torch.tensor([pair.prompt_ids + pair.response_ids[: token.position]])
        y = pair.response_ids[token.position]
        z = model(input_ids=ids).logits[0, -1]
        order = z.argsort(descending=True).tolist()
        rival = order[0] if order[0] != y else order[1]
        z_after = over.double()(input_ids=ids).logits[0, -1]
        over.float()
        before, after = (float((logits[y] - logits[rival]).detach()) for logits in (z, z_after))
        assert token.margin_before == pytest.approx(before, abs=1e-4)
        assert token.margin_after == pytest.approx(after, abs=1e-4)
        g = torch.cat([t.view(-1) for t in torch.autograd.grad(z[y] - z[rival], list(model.parameters()))])
        assert token.gradient_norm == pytest.approx(float(g.norm()), rel=1e-4)
        p = float(z.detach().softmax(-1)[y])
        assert token.probability == pytest.approx(p, rel=1e-4)
        assert token.theorem_ratio == pytest.approx(1 / (0.5 * p), rel=1e-4)
        if after > before + 1e-3:
            gained = after - before
            assert token.ratio == pytest.approx(float(change.norm() * g.norm()) / gained, rel=1e-2)
            assert token.linear_along_training == pytest.approx(float(g @ change) / gained, rel=1e-2, abs=1e-3)
        elif after < before - 1e-3:
            assert token.ratio is token.linear_along_minimum is None


def test_the_shortest_move_has_ratio_one(trained, demonstrations, tmp_path):
    """A model moved along the margin's gradient itself: no redundancy, and linearity holds for a small move."""
    base, _, start, _ = trained
    settings = PairSettings(data=demonstrations, count=1)
    [pair] = read_pairs(find_source(start, "x"), settings).sequences
    position = 2
    model = type(base)(base.config).double()
    model.load_state_dict(base.state_dict())
    z = model(input_ids=torch.tensor([pair.prompt_ids + pair.response_ids[:position]])).logits[0, -1]
    y = pair.response_ids[position]
    others = z.detach().clone()
    others[y] = -math.inf
    slopes = torch.autograd.grad(z[y] - z[int(others.argmax())], list(model.parameters()))
    with torch.no_grad():
        for parameter, slope in zip(model.parameters(), slopes, strict=True):
            parameter += 1e-4 * slope
    end = save(model.float(), tmp_path / "end")
    [found] = redundancy(start, [end], pairs=settings, tokens=1000)
    [token] = [t for t in found.tokens if t.position == position]
    assert token.ratio == pytest.approx(1.0, abs=0.02)
    assert token.linear_along_training == pytest.approx(1.0, abs=0.02)
    assert token.linear_along_minimum == pytest.approx(1.0, abs=0.02)
    others = [t.ratio for t in found.tokens if t.position != position and t.ratio is not None]
    assert min(others) > 1.02  # Cauchy-Schwarz: for any other token the same move is longer than it need be


def test_the_summary_counts_where_the_ratio_is_defined(trained, demonstrations):
    [found] = redundancy(trained[2], trained[3:], pairs=PairSettings(data=demonstrations, count=4), tokens=10)
    grew = [t for t in found.tokens if t.margin_after > t.margin_before]
    summary = found.summary()
    assert summary["margin_grew"] == len(grew) / 10
    assert {t.position for t in grew} == {t.position for t in grew if t.ratio is not None}
    assert found.record()["summary"]["ratio"] == summary["ratio"]


def test_mistakes(trained, demonstrations):
    settings = PairSettings(data=demonstrations)
    with pytest.raises(ConfigError, match="--tokens = 0"):
        redundancy(trained[2], trained[3:], pairs=settings, tokens=0)
    with pytest.raises(ConfigError, match="Theorem 1 divides by it"):
        redundancy(trained[2], trained[3:], pairs=settings, reward=0.0)


def test_ratio_of_two_models_token_by_token(trained, demonstrations, tmp_path):
    """The oracle of Theorem 1's left side: PR over PR of a token, where the margin grew in both; 1 of a model to itself."""
    base, _, start, end = trained
    other = save(moved(base, 9, scale=0.01), tmp_path / "other")
    settings = PairSettings(data=demonstrations, count=4)
    first, second = redundancy(start, [end, other], pairs=settings, tokens=40)
    assert [(t.pair, t.position, t.probability) for t in first.tokens] == [
        (t.pair, t.position, t.probability) for t in second.tokens
    ]
    both = ratios(first, second)
    assert (both.over, both.under, both.of) == (first.label, second.label, len(first.tokens))
    slow = [a.ratio / b.ratio for a, b in zip(first.tokens, second.tokens, strict=True) if a.ratio and b.ratio]
    assert [token.measured for token in both.tokens] == slow
    assert 3 < len(slow) < len(first.tokens)
    gained = [t.margin_after - t.margin_before for t in first.tokens]
    [place, *_] = [
        i for i, t in enumerate(first.tokens) if (t.pair, t.position) == (both.tokens[0].pair, both.tokens[0].position)
    ]
    beta = second.tokens[place].margin_after - second.tokens[place].margin_before
    by_hand = (first.change_norm / gained[place]) / (second.change_norm / beta)  # the gradient's norm cancels
    assert both.tokens[0].measured == pytest.approx(by_hand, rel=1e-6)
    alone = ratios(first, first).summary()
    assert (alone["measured"]["min"], alone["measured"]["max"], alone["at_least_one"]) == (1.0, 1.0, 1.0)
    assert alone["rank_correlation"] is None  # one of them does not vary


def test_rank_correlation_of_ratios():
    def of(*pairs):
        tokens = tuple(RatioToken(pair=0, position=i, measured=m, theorem=t) for i, (m, t) in enumerate(pairs))
        return Ratios(over="a", under="b", of=9, tokens=tokens).summary()

    assert of((1, 10), (2, 20), (50, 21))["rank_correlation"] == pytest.approx(1.0)
    assert of((3, 10), (2, 20), (1, 21))["rank_correlation"] == pytest.approx(-1.0)
    assert of((1, 10), (2, 20))["rank_correlation"] is None
    assert of()["at_least_one"] is None


def test_tokens_of_different_samples_are_not_compared(trained, demonstrations):
    one, other = (
        redundancy(trained[2], trained[3:], pairs=PairSettings(data=demonstrations, count=4), tokens=10, seed=seed)[0]
        for seed in (0, 1)
    )
    with pytest.raises(ConfigError, match="measured on different tokens"):
        ratios(one, other)


def with_rope(folder, copy, theta):
    """A copy of a model folder with another RoPE base."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = theta
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


def test_margins_are_those_under_the_configuration_of_the_trained_model(trained, demonstrations, tmp_path):
    _, _, start, end = trained
    settings = PairSettings(data=demonstrations, count=4)
    other = with_rope(end, tmp_path / "end", 40.0)
    [found] = redundancy(start, [other], pairs=settings, tokens=4)
    assert "START is measured with the configuration of MODEL" in found.note
    assert "rope_parameters" in found.note
    [right] = redundancy(with_rope(start, tmp_path / "start", 40.0), [other], pairs=settings, tokens=4)
    assert "configuration" not in right.note
    assert found.tokens == right.tokens
    [plain] = redundancy(start, [end], pairs=settings, tokens=4)
    assert [t.margin_after for t in plain.tokens] != [t.margin_after for t in found.tokens]
    with pytest.raises(ModelError, match=r"compute differently: rope_parameters"):
        redundancy(start, [end, other], pairs=settings, tokens=4)


def test_weights_that_are_not_finite(trained, demonstrations, tmp_path):
    _, over, start, _ = trained
    broken = moved(over, 5)
    broken.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    path = save(broken, tmp_path / "broken")
    settings = PairSettings(data=demonstrations, count=4)
    with pytest.raises(
        NumericsError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds numbers that are not finite"
    ):
        redundancy(start, [path], pairs=settings, tokens=2)
    with pytest.raises(ConfigError, match="--reward = inf"):
        redundancy(start, [path], pairs=settings, tokens=2, reward=math.inf)


def test_files_that_leave_out_the_prefix_of_the_whole_model(demonstrations, tmp_path):
    """As GPT-2 lies on the hub, and with buffers that are no parameters."""
    size = len(char_tokenizer())
    config = GPT2Config(vocab_size=size, n_positions=64, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    models = [GPT2LMHeadModel(config)]
    models.append(moved(models[0], 4))
    settings, found = PairSettings(data=demonstrations, count=2), []
    for bare in (False, True):
        paths = []
        for number, model in enumerate(models):
            folder = tmp_path / f"{bare}{number}"
            paths.append(save(model, folder))
            if bare:
                stored = load_file(folder / "model.safetensors")
                short = {name.removeprefix("transformer."): value for name, value in stored.items()}
                save_file(
                    {**short, "h.0.attn.masked_bias": torch.tensor(-1e4)},
                    folder / "model.safetensors",
                    {"format": "pt"},
                )
        found.append(redundancy(paths[0], [paths[1]], pairs=settings, tokens=2)[0].tokens)
    assert found[0] == found[1]


def test_stored_in_another_layout_than_in_memory(trained):
    base, _, start, _ = trained
    tensors = Tensors(find_source(start, "START"))
    tensors.infos = {name: info for name, info in tensors.infos.items() if "q_proj" not in name}
    with pytest.raises(ModelError, match=r"START = .*no tensor for the parameter model\.layers\.0\.self_attn\.q_proj"):
        stored_names(base, tensors)
