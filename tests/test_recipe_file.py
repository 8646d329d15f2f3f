import dataclasses
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megdet.architecture import MODELS, FasterRcnn
from megdet.architecture_heads import BoxHead
from megdet.architecture_parts import Fpn
from megdet.errors import InputError
from megdet.recipe import Data, Recipe
from megdet.recipe_file import (
    dump_recipe,
    first_difference,
    load_recipe,
    packaged_recipes,
    parse_recipe,
    recipe_keys,
    recipe_name,
)
from megdet.recipe_help import recipe_parser
from recipe_refusals import refusal


def test_an_empty_recipe_is_the_papers_baseline():
    assert parse_recipe("", "r.yaml") == Recipe()
    assert parse_recipe("{}", "r.yaml") == Recipe()


def test_the_defaults_survive_yaml():
    text = dump_recipe(Recipe())
    assert parse_recipe(text, "r.yaml") == Recipe()
    assert set(yaml.safe_load(text)) == {f.name for f in dataclasses.fields(Recipe)}


TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20) | st.sampled_from(
    ["null", "true", "123", "1e5", "[1]", "{a: 1}", "# no", "a: b", "~", "", "-", "ü日本.jpg", "  spaces  ", "'"]
)
POSITIVE = st.floats(1e-6, 1e6)


# the dataclasses are made in the test: their type checks draw random numbers, which strategies must not
DATA = st.fixed_dictionaries(
    {
        "train_images": TEXT,
        "short_edges": st.lists(st.integers(1, 2000), min_size=1, max_size=4).map(tuple),
        "draw_demo": st.sampled_from(["", "easy", "hard", "tiny"]),
    }
)


@settings(max_examples=40)
@given(
    st.integers(0, 2**63 - 1),
    st.booleans(),
    DATA,
    st.sampled_from(["batch", "group", "none"]),
    POSITIVE,
    st.tuples(POSITIVE, POSITIVE, POSITIVE),
)
def test_any_recipe_survives_yaml(seed, keep_best, data, norm, beta, mean):
    recipe = Recipe(
        seed=seed,
        keep_best=keep_best,
        data=Data(**data),
        model=FasterRcnn(mean=mean, fpn=Fpn(norm=norm), box_head=BoxHead(smooth_l1_beta=beta)),
    )
    again = parse_recipe(dump_recipe(recipe), "r.yaml")
    assert again == recipe
    assert first_difference(again, recipe) == ""


@settings(max_examples=40)
@given(TEXT)
def test_a_text_override_is_taken_to_the_letter(text):
    assert parse_recipe("", "r.yaml", {"data.train_images": text}).data.train_images == text


@pytest.mark.parametrize("name", list(packaged_recipes()))
def test_every_packaged_recipe_loads(name):
    assert load_recipe(name) == load_recipe(name, {})


