"""Networks of a run: the right weights at the right step and size, and what they say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn import functional as F

from cmt_mae.core.checkpoint import checkpoint_path, load_checkpoint
from cmt_mae.core.errors import InputError
from cmt_mae.method.frozen import FrozenNetworks, as_shares
from cmt_mae.method.masking import RULES
from cmt_mae.pretraining.assembly import make_teacher
from cmt_mae.tools.inspect.images import Album, centre_box, cut
from cmt_mae.tools.inspect.look import Inspector, draw_noise, every_rule, hidden, up_to
from cmt_mae.tools.inspect.networks import Networks, Run, open_backbone
from cmt_mae.tools.pretrain import pretrain
from tiny import tiny_run


def look_at(networks: Networks, photos: Path, count: int = 3) -> Inspector:
    """At some of the scenes."""
    channels = len(networks.stats[0])
    return Inspector(networks, cut(list(Album([str(photos)]).read(channels, count)), networks))


def test_each_step_has_the_weights_of_its_checkpoint(cmt_run: Path) -> None:
    run = Run(cmt_run)
    assert run.steps() == [2, 4, 6, 8, 10]
    for step in (4, 10):
        networks = run.at(step)
        state = load_checkpoint(checkpoint_path(cmt_run / "checkpoints", step))
        assert networks.learner is not None
        own = networks.learner.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in state["learner"].items())
        shown = state["momentum"] if step == 10 else {
            name.removeprefix("student."): tensor
            for name, tensor in state["learner"].items() if name.startswith("student.")
        }  # fmt: skip
        seen = networks.student.state_dict()
        assert seen.keys() == shown.keys()
        assert all(torch.equal(seen[name], tensor) for name, tensor in shown.items())
        assert networks.momentum == (step == 10)
        assert networks.weights.mask == (0.3 if step == 10 else 0.0)
    assert run.at().step == 10
    with pytest.raises(InputError, match=r"has no checkpoint of step 3 .there are: 2, 4, 6, 8, 10"):
        run.at(3)


def test_step_0_is_the_start_of_the_run(
    cmt_run: Path, photos: Path, teacher_file: Path, tmp_path: Path
) -> None:
    """A run that learns nothing still has at its end the weights that step 0 shows."""
    pretrain(tiny_run(tmp_path / "still", photos, teacher_file, optim__blr=0.0, epochs=0.2))
    end = load_checkpoint(checkpoint_path(tmp_path / "still" / "checkpoints", 1))["learner"]
    start = Run(cmt_run).at(0)
    assert start.learner is not None
    assert all(torch.equal(v, end[name]) for name, v in start.learner.state_dict().items())
    assert not torch.equal(
        start.student.blocks[0].attn.qkv.weight,
        Run(cmt_run).at(2).student.blocks[0].attn.qkv.weight,
    )


@pytest.mark.parametrize("layer", [1, 2])
def test_attention_of_a_layer_is_that_of_timm_itself(
    cmt_run: Path, photos: Path, layer: int
) -> None:
    """timm's own softmax, caught on its way, gives the same row of the class token."""
    look = look_at(Run(cmt_run).at(), photos)
    student = look.networks.student
    caught: list[torch.Tensor] = []
    attn = student.blocks[layer - 1].attn
    hook = attn.attn_drop.register_forward_pre_hook(lambda _, given: caught.append(given[0]))
    fused, attn.fused_attn = attn.fused_attn, False
    student.forward_features(look.images)
    hook.remove()
    attn.fused_attn = fused
    rows = caught[0][:, :, 0, 1:]
    torch.testing.assert_close(
        look.head_maps("student", layer)[0], rows / rows.sum(-1, keepdim=True)
    )
    with pytest.raises(InputError, match=r"layer 3 is not there: give 1\.\.2"):
        up_to(student, 3)


def test_maps_mix_by_alpha(cmt_run: Path, photos: Path) -> None:
    look = look_at(Run(cmt_run).at(), photos)
    for alpha, weight in ((None, 0.3), (0.75, 0.75)):
        maps = look.maps(alpha)
        by_hand = weight * maps["student"] + (1 - weight) * maps["teacher"]
        torch.testing.assert_close(maps["collab"], by_hand)
        torch.testing.assert_close(maps["collab"].sum(1), torch.ones(3))
    torch.testing.assert_close(look.scores(0.0), look.maps()["teacher"])
    torch.testing.assert_close(look.scores(1.0), look.maps()["student"])
    one, two = look.maps(head=0)["student"], look.maps(head=1)["student"]
    heads = look.head_maps("student")[0]
    torch.testing.assert_close(one, heads[:, 0])
    assert not torch.allclose(one, two)
    stage_one = look_at(Run(cmt_run).at(4), photos).maps()
    assert list(stage_one) == ["teacher", "student"]  # nothing is mixed yet


