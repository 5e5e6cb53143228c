"""Every YAML of conf/ composes, and what the command line refuses it refuses in one line."""

from importlib import resources
from pathlib import Path

import pytest

from activation_store.config import InputHook, StoreDtype
from activation_store.errors import UserError
from launch.compose import compose_config, compose_node, to_config
from launch.config import LayerloomConfig
from launch.groups import find_options
from launch.knobs import group_summaries, knobs
from launch.validate import validate
from launch.verbs import VERBS

OPTIONS = find_options()
ALL_OPTIONS = [(group, option.name) for group, options in OPTIONS.items() for option in options]


@pytest.mark.parametrize(("group", "name"), ALL_OPTIONS, ids=[f"{group}-{name}" for group, name in ALL_OPTIONS])
def test_every_option_composes_and_obeys_the_rules(group: str, name: str) -> None:
    composed = compose_node([f"{group}={name}"])
    assert composed.choices[group] == name
    validate(to_config(composed), "demo")


def test_no_yaml_is_left_out() -> None:
    conf = Path(str(resources.files("conf")))
    files = {str(file.relative_to(conf)) for file in conf.rglob("*.yaml")}
    assert files == {"config.yaml", *(f"{group}/{name}.yaml" for group, name in ALL_OPTIONS)}


def test_the_groups_of_the_contract_are_there() -> None:
    wanted = "subject text store source model activation optim schedule train parallel engine kernels eval publish log"
    assert set(OPTIONS) == {*wanted.split(), "launch", "sweep", "tune", "preset"}
    assert set(group_summaries()) == set(OPTIONS) - {"preset"}


def test_the_defaults_list_names_every_group() -> None:
    assert set(compose_node([]).choices) >= set(OPTIONS)


def test_every_option_says_what_it_is() -> None:
    silent = [
        f"{option.group}={option.name}" for options in OPTIONS.values() for option in options if not option.summary
    ]
    assert silent == []


def test_every_knob_is_documented() -> None:
    assert [key for key, knob in knobs().items() if not knob.comment] == []


def test_values_arrive_as_plain_typed_objects() -> None:
    config = compose_config(["store.dtype=bfloat16", "store.layer_stop=6", "optim.lr=1e-3", "train.fresh=true"])
    assert type(config) is LayerloomConfig
    assert config.store.dtype is StoreDtype.bfloat16
    assert config.store.layer_stop == 6
    assert config.optim.lr == 1e-3
    assert config.train.fresh is True


def test_later_words_win_and_a_preset_sets_several_groups() -> None:
    config = compose_config(["preset=bench_smollm2_6l", "activation.k=8"])
    assert (config.model.n_features, config.store.layer_start, config.store.layer_stop) == (2048, 0, 6)
    assert config.activation.k == 8
    assert config.run != compose_config([]).run


def test_the_bench_does_not_depend_on_other_options() -> None:
    """Its figures are published: other defaults must leave its config as it is."""
    groups = ("text", "store", "model", "activation", "optim", "schedule", "eval")
    others = ["store=float32", "model=skip_plt", "activation=jumprelu", "optim=adam_bf16", "schedule=cosine"]
    others += ["subject=smollm2_hub", "eval=thorough", "train=bf16"]
    alone = compose_config(["preset=bench_smollm2_6l"])
    among_others = compose_config([*others, "preset=bench_smollm2_6l"])
    assert [name for name in groups if getattr(alone, name) != getattr(among_others, name)] == []
    assert (alone.train, alone.subject.path) == (among_others.train, among_others.subject.path)


def test_a_subject_may_choose_the_hook_that_it_needs() -> None:
    assert compose_config(["subject=pythia_70m"]).store.input_hook is InputHook.mlp_in
    assert compose_config(["subject=pythia_70m", "store=float32"]).store.input_hook is InputHook.mlp_in


