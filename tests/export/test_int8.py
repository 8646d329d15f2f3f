"""8-bit integers in a small graph by hand, whose numbers are known; real detectors are other tests'."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from exported_file import description, small_recipe
from megdet.export.calibration import training_inputs
from megdet.export.int8 import write_int8
from megdet.exported.description import KEY, Description
from megdet.recipe import Recipe
from small_runs import small_recipe as recipe_of_run
from small_runs import train_set, write_small_sets

METHODS = ("minmax", "percentile", "entropy")


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(0, 0.3, shape).astype(np.float32)


def write_graph(path):
    """Pixels to scores: a convolution, a ReLU, the sum with another one's, and a convolution that predicts."""
    first, second, last = weights(6, 3, 3, 3) / 50, weights(6, 6, 1, 1), weights(2, 6, 1, 1)
    constants = [
        numpy_helper.from_array(first, "detector.body.one.weight"),
        numpy_helper.from_array(second, "detector.body.two.weight"),
        numpy_helper.from_array(last, "detector.rpn.objectness.weight"),
        numpy_helper.from_array(np.float32(0.25), "shift"),
        numpy_helper.from_array(np.int64([0]), "zero"),
    ]
    nodes = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Conv", ["floats", "detector.body.one.weight"], ["a"], "one", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], "relu_1"),
        helper.make_node("Conv", ["b", "detector.body.two.weight"], ["c"], "two"),
        helper.make_node("Add", ["c", "b"], ["d"], "joined"),
        helper.make_node("Relu", ["d"], ["e"], "relu_2"),
        helper.make_node("Conv", ["e", "detector.rpn.objectness.weight"], ["f"], "last"),
        helper.make_node("Add", ["f", "shift"], ["scores"], "shifted"),
        helper.make_node("Gather", ["sizes", "zero"], ["first_size"], "of_first", axis=0),
    ]
    inputs = [
        helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["images", 3, "height", "width"]),
        helper.make_tensor_value_info("sizes", TensorProto.INT64, ["images", 2]),
    ]
    outputs = [
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["images", 2, "height", "width"]),
        helper.make_tensor_value_info("first_size", TensorProto.INT64, [1, 2]),
    ]
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    model.metadata_props.add(key=KEY, value=description(small_recipe()).text())
    onnx.save(model, str(path))
    return path


def images(*edges: int):
    random = np.random.default_rng(0)
    return [
        (random.integers(0, 256, (1, 3, edge, edge + 8), dtype=np.uint8), np.array([[edge, edge + 8]]))
        for edge in edges
    ]


def scores(path, inputs):
    session = onnxruntime.InferenceSession(str(path))
    return [session.run(None, {"pixels": pixels, "sizes": sizes})[0] for pixels, sizes in inputs]


@pytest.mark.parametrize("method", METHODS)
def test_a_file_of_8_bit_integers_finds_nearly_the_same_in_images_of_any_size(tmp_path, method, capsys):
    source, file = write_graph(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    seen = images(16, 24, 40)
    made = write_int8(source, file, seen, method, {"rpn.objectness"})
    assert (made.method, made.images, made.layers, made.float_layers, made.timed) == (method, 3, 2, 1, 3)
    for ours, theirs in zip(scores(source, seen), scores(file, seen), strict=True):
        assert 0 < np.abs(ours - theirs).mean() < 0.02 * np.abs(ours).max()
    assert capsys.readouterr().out == ""
    assert made.before.bytes == source.stat().st_size
    assert made.before.seconds > 0


def test_layers_and_what_is_between_them_have_8_bits_and_what_predicts_has_floats(tmp_path):
    write_int8(write_graph(tmp_path / "a.onnx"), tmp_path / "b.onnx", images(16), "minmax", {"rpn.objectness"})
    made = onnx.load(tmp_path / "b.onnx")
    kinds = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    assert kinds["detector.rpn.objectness.weight"] == TensorProto.FLOAT
    for layer in ("one", "two"):
        assert kinds[f"detector.body.{layer}.weight_quantized"] == TensorProto.INT8
        assert f"detector.body.{layer}.weight" not in kinds
    scales = next(own for own in made.graph.initializer if own.name == "detector.body.two.weight_scale")
    wanted = np.abs(weights(6, 6, 1, 1)).max((1, 2, 3)) / 64  # one a channel; of 7 bits, see below
    np.testing.assert_allclose(numpy_helper.to_array(scales), wanted, rtol=0.01)
    given = {name: node for node in made.graph.node for name in node.output}
    by_name = {node.name: node for node in made.graph.node}
    assert all(given[name].op_type == "DequantizeLinear" for name in by_name["joined"].input)
    assert given[by_name["shifted"].input[0]].name == "last"  # no integers before what reads it


def test_no_pair_of_products_overflows_16_bits_as_processors_without_vnni_add_them(tmp_path):
    write_int8(write_graph(tmp_path / "a.onnx"), tmp_path / "b.onnx", images(16), "minmax", ())
    for tensor in onnx.load(tmp_path / "b.onnx").graph.initializer:
        if tensor.name.endswith("weight_quantized"):
            assert 2 * 255 * np.abs(numpy_helper.to_array(tensor).astype(int)).max() < 1 << 15


def test_the_description_goes_along(tmp_path):
    source, file = write_graph(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    write_int8(source, file, images(16), "minmax", ())
    assert Description.read(onnxruntime.InferenceSession(str(file)).get_modelmeta().custom_metadata_map, "b.onnx")


@pytest.fixture
def recipe(tmp_path) -> Recipe:
    return recipe_of_run(write_small_sets(tmp_path / "data"))


def test_images_to_calibrate_on_are_those_of_the_training_set_at_the_size_of_the_evaluation(recipe):
    inputs = training_inputs(recipe, 4)
    known = {tuple(size) for size in train_set(recipe).sizes.tolist()}
    assert len(inputs) == 4
    assert len(known) > 4
    for pixels, sizes in inputs:
        assert pixels.shape[0] == len(sizes) == 1
        assert min(sizes[0]) == recipe.data.short_edges[-1] or max(sizes[0]) == recipe.data.max_long_edge
        assert all(edge % recipe.data.canvas_multiple == 0 for edge in pixels.shape[2:])
        assert pixels.any()
    assert len(training_inputs(recipe, 99)) == len(train_set(recipe))
