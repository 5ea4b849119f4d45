"""Foreign masks and sparse checkpoints become runs; hostile files become one sentence."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import nmsparse_deploy as nms
from nmsparse_deploy import models
from nmsparse_deploy.errors import CheckFailed, NmsparseError, UsageError
from nmsparse_deploy.find.import_masks import import_result, mask_of
from nmsparse_deploy.masks import Mask, MaskSet, mask_follows, project
from nmsparse_deploy.measure.report.build import build_report
from nmsparse_deploy.pattern import TWO_FOUR, NMPattern
from nmsparse_deploy.runs.load import load_dense
from nmsparse_deploy.runs.run_dir import RunDir
from tests.fixtures import pico


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return pico.save(pico.llama(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def truth():
    """A random 2:4 mask for every linear layer of the blocks."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: project(torch.rand(p.shape, generator=generator), TWO_FOUR)
        for name, p in pico.llama().named_parameters()
        if "proj" in name
    }


def pack(mask):
    return np.packbits(mask.numpy())


def save_masks(folder, truth, kind):
    """The same masks in each of the forms in which others publish them."""
    path = folder / f"masks.{kind}"
    if kind == "npz":
        np.savez_compressed(path, **{f"{name}.mask": pack(mask) for name, mask in truth.items()})
    elif kind == "pt":
        torch.save(
            {f"{name.removesuffix('.weight')}.mask": mask.float() for name, mask in truth.items()},
            path,
        )
    elif kind == "own":
        path = folder / "own.safetensors"
        MaskSet({name: Mask.pack(mask, 1, TWO_FOUR, "") for name, mask in truth.items()}).save(path)
    elif kind == "safetensors":
        save_file({name: mask.to(torch.uint8) for name, mask in truth.items()}, path)
    elif (
        kind == "pth"
    ):  # as ModelOpt saves a model that it has not exported: dense weights beside their masks
        state = {
            f"{name.removesuffix('.weight')}._weight_mask": mask for name, mask in truth.items()
        }
        state |= {name: torch.randn(mask.shape) for name, mask in truth.items()}
        torch.save(
            {"modelopt_state": {"modelopt_version": "0.47.0"}, "model_state_dict": state}, path
        )
    else:
        path = folder / "masks"
        path.mkdir()
        for name, mask in truth.items():
            torch.save(mask, path / f"{name.removesuffix('.weight')}.pt")
    return path


@pytest.mark.parametrize("kind", ["npz", "pt", "pth", "safetensors", "own", "folder"])
def test_every_form_of_a_mask_gives_the_same_run(dense, truth, tmp_path, kind):
    done = import_result(str(dense), save_masks(tmp_path, truth, kind), out=tmp_path / "run")
    stored = MaskSet.load(done.run / "masks.safetensors").masks
    assert stored.keys() == truth.keys()
    assert all(torch.equal(stored[name].unpack(), mask) for name, mask in truth.items())
    before, after = (
        dict(pico.llama().named_parameters()),
        dict(models.load(str(done.run / "model")).module.named_parameters()),
    )
    for name, mask in truth.items():
        assert torch.equal(after[name], torch.where(mask, before[name], torch.zeros(())))
    assert (done.layers, done.ambiguous, done.partial) == (14, 0, 0)


def test_an_imported_run_is_what_the_other_verbs_take(dense, truth, tmp_path):
    run = import_result(str(dense), save_masks(tmp_path, truth, "npz"), out=tmp_path / "run").run
    assert all(report.ok for report in nms.verify(RunDir.open(run.path)))
    assert load_dense(run).module is not None
    assert build_report(run).is_file()


def sparse_copy(dense, truth, folder, change=lambda name, weight: weight):
    module = models.load(str(dense)).module
    with torch.no_grad():
        for name, mask in truth.items():
            weight = module.get_parameter(name)
            weight.copy_(torch.where(mask, change(name, weight), torch.zeros(())))
    return pico.save(module, folder)