def test_options_of_a_users_own(tmp_path: Path) -> None:
    own = tmp_path / "my configs"
    (own / "model").mkdir(parents=True)
    (own / "preset").mkdir()
    (own / "model/wide.yaml").write_text("# Mine.\nn_features: 96\n")
    (own / "preset/mine.yaml").write_text("# @package _global_\ntrain:\n  tokens: 5000\nrun: here\n")
    config = compose_config(["model=wide", "preset=mine"], own)
    assert (config.model.n_features, config.train.tokens, config.run) == (96, 5000, "here")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["subject=gpt3"], ["subject=gpt3", "gpt2", "smollm2"]),
        (["activation=topkk"], ["activation=topkk", 'did you mean "topk"?', "jumprelu"]),
        (["modell=clt"], ["modell=clt", 'did you mean "model"?']),
        (["model.n_featurs=4"], ["model.n_featurs=4", 'did you mean "model.n_features"?']),
        (["+model.extra=1"], ["+model.extra=1", "model.extra"]),
        (["+model.n_features=1"], ["model.n_features", "neither added nor deleted"]),
        (["~model.n_features"], ["model.n_features", "neither added nor deleted"]),
        (["model.n_features=many"], ["model.n_features", "many", "a whole number"]),
        (["optim.lr=fast"], ["optim.lr", "fast", "a number"]),
        (["train.fresh=perhaps"], ["train.fresh", "perhaps", "true or false"]),
        (["store.input_hook=resid_pre"], ["store.input_hook", "resid_pre", "one of resid_mid, mlp_in"]),
        (["store.layer_stop=last"], ["store.layer_stop", "last", "a whole number or null"]),
        (["model.n_features=null"], ["model.n_features", "a whole number"]),
        (["model={n_features: 3}"], ["model", "option"]),
        (["model.n_features=1,2"], ["model.n_features=1,2", "layerloom sweep"]),
        (["run=a b,c)"], ["run=a b,c)", "quotes"]),
        (["justaword"], ["justaword", "KEY=VALUE"]),
    ],
)
def test_a_wrong_word_gets_one_clear_line(words: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        compose_config(words, verb="train")
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


def test_a_wrong_file_of_a_users_own_gets_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("n_featurs: 3\n")
    with pytest.raises(UserError, match=r'^model\.n_featurs: there is no such key; did you mean "model\.n_features"\?'):
        compose_config(["model=mine"], tmp_path)
    (tmp_path / "model/mine.yaml").write_text("n_features: [3\n")
    with pytest.raises(UserError, match=r"^[^\n]*mine\.yaml[^\n]*$"):
        compose_config(["model=mine"], tmp_path)


def test_a_users_option_may_not_hide_a_built_in_one(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/clt.yaml").write_text("n_features: 3\n")
    with pytest.raises(UserError, match="built-in option model=clt"):
        compose_config([], tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        compose_config([], tmp_path / "nowhere")


@pytest.mark.parametrize("verb", [verb for verb, entry in VERBS.items() if entry.strict])
def test_verbs_that_take_their_settings_from_a_run_refuse_others(verb: str) -> None:
    with pytest.raises(UserError, match=rf"layerloom {verb} does not read model\.n_features"):
        compose_config(["model.n_features=4"], verb=verb)


def test_another_path_drops_the_labels_of_the_option(tmp_path: Path) -> None:
    kept = compose_config([])
    assert kept.subject.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (kept.subject.license, kept.text.license) == ("apache-2.0", "public-domain")
    assert compose_config(["preset=bench_smollm2_6l"]).subject == kept.subject
    other = compose_config(["subject.path=some/model", "text.path=./mine"])
    assert (other.subject.base_model, other.subject.model_name, other.subject.license) == ("", "", "")
    assert other.text.license == ""
    named = compose_config(["subject.path=x.gguf", "subject.license=apache-2.0", "subject.base_model=org/x"])
    assert (named.subject.license, named.subject.base_model) == ("apache-2.0", "org/x")
    assert compose_config(["subject=pythia_70m", "subject.path=./pythia"]).subject.license == ""
    assert compose_config(["subject=pythia_70m"]).subject.license == "apache-2.0"
    (tmp_path / "preset").mkdir()
    (tmp_path / "preset/mine.yaml").write_text("# @package _global_\nsubject:\n  path: a/b\n  license: apache-2.0\n")
    mine = compose_config(["preset=mine"], tmp_path).subject
    assert (mine.path, mine.license, mine.base_model) == ("a/b", "apache-2.0", "")


def test_options_of_an_object_store_have_keys_of_their_own() -> None:
    words = ["store.remote_options={endpoint: 'http://127.0.0.1:9000'}", "store.remote_options.region=eu-west-1"]
    config = compose_config(words, verb="train")
    assert config.store.remote_options == {"endpoint": "http://127.0.0.1:9000", "region": "eu-west-1"}
    with pytest.raises(UserError, match=r"there is no key or group store.remote_optoins.x"):
        compose_config(["store.remote_optoins.x=1"], verb="train")