def test_overrides_come_on_top_of_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("model:\n  fpn:\n    channels: 64\nbatch_size: 32\n")
    recipe = load_recipe(
        str(file),
        {
            "model.fpn.channels": "128",
            "optimizer.base_lr": "1e-3",
            "data.short_edges": "[600, 800]",
            "keep_best": "false",
            "model.rpn.samples": 64,
        },
    )
    assert (recipe.model.fpn.channels, recipe.batch_size, recipe.optimizer.base_lr) == (128, 32, 1e-3)
    assert (recipe.data.short_edges, recipe.keep_best, recipe.model.rpn.samples) == ((600, 800), False, 64)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch_sise: 3", "r.yaml: unknown key 'batch_sise'; did you mean 'batch_size'?"),
        ("model: {fpn: {chanels: 3}}", "r.yaml: unknown key 'model.fpn.chanels'; did you mean 'model.fpn.channels'?"),
        (
            "model:\n  box_head:\n    sample: 3",
            "unknown key 'model.box_head.sample'; did you mean 'model.box_head.samples'?",
        ),
        ("backbone: {name: resnet50}", "r.yaml: unknown key 'backbone'; did you mean 'model.backbone'?"),
        ("data: {mean: [0, 0, 0]}", "r.yaml: unknown key 'data.mean'; did you mean 'model.mean'?"),
        (
            "model: {kind: faster_rcn}",
            f"model.kind is 'faster_rcn': choose one of {', '.join(MODELS)}; did you mean 'faster_rcnn'?",
        ),
        ("model: {kind: [1]}", "r.yaml: model.kind is [1]: choose one of faster_rcnn"),
        ("model: 3", "r.yaml: model is a section: write an indented kind: under it"),
        ("channels: 3", "r.yaml: unknown key 'channels'; did you mean 'model.fpn.channels'?"),
        ("1: 3", "r.yaml: unknown key '1'"),
        ('"a\\nb": 3', "r.yaml: unknown key 'a b'"),
        ("batch_size: 1.5", "r.yaml: batch_size: expected int, got float, here stands 1.5"),
        ("batch_size: true", "r.yaml: batch_size: expected int, got bool, here stands True"),
        ("batch_size: many", "r.yaml: batch_size: expected int, got str, here stands 'many'"),
        ("keep_best: 1", "r.yaml: keep_best: expected bool, got int, here stands 1"),
        ("data: {train_images: 3}", "r.yaml: data.train_images: expected str, got int, here stands 3"),
        ("model: {mean: [0, 0]}", "r.yaml: model.mean: expected array of length 3, got 2, here stands [0, 0]"),
        ("data: {short_edges: [a]}", "r.yaml: data.short_edges[0]: expected int, got str, here stands 'a'"),
        ("precision: half", "r.yaml: precision is 'half': choose one of float32, tf32, bfloat16, float64"),
        ("precision: float23", "choose one of float32, tf32, bfloat16, float64; did you mean 'float32'?"),
        ("precision: [float32]", "r.yaml: precision is ['float32']: choose one of float32, tf32"),
        ("data: {short_edges: 800}", "r.yaml: data.short_edges is 800: write a list, such as [64]"),
        ("data: {short_edges: {a: 1}}", "r.yaml: data.short_edges: expected array, got object, here stands {'a': 1}"),
        ("batch_size: 0xffffffffffffffff", "r.yaml: batch_size is 18446744073709551615: it must be below 2**31"),
        (f"batch_size: 0x{'f' * 100_000}", "r.yaml: batch_size is an integer of 400000 bits: it must be below 2**31"),
        ("batch_size: 1000000000\nbn_size: 7", "batch_size 1000000000: choose one of 1, 2, 4, 5, 8, 10, 16, 20, 25"),
        *(
            (
                f"data: {{canvas_edges: [{low}, {high}]}}",
                f"r.yaml: data.canvas_edges is ({low}, {high}): they must be positive lengths that rise",
            )
            for low, high in ((64, 32), (32, 32), (0, 32))
        ),
        ("batch_size:", "r.yaml: batch_size has no value: write one, or leave the key out for its default"),
        ("model: {fpn: }", "r.yaml: model.fpn has no value: write one, or leave the key out for its default"),
        ("model: {fpn: 3}", "r.yaml: model.fpn is a section: write an indented channels: under it"),
        ("[1, 2]", "r.yaml: a recipe is a mapping of keys to values, this is a list"),
        ("optimizer: {base_lr: .nan}", "r.yaml: optimizer.base_lr is nan: it must be finite"),
        ("optimizer: {base_lr: '.nan'}", "r.yaml: optimizer.base_lr: expected float, got str, here stands '.nan'"),
        ("optimizer: {base_lr: -.inf}", "r.yaml: optimizer.base_lr is -inf: it must be finite"),
        ("model: {mean: [0, .nan, 0]}", "r.yaml: model.mean is (0.0, nan, 0.0): it must be finite"),
    ],
)
def test_what_is_no_recipe_is_refused_with_its_place_and_the_nearest_name(text, message):
    assert message in refusal(text)


@pytest.mark.parametrize(
    ("kind", "section", "knob"),
    [("retinanet", "rpn", "samples"), ("retinanet", "rpn", "nms_iou"), ("faster_rcnn", "head", "focal_alpha")],
)
def test_a_knob_of_a_part_that_the_detector_does_not_have_is_refused_with_the_kinds_that_have_it(kind, section, knob):
    having = [name for name in MODELS if f"model.{section}.{knob}" in recipe_keys(name)]
    assert kind not in having
    end = f"model.kind {kind} has no such key; it belongs to {', '.join(having)}"
    message = refusal(f"model: {{kind: {kind}, {section}: {{{knob}: 1}}}}")
    assert message == f"r.yaml: unknown key 'model.{section}': {end}"
    message = refusal(f"model: {{kind: {kind}}}", **{f"model__{section}__{knob}": "1"})
    assert message == f"unknown option '--model.{section}.{knob}': {end}"