def test_a_sparse_checkpoint_beside_its_dense_twin_gives_the_mask_and_keeps_its_weights(
    dense, truth, tmp_path
):
    sparse = sparse_copy(dense, truth, tmp_path / "sparse", lambda name, weight: weight * 1.5)
    done = import_result(str(dense), sparse=str(sparse), out=tmp_path / "run")
    stored = MaskSet.load(done.run / "masks.safetensors").masks
    assert all(torch.equal(stored[name].unpack(), mask) for name, mask in truth.items())
    after = dict(models.load(str(done.run / "model")).module.named_parameters())
    assert all(
        torch.equal(after[n], p) for n, p in models.load(str(sparse)).module.named_parameters()
    )
    assert load_dense(done.run).module is not None


def test_a_sparse_checkpoint_alone_has_no_dense_twin(dense, truth, tmp_path):
    run = import_result(
        str(sparse_copy(dense, truth, tmp_path / "sparse")), out=tmp_path / "run"
    ).run
    assert all(report.ok for report in nms.verify(run))
    with pytest.raises(NmsparseError, match="dense twin is not known"):
        load_dense(run)


def test_a_layer_that_stayed_dense_is_not_a_mask_and_its_fusion_group_is_told(
    dense, truth, tmp_path
):
    some = {name: mask for name, mask in truth.items() if "q_proj" not in name}
    done = import_result(
        str(dense), sparse=str(sparse_copy(dense, some, tmp_path / "sparse")), out=tmp_path / "run"
    )
    assert (done.layers, done.partial) == (12, 2)
    assert "only partly sparse" in done.summary()


weights = st.lists(st.sampled_from([0.0, 1.0, -2.0, 3.0]), min_size=8, max_size=8)


@given(weights, st.lists(st.floats(0, 1), min_size=8, max_size=8))
@settings(max_examples=200, deadline=None)
def test_a_mask_read_from_zeros_is_the_true_one_unless_it_says_that_it_guessed(values, scores):
    dense = torch.tensor([values])
    mask = project(torch.tensor([scores]), TWO_FOUR)
    sparse = torch.where(mask, dense, torch.zeros(()))
    found = mask_of(sparse, dense, TWO_FOUR, 1)
    if not sparse.any():
        assert found is None
        return
    guess, ambiguous = found
    assert mask_follows(guess, TWO_FOUR)
    assert torch.equal(torch.where(guess, dense, torch.zeros(())), sparse) or ambiguous
    pairs = zip(guess.view(-1, 4), mask.view(-1, 4))
    assert sum(not torch.equal(a, b) for a, b in pairs) <= ambiguous


def test_ambiguous_groups_are_counted_and_filled_from_the_lowest_index():
    dense = torch.tensor([[0.0, 0.0, 0.0, 5.0, 1.0, 2.0, 0.0, 3.0]])
    sparse = torch.tensor([[0.0, 0.0, 0.0, 5.0, 1.0, 0.0, 0.0, 0.0]])
    mask, ambiguous = mask_of(sparse, dense, TWO_FOUR, 1)
    assert mask.tolist() == [[True, False, False, True, True, False, True, False]]
    assert ambiguous == 1  # in the second group only one dense zero fits
    alone, guessed = mask_of(sparse, None, TWO_FOUR, 1)
    assert alone.tolist() == [[True, False, False, True, True, True, False, False]] and guessed == 2


def test_a_dense_weight_has_no_mask():
    assert mask_of(torch.ones(2, 8), None, TWO_FOUR, 1) is None
    assert mask_of(torch.zeros(2, 8), None, TWO_FOUR, 1) is None
    assert mask_of(torch.eye(6), None, TWO_FOUR, 1) is None
    assert mask_of(torch.tensor([[1.0, 0, 0, 0, 0, 0, 1, 0]]), None, NMPattern(2, 8), 1)[1] == 0


class Trap:
    def __reduce__(self):
        return (print, ("code from a stranger ran",))