def test_predictions_give_the_loss_of_the_run(cmt_run: Path, photos: Path) -> None:
    """Targets and predictions at hidden patches, squared and averaged, are what the run's own code minimises."""
    networks = Run(cmt_run).at()
    look = look_at(networks, photos)
    config, learner = networks.config, networks.learner
    assert learner is not None
    guides = FrozenNetworks(
        config.mask, config.target, teacher=networks.teacher, grid=networks.grid, patch_size=8,
        mean=networks.stats[0], std=networks.stats[1],
    )  # fmt: skip
    guides.momentum = networks.student
    noise = draw_noise(config.mask.rule, networks.grid, 3, seed=4)
    mask, targets, _ = guides(
        look.images, noise, networks.n_mask, networks.weights, teacher_images=look.seen_by_teacher()
    )
    with torch.no_grad():
        _, logs = learner(look.images, mask, targets, 0.3)
    ours = hidden(look, config.mask.rule, seed=4)
    assert torch.equal(ours.mask, mask.mask)
    said = look.predictions(ours)
    assert set(said) == {"teacher", "momentum"}
    for name, target in look.targets().items():
        loss = (said[name] - target)[ours.mask].square().mean()
        torch.testing.assert_close(loss, logs[f"loss_{name}"])


def test_true_pixels_are_given_back_whole(
    mae_run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction that is right gives the image; a wrong one leaves the visible patches as they are."""
    look = look_at(Run(mae_run).at(), photos)
    mask = hidden(look, "random")
    image = look.inputs.images / 255
    made = look.reconstruction(mask)
    visible = ~mask.mask.reshape(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    visible = visible.expand_as(image)
    torch.testing.assert_close(made[visible], image[visible], atol=1e-5, rtol=0)
    assert (made - image)[~visible].abs().mean() > 0.01
    monkeypatch.setattr(look, "predictions", lambda _: look.targets())
    torch.testing.assert_close(look.reconstruction(mask), image, atol=1e-4, rtol=0)


def test_every_rule_hides_as_many(cmt_run: Path, photos: Path) -> None:
    look = look_at(Run(cmt_run).at(), photos)
    masks = every_rule(look)
    assert tuple(masks) == RULES
    assert all((mask.mask.sum(1) == 12).all() for mask in masks.values())
    high = look.scores().topk(12, dim=1).indices.sort(1).values
    assert torch.equal(masks["high"].ids_mask, high)
    assert (hidden(look, "high", n_mask=5).mask.sum(1) == 5).all()


def test_another_size_resamples_positions_and_brings_the_teacher(
    cmt_run: Path, photos: Path
) -> None:
    same, wide = Run(cmt_run).at(), Run(cmt_run, size=(32, 64)).at()
    assert wide.grid == (4, 8)
    look = look_at(wide, photos)
    assert look.images.shape == (3, 3, 32, 64)
    assert {one.shape for one in look.maps().values()} == {(3, 32)}
    assert look.predictions(hidden(look, "random"))["teacher"].shape == (3, 32, 24)
    table = wide.student.pos_embed
    assert torch.equal(table[:, 0], same.student.pos_embed[:, 0])
    rows = table[:, 1:].reshape(4, 8, 16).mean(1)  # the same rows, stretched
    torch.testing.assert_close(
        rows, same.student.pos_embed[:, 1:].reshape(4, 4, 16).mean(1), atol=0.02, rtol=0
    )


def test_teacher_of_another_grid(cmt_run: Path, photos: Path) -> None:
    """Heads on its own grid, its map on the student's, by areas."""
    networks = Run(cmt_run, teacher="embedded", grid_align="resample").at()
    look = look_at(networks, photos)
    heads, grid = look.head_maps("teacher")
    assert grid == (8, 8)
    by_area = heads.mean(1).reshape(3, 4, 2, 4, 2).mean((2, 4)).flatten(1)
    raw = look.raw("teacher")
    torch.testing.assert_close(
        raw / raw.sum(1, keepdim=True), by_area / by_area.sum(1, keepdim=True), atol=2e-3, rtol=0.02
    )
    assert set(look.targets()) == {"momentum"}  # the heads never saw this teacher


def test_without_checkpoints_the_backbone_files_are_looked_at(
    cmt_run: Path, photos: Path, tmp_path: Path
) -> None:
    import shutil

    copy = shutil.copytree(cmt_run, tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    networks, whole = Run(copy).at(), Run(cmt_run).at()
    assert networks.learner is None
    torch.testing.assert_close(
        look_at(networks, photos).maps()["collab"], look_at(whole, photos).maps()["collab"]
    )
    assert look_at(networks, photos).targets() == {}


def test_plain_backbones(cmt_run: Path, teacher_file: Path, photos: Path) -> None:
    alone = look_at(open_backbone(str(teacher_file)), photos)
    assert list(alone.maps()) == ["student"]
    both = look_at(open_backbone(str(teacher_file), teacher=str(teacher_file)), photos)
    maps = both.maps()
    torch.testing.assert_close(maps["teacher"], maps["student"], atol=1e-5, rtol=1e-4)
    momentum = open_backbone(str(cmt_run), key="momentum")
    torch.testing.assert_close(
        look_at(momentum, photos).maps()["student"],
        look_at(Run(cmt_run).at(), photos).maps()["student"],
    )


def test_refusals(cmt_run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no run directory"):
        Run(tmp_path)
    config = (cmt_run / "config.yaml").read_text()
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / "config.yaml").write_text(config.replace("teacher.safetensors", "gone.safetensors"))
    (moved / "backbone.safetensors").write_bytes((cmt_run / "backbone.safetensors").read_bytes())
    with pytest.raises(InputError, match=r"the teacher of .* cannot be loaded .*--teacher none"):
        Run(moved)
    assert Run(moved, teacher="none").teacher is None
    (moved / "run.json").write_text(json.dumps({"plan": {"steps": "many"}}))
    assert Run(moved, teacher="none").plan is None
    (moved / "config.yaml").write_text("runs: 3\n")
    with pytest.raises(InputError, match="is not that of a `cmt-mae pretrain` run"):
        Run(moved)


def test_target_source(cmt_run: Path) -> None:
    networks = Run(cmt_run).at()
    assert networks.target_source() == "collab"
    assert replace(networks, teacher=None).target_source() == "momentum"
    assert Run(cmt_run).at(4).target_source() == "teacher"
    assert replace(Run(cmt_run).at(4), same_teacher=False).target_source() == ""


def test_a_teacher_that_sees_whole_photos_is_read_at_the_crop(
    cmt_run: Path, photos: Path
) -> None:
    """A square photo's centre crop is the photo: torch's own antialiased resampling is what must come out."""
    run = Run(cmt_run)
    config = replace(run.config, teacher=replace(run.config.teacher, view="photo", view_size=96))
    teacher, _ = make_teacher(config.teacher, config.student.grid(), run.stats)
    networks = replace(run.at(10), config=config, teacher=teacher)
    look = look_at(networks, photos)
    assert look.inputs.photos is not None
    assert look.inputs.photos.shape == (3, 3, 96, 96)
    found = teacher.outputs(look.normalised(look.inputs.photos), "mean", class_token=False)

    def resampled(tokens: torch.Tensor) -> torch.Tensor:
        whole = tokens.transpose(1, 2).unflatten(2, teacher.own_grid)
        small = F.interpolate(whole, networks.grid, mode="bilinear", antialias=True)
        return small.flatten(2).transpose(1, 2)

    wanted = as_shares(resampled(found.attention[:, :, None]).squeeze(-1))
    torch.testing.assert_close(look.maps()["teacher"], wanted, atol=1e-5, rtol=1e-4)
    features, grid = look.features("teacher")
    assert grid == networks.grid
    torch.testing.assert_close(features, resampled(found.features), atol=1e-4, rtol=1e-3)
    assert set(look.targets()) == {"teacher", "momentum"}


def test_centred_targets_are_centred_by_the_checkpoints_means(cmt_run: Path, photos: Path) -> None:
    run = Run(cmt_run)
    plain = replace(run.config.target, norm="none")
    networks = replace(run.at(10), config=replace(run.config, target=plain))
    before = look_at(networks, photos).targets()
    assert set(before) == {"teacher", "momentum"}
    mean = torch.linspace(-1, 1, before["teacher"].shape[-1])
    centred = replace(
        networks, config=replace(run.config, target=replace(plain, centre=True)),
        target_means={"means": {"raw teacher": mean}, "counts": {"raw teacher": 9}},
    )  # fmt: skip
    after = look_at(centred, photos).targets()
    torch.testing.assert_close(after["teacher"], before["teacher"] - mean)
    torch.testing.assert_close(after["momentum"], before["momentum"])


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 8), st.integers(1, 8))
def test_box_of_the_centre_crop(height: int, width: int, rows: int, columns: int) -> None:
    """Inside the photo, in its middle, of the wanted shape, and touching two edges."""
    top, left, down, across = centre_box((height, width), (rows, columns))
    assert top >= -1e-12
    assert left >= -1e-12
    assert 2 * top + down == pytest.approx(1)
    assert 2 * left + across == pytest.approx(1)
    assert down * height * columns == pytest.approx(across * width * rows)
    assert max(down, across) == pytest.approx(1)


def test_pictures_of_a_run_in_training_are_made(cmt_run: Path) -> None:
    """At the switch of stages and at the end: one row an image, equal columns in both."""
    names = [f"attention_step_{step:08d}.png" for step in (5, 10)]
    assert [path.name for path in sorted((cmt_run / "pictures").glob("attention_step_*"))] == names
    with Image.open(cmt_run / "pictures" / names[1]) as picture:
        assert picture.width > 300