def test_a_knob_of_a_section_that_another_detector_has_more_of_is_refused_with_that_detector():
    message = refusal("model: {anchors: {scales_per_octave: 3}}")
    assert message.startswith(
        "r.yaml: unknown key 'model.anchors.scales_per_octave': model.kind faster_rcnn has no such"
    )
    assert "retinanet" in message


def test_text_that_is_no_yaml_is_refused_with_its_line():
    assert refusal("a: 1\nb: [").startswith("r.yaml: not valid YAML: ")
    assert "line 2" in refusal("a: 1\nb: [")


def test_a_section_written_as_a_number_is_refused_under_an_override_too():
    assert "model.fpn is a section" in refusal("model: {fpn: 3}", model__fpn__channels="64")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("optimzer: {base_lr: 1}", "unknown key 'optimzer'; did you mean 'optimizer'?"),
        ("model: {bakbone: {name: a}}", "unknown key 'model.bakbone'; did you mean 'model.backbone'?"),
        ("optimizer: {lr: 1}", "unknown key 'optimizer.lr'; did you mean 'optimizer.base_lr'?"),
    ],
)
def test_a_wrong_key_of_a_file_is_compared_with_those_of_its_section(text, hint):
    assert hint in refusal(text)


def test_an_override_may_fill_an_empty_section():
    assert parse_recipe("model: {fpn: }", "r.yaml", {"model.fpn.channels": "64"}).model.fpn.channels == 64


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.fpn.chanels", "3", "unknown option '--model.fpn.chanels'; did you mean 'model.fpn.channels'?"),
        ("optimizer.lr", "1", "unknown option '--optimizer.lr'; did you mean 'optimizer.base_lr'?"),
        ("optimiser.lr", "1", "unknown option '--optimiser.lr'; did you mean 'optimizer.base_lr'?"),
        ("lr", "1", "unknown option '--lr'; did you mean 'optimizer.base_lr'?"),
        ("schedule.lr", "1", "unknown option '--schedule.lr'; did you mean 'optimizer.base_lr'?"),
        ("optimizer.epochs", "1", "unknown option '--optimizer.epochs'; did you mean 'schedule.epochs'?"),
        ("nms", "1", "unknown option '--nms'; did you mean 'model.box_head.nms_iou'?"),
        *(
            (f"{section}.batch_size", "1", f"unknown option '--{section}.batch_size'; did you mean 'batch_size'?")
            for section in ("train", "model", "data", "optimizer", "schedule")
        ),
        ("eval.batch_size", "1", "unknown option '--eval.batch_size'; did you mean 'evaluation.batch_size'?"),
        ("train.size", "1", "unknown option '--train.size'; did you mean 'batch_size'?"),
        ("train.epochs", "1", "unknown option '--train.epochs'; did you mean 'schedule.epochs'?"),
        ("batch", "1", "unknown option '--batch'; did you mean 'batch_size'?"),
        ("backbone.name", "a", "unknown option '--backbone.name'; did you mean 'model.backbone.name'?"),
        ("model.fpn", "3", "'--model.fpn' is a section of the recipe: name a key in it, such as --model.fpn."),
        ("model.kind", "yolo", "r.yaml: model.kind is 'yolo': choose one of faster_rcnn"),
        ("batch_size", "many", "r.yaml: batch_size: expected int, got str, here stands 'many'"),
        ("batch_size", "", "batch_size: expected int, got str, here stands ''"),
        ("batch_size", "[", "option '--batch_size': not valid YAML"),
        ("optimizer.base_lr", "inf", "optimizer.base_lr"),
        ("schedule.epochs", '"\\ud83d"', "r.yaml: '\\ud83d' is not Unicode text"),
        ("optimizer.base_lr", ".nan", "optimizer.base_lr is nan: it must be finite"),
        ("batch_size", None, "batch_size has no value"),
    ],
)
def test_bad_overrides_are_refused(key, value, message):
    assert message in refusal("", **{key.replace(".", "__"): value})


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(InputError, match=r"no recipe 'demmo': .*; did you mean 'demo'\?"):
        load_recipe("demmo")