def hostile(folder, truth):
    name, mask = next(iter(truth.items()))
    good = io.BytesIO()
    np.savez_compressed(good, **{name: pack(mask)})
    files = {
        "truncated.npz": good.getvalue()[:-40],
        "text.npz": b"not an archive",
        "empty.pt": b"",
        "text.pt": b"not a pickle",
        "pickle.pt": pickle.dumps({name: Trap()}),
    }
    for file, data in files.items():
        (folder / file).write_bytes(data)
    np.savez(folder / "object.npz", **{name: np.array([Trap()], dtype=object)})
    np.savez(folder / "bomb.npz", **{name: pack(mask)})
    np.savez(folder / "short.npz", **{name: pack(mask)[:-1]})
    np.savez(folder / "values.npz", **{name: mask.numpy() * 2.0})
    np.savez(folder / "name.npz", **{"model.layers.9.self_attn.q_proj.weight": pack(mask)})
    np.savez(folder / "none.npz")
    np.savez(folder / "other.npz", **{name: pack(torch.ones_like(mask))})
    torch.save(mask, folder / "bare.pt")
    (folder / "masks.txt").write_text("?")
    return folder


CASES = {
    "truncated.npz": "damaged or truncated",
    "text.npz": "damaged or truncated",
    "object.npz": "damaged or truncated",
    "short.npz": "has shape",
    "values.npz": "other values than 0 and 1",
    "name.npz": "no prunable parameter",
    "none.npz": "holds no masks",
    "empty.pt": "damaged|holds",
    "text.pt": "damaged|holds more",
    "pickle.pt": "never run",
    "bare.pt": "no table of tensors",
    "masks.txt": "no kind of mask file",
    "gone.npz": "There is no mask file",
}


@pytest.mark.parametrize(("file", "says"), CASES.items())
def test_hostile_files_are_one_sentence_and_leave_nothing(
    dense, truth, tmp_path, capfd, file, says
):
    with pytest.raises(UsageError, match=says) as caught:
        import_result(str(dense), hostile(tmp_path, truth) / file, out=tmp_path / "run")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "run").exists()
    assert "stranger" not in capfd.readouterr().out


def test_an_archive_that_unpacks_to_more_than_any_model_is_refused_unread(
    dense, truth, tmp_path, monkeypatch
):
    bomb = hostile(tmp_path, truth) / "bomb.npz"
    monkeypatch.setattr("nmsparse_deploy.find.mask_files.MAX_BYTES", 100)
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(UsageError, match="claims to unpack"):
        import_result(str(dense), bomb, out=tmp_path / "run")


def test_a_mask_of_another_pattern_is_a_failed_check(dense, truth, tmp_path):
    with pytest.raises(CheckFailed, match="is not 2:4"):
        import_result(str(dense), hostile(tmp_path, truth) / "other.npz", out=tmp_path / "run")
    with pytest.raises(CheckFailed, match="is not 1:4"):
        import_result(
            str(dense), save_masks(tmp_path, truth, "npz"), pattern="1:4", out=tmp_path / "run"
        )


def test_dense_and_foreign_checkpoints_are_refused(dense, tmp_path):
    with pytest.raises(CheckFailed, match=r"No weight of .* is 2:4 sparse"):
        import_result(str(dense), sparse=str(dense), out=tmp_path / "run")
    other = pico.save(pico.llama(intermediate_size=64), tmp_path / "other")
    with pytest.raises(UsageError, match="another model"):
        import_result(str(dense), sparse=str(other), out=tmp_path / "run")
    with pytest.raises(UsageError, match="not from both"):
        import_result(str(dense), tmp_path / "m.npz", str(other))


def test_a_finished_run_is_never_replaced_and_an_unfinished_one_is(dense, truth, tmp_path):
    masks = save_masks(tmp_path, truth, "npz")
    run = import_result(str(dense), masks, out=tmp_path / "run").run
    with pytest.raises(UsageError, match="exists already"):
        import_result(str(dense), masks, out=tmp_path / "run")
    manifest = run.read_json("manifest.json")
    run.write_json("manifest.json", manifest | {"stages": {}})
    assert import_result(str(dense), masks, out=tmp_path / "run").layers == 14
