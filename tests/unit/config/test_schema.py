"""Every setting is described, read by the code it steers, and in the reference page."""

import ast
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import mifo
from mifo.config import legacy, method_tables, schema, scored, tables
from mifo.config.describe import field_comments, method_descriptions, reference_page
from mifo.config.help import settings_help
from mifo.methods import METHODS

SOURCE = Path(mifo.__file__).parent
DOCS = SOURCE.parents[1] / "docs" / "configuration.md"
TABLES = [
    member
    for member in vars(schema).values()
    if isinstance(member, type)
    and dataclasses.is_dataclass(member)
    and member.__module__
    in (schema.__name__, scored.__name__, tables.__name__, method_tables.__name__, legacy.__name__)
]
SETTINGS = [(table, f.name) for table in TABLES if table is not schema.Config for f in dataclasses.fields(table)]
# Settings that are read through a property of Config.
DERIVED = (
    {(schema.EvaluationConfig, "max_response_tokens"): "evaluation_tokens"}
    | {(schema.StageConfig, name): "by_stage" for name in ("method", "steps", "rl_optimizer", "sft_optimizer")}
    | {(schema.StageConfig, "rejuvenate"): "rejuvenation_before"}
)
# What a variable that holds a table is called where its settings are read.
HOLDERS = {
    schema.ModelConfig: {"model", "config"},
    schema.DataConfig: {"data"},
    schema.RewardConfig: {"reward"},
    schema.RolloutConfig: {"rollout"},
    schema.OptimizerConfig: {"settings", "config", "optimizer"},
    schema.GuardConfig: {"settings"},
    schema.PolicyGradientConfig: {"rl"},
    schema.ImitationConfig: {"sft"},
    schema.FreezeControlConfig: {"control"},
    schema.GrpoMethod: {"method"},
    schema.SftMethod: {"method"},
    schema.MifoMethod: {"method"},
    schema.ReliftMethod: {"method"},
    schema.LuffyMethod: {"method"},
    schema.RlWithSftMethod: {"method"},
    schema.SftRlMethod: {"method"},
    schema.RlSftMethod: {"method"},
    schema.MultiStageMethod: {"method"},
    schema.SrftMethod: {"method"},
    schema.HptMethod: {"method"},
    schema.SuperRlMethod: {"method"},
    schema.ChordMethod: {"method"},
    schema.UftMethod: {"method"},
    schema.PrefixRftMethod: {"method"},
    schema.BreadMethod: {"method"},
    schema.SasrMethod: {"method"},
    schema.LegacyConfig: {"legacy"},
    schema.PpoMethod: {"method"},
    schema.PrimeMethod: {"method"},
    schema.CriticOptimizerConfig: {"settings", "config", "optimizer"},
    schema.PrmOptimizerConfig: {"settings", "config", "optimizer"},
    schema.RejuvenationConfig: {"settings"},
    schema.IntervalRejuvenationConfig: {"settings"},
    schema.TrainConfig: {"train"},
    schema.EvaluationConfig: {"evaluation"},
    schema.RunConfig: {"run"},
}


def reads_of(source):
    """(holder, attribute) of every attribute that is read: `config.train.steps` gives ("train", "steps")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            holder = node.value
            if isinstance(holder, ast.Attribute):
                yield holder.attr.lstrip("_"), node.attr
            elif isinstance(holder, ast.Name):
                yield holder.id, node.attr


@pytest.fixture(scope="module")
def reads():
    files = [path for path in SOURCE.rglob("*.py") if "config" not in path.relative_to(SOURCE).parts]
    return {read for path in files for read in reads_of(path.read_text(encoding="utf-8"))}


def test_the_reader_sees_reads_and_not_writes():
    assert set(reads_of("a = config.train.steps\nself._rl.clip_low\nrun.steps = 1")) == {
        ("config", "train"),
        ("train", "steps"),
        ("self", "_rl"),
        ("rl", "clip_low"),
    }


@pytest.mark.parametrize(("table", "name"), SETTINGS, ids=lambda value: getattr(value, "__name__", value))
def test_every_setting_is_read_outside_the_configuration(table, name, reads):
    derived = DERIVED.get((table, name))
    expected = {(holder, name) for holder in HOLDERS[table]} if derived is None else {("config", derived)}
    assert expected & reads, f"{table.__name__}.{name} is read by nothing: it changes nothing"


@pytest.mark.parametrize("table", [table for table in TABLES if table is not schema.Config])
def test_every_setting_has_a_comment(table):
    comments = field_comments(table)
    for f in dataclasses.fields(table):
        assert comments.get(f.name, "").endswith("."), f"{table.__name__}.{f.name}"
    assert table.__doc__


def test_every_table_is_frozen_and_keyword_only():
    for table in TABLES:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(table(), dataclasses.fields(table)[0].name, None)
        with pytest.raises(TypeError):
            table(None)


def test_the_reference_page_is_up_to_date():
    assert DOCS.read_text(encoding="utf-8") == reference_page(), "run: make docs"


def test_the_reference_page_is_printed_by_its_module():
    printed = subprocess.run(
        [sys.executable, "-m", "mifo.config.describe"], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert printed.stdout == reference_page()


def test_every_row_of_the_reference_page_has_four_cells():
    rows = [line for line in reference_page().splitlines() if line.startswith("|")]
    assert len(rows) > 100
    for row in rows:
        assert row.replace("\\|", "").count("|") == 5, row  # a bare bar in a text would start a fifth cell


def test_methods_are_described_in_one_line():
    descriptions = dict(method_descriptions())
    assert list(descriptions)[:3] == ["mifo", "grpo", "sft"]
    assert set(descriptions) == set(METHODS)
    assert all(text.endswith(".") for text in descriptions.values())


def test_help_shows_every_setting_once_with_its_value():
    config = dataclasses.replace(schema.Config(), train=schema.TrainConfig(steps=77, minutes=None))
    text = settings_help(config, width=100, all_methods=True)
    assert "--train.steps INTEGER\n        RL steps" in text
    assert "(default: 77; at least 1)" in text
    assert "--train.minutes NUMBER|none" in text
    assert "--run.export | --run.no-export" in text
    flags = [line.split()[0] for line in text.splitlines() if line.startswith("  --")]
    assert len(flags) == len(set(flags))
    assert "--method.batch-size" in flags
    assert "--method.name" not in flags
    assert max(map(len, text.splitlines())) <= 100


def test_help_of_one_recipe_leaves_other_methods_out():
    text = settings_help(dataclasses.replace(schema.Config(), method=schema.GrpoMethod()), width=80, all_methods=False)
    assert "--method.rl.clip-low" in text
    assert "--method.freeze-top" not in text
    assert "--method.batch-size" not in text


def test_the_union_and_the_methods_agree():
    from mifo.methods import make_method

    for member in typing.get_args(schema.MethodConfig):
        assert make_method(schema.Config(method=member())) is not None