def test_a_wrong_path_of_a_recipe_is_answered_with_the_file_beside(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos.yaml").touch()
    with pytest.raises(InputError, match=r"photo.yaml: no such recipe file; did you mean '.*/photos\.yaml'\?"):
        load_recipe(str(tmp_path / "photo.yaml"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"photos: no such recipe file; did you mean 'photos\.yaml'\?"):
        load_recipe("photos")  # a folder of this name
    with pytest.raises(InputError, match=r"none/photos.yaml: no such recipe file$"):
        load_recipe("none/photos.yaml")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b"batch_size: \x00"])
def test_a_file_that_is_no_text_is_refused(content, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match=r"r\.yaml(: not valid YAML| is not UTF-8 text)") as caught:
        load_recipe(str(file))
    assert "\n" not in str(caught.value)


def test_a_recipe_is_called_after_its_file_or_its_run():
    assert recipe_name("demo") == "demo"
    assert recipe_name("some/where/mine.yaml") == "mine"
    assert recipe_name("runs/a/recipe.yaml") == "a"


def test_the_first_difference_is_told_with_both_values():
    other = dataclasses.replace(Recipe(), model=FasterRcnn(fpn=Fpn(channels=64)), seed=0)
    assert first_difference(Recipe(), other) == "model.fpn.channels: 256 here, 64 there"


def test_every_key_has_a_help_text_and_is_an_option():
    text = recipe_parser("megdet").format_help()
    for key in recipe_keys():
        assert f"--{key}" in text
    assert text.count("images per optimizer step, over all devices") == 1


def test_derived_numbers_follow_from_the_fields():
    recipe = Recipe(batch_size=64, bn_size=16)
    assert (recipe.images_per_group, recipe.groups_per_step) == (16, 4)
    frozen = Recipe(batch_size=64, bn_size=0, group_size=2)
    assert (frozen.images_per_group, frozen.groups_per_step) == (2, 32)


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(InputError, match="key 'seed' is given twice"):
        parse_recipe("seed: 1\nbatch_size: 16\nseed: 2", "r.yaml")


def test_a_dotted_key_in_yaml_is_refused_with_how_to_write_it():
    with pytest.raises(InputError, match=r"written nested: model: \{fpn: \{channels: \.\.\.\}\}"):
        parse_recipe("model.fpn.channels: 64", "r.yaml")


def test_a_run_folder_named_as_a_recipe_is_refused_with_its_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("seed: 1")
    with pytest.raises(InputError, match=r"is a run folder: its recipe is .*recipe\.yaml"):
        load_recipe(str(tmp_path))


def test_where_the_data_lie_and_how_often_to_save_does_not_make_another_run():
    other = replace(
        Recipe(), trackers=("tensorboard",), keep_checkpoints=9, data=replace(Data(), train_images="elsewhere")
    )
    assert first_difference(Recipe(), other) == ""
    assert first_difference(Recipe(), replace(other, seed=1)) == "seed: 0 here, 1 there"


def test_the_key_for_tensorboard_of_earlier_run_folders_names_a_tracker():
    assert parse_recipe("tensorboard: true", "r.yaml").trackers == ("tensorboard",)
    assert parse_recipe("tensorboard: false", "r.yaml").trackers == ()
    with pytest.raises(InputError, match="unknown key 'tensorboard'"):
        parse_recipe("tensorboard: true\ntrackers: [wandb]", "r.yaml")


def test_a_tracker_that_is_not_known_or_named_twice_is_refused():
    with pytest.raises(InputError, match=r"trackers has 'wandb2': .*; did you mean 'wandb'\?"):
        parse_recipe("trackers: [wandb2]", "r.yaml")
    with pytest.raises(InputError, match=r"trackers has 'mlflow': name each of .* at most once"):
        parse_recipe("trackers: [mlflow, mlflow]", "r.yaml")
