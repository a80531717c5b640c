import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import zoom
from toy_pairs import MODEL, rows_of, toy_batches, toy_network, toy_pairs

from l2l_core.data.pairs import Batch
from l2l_core.errors import ArtifactError
from l2l_core.model.segmenter import Output, Segmenter, has_intact_weights


@pytest.fixture
def pairs(tmp_path):
    return toy_pairs(tmp_path / "images")[0]


@pytest.fixture
def batch(pairs) -> Batch:
    return toy_batches(pairs)(rows_of(0, 1, 2))


def ask(network: Segmenter, batch: Batch) -> Output:
    with torch.no_grad():
        return network.eval()(batch, network.tokenize(batch))


def stirred(network: Segmenter) -> Segmenter:
    """Randomize weights beyond the encoders, including those initialized to zero, so that every path is active."""
    torch.manual_seed(3)
    for name, parameter in network.named_parameters():
        if "encoder." not in name and (parameter.ndim > 1 or not parameter.any()):
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def test_returns_one_mask_per_pair_at_the_image_size(pairs, batch):
    output = ask(toy_network(pairs), batch)
    assert output.mask_logits.shape == (3, 1, 32, 32)
    assert output.mask_logits.dtype == torch.float32
    assert output.refined_logits.shape[:2] == (3, 1)


def test_a_new_network_depends_only_on_its_seed(pairs):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = toy_network(pairs, seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random state does not change
    torch.rand(5)
    again, other = toy_network(pairs, seed=4).state_dict(), toy_network(pairs, seed=5).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_saving_and_loading_preserves_outputs_and_bytes(pairs, batch, tmp_path):
    network = stirred(toy_network(pairs))
    network.save(tmp_path / "a")
    again = Segmenter.load(tmp_path / "a")
    assert again.params == MODEL
    first, second = ask(network, batch), ask(again, batch)
    assert torch.equal(first.mask_logits, second.mask_logits)
    assert torch.equal(first.refined_logits, second.refined_logits)
    again.save(tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_saves_equal_networks_as_equal_bytes(pairs, tmp_path):
    for name in ("a", "b"):
        toy_network(pairs).save(tmp_path / name)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_loads_the_encoder_architecture_from_the_saved_model(pairs, batch, tmp_path, monkeypatch):
    """This also holds if the library's small encoders have changed since."""
    network = toy_network(pairs)
    network.save(tmp_path / "run")
    monkeypatch.setattr("l2l_core.model.encoders.tiny_image_config", None)
    monkeypatch.setattr("l2l_core.model.encoders.tiny_text_config", None)
    assert torch.equal(ask(Segmenter.load(tmp_path / "run"), batch).mask_logits, ask(network, batch).mask_logits)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", None),
        ("config.json", b"{"),
        ("config.json", b'{"dim": 16}'),
        ("model.safetensors", None),
        ("model.safetensors", b"not tensors"),
        ("tokenizer/tokenizer.json", b"{"),
        ("image_encoder/config.json", None),
        ("text_encoder/config.json", b"[]"),
    ],
)
def test_refuses_an_incomplete_or_broken_model_folder_in_one_line(pairs, tmp_path, file, content):
    toy_network(pairs).save(tmp_path / "run")
    if content is None:
        (tmp_path / "run" / file).unlink()
    else:
        (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(ArtifactError, match="run: no usable model") as caught:
        Segmenter.load(tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("found", [None, 2, "3"])
def test_refuses_a_model_of_another_format(pairs, tmp_path, found):
    """The same weights would compute something else. Models of the first versions store no format."""
    toy_network(pairs).save(tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config.pop("format") == 3
    (tmp_path / "run/config.json").write_text(json.dumps(config | ({} if found is None else {"format": found})))
    with pytest.raises(ArtifactError, match=rf"format: got {found!r}, expected 3; train it again"):
        Segmenter.load(tmp_path / "run")


def test_an_untrained_network_returns_its_proposal(pairs):
    """With and without a prior, the mask is the proposal resized by SciPy's linear interpolation."""
    network, batches = toy_network(pairs).eval(), toy_batches(pairs)
    for hidden in (False, True):
        batch = batches(np.arange(len(pairs)), None, np.full(len(pairs), hidden))
        with torch.no_grad():
            output = network(batch, network.tokenize(batch))
        # 16 x 16 cells, the head's 16 x 16 and the image's 32 x 32 pixels: one step of linear interpolation.
        trust = 1.0 if hidden else 2.5  # the score is 1 with a prior and 0 without
        logits = trust * batch.proposal.logit().numpy()
        expected = [zoom(one[0], 2, order=1, mode="nearest", grid_mode=True) for one in logits]
        torch.testing.assert_close(output.mask_logits[:, 0], torch.from_numpy(np.stack(expected)), atol=1e-4, rtol=1e-4)
        assert bool((output.mask_logits > 0).any()) != hidden


def test_refuses_weights_of_another_network(pairs, tmp_path):
    toy_network(pairs).save(tmp_path / "a")
    Segmenter.create(MODEL.model_copy(update={"dim": 8}), pairs.sentence, 0).save(tmp_path / "b")
    (tmp_path / "b/model.safetensors").replace(tmp_path / "a/model.safetensors")
    with pytest.raises(ArtifactError, match="no usable model"):
        Segmenter.load(tmp_path / "a")


def test_every_part_of_a_pair_affects_the_mask(pairs, batch):
    network = stirred(toy_network(pairs))
    before = ask(network, batch).mask_logits
    changes = {
        "image": 255 - batch.image,
        "sentence": [batch.sentence[1], *batch.sentence[1:]],
        "prior_text": [batch.prior_text[1], *batch.prior_text[1:]],
        "box": batch.box * 0.5,
        "has_box": ~batch.has_box,
        "proposal": 1 - batch.proposal,
        "proposal_score": batch.proposal_score * 0.3,
    }
    for name, value in changes.items():
        after = ask(network, replace(batch, **{name: value})).mask_logits
        assert not torch.allclose(after[0], before[0], atol=1e-4), name


def test_mask_does_not_depend_on_the_rest_of_the_batch(pairs, batch):
    network = stirred(toy_network(pairs))
    together = ask(network, batch).mask_logits
    backwards = ask(network, toy_batches(pairs)(rows_of(3, 2, 1, 0))).mask_logits
    alone = ask(network, toy_batches(pairs)(rows_of(1))).mask_logits
    scale = together.abs().max().item()
    torch.testing.assert_close(backwards[2], together[1], rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(alone[0], together[1], rtol=1e-4, atol=1e-5 * scale)


def test_truncates_long_and_unknown_sentences(pairs, batch):
    network = toy_network(pairs)
    long = replace(batch, sentence=["zebra " * 200, "", "left " * 200], prior_text=["square " * 200, "", ""])
    tokens = network.tokenize(long)
    assert all(tensor.shape == (3, MODEL.max_text_tokens) for tensor in tokens.values())
    assert tokens["token_type_ids"][0].any()  # some tokens remain for the prior
    assert ask(network, long).mask_logits.isfinite().all()


def test_each_weight_is_in_one_group_and_only_matrices_decay(pairs):
    network = toy_network(pairs)
    groups = network.parameter_groups(lr=0.5, encoder_lr_scale=0.1, weight_decay=0.2)
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in network.parameters())
    for group in groups:
        assert group["lr"] == 0.5  # tiny encoders are not pretrained: full learning rate
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.2 if parameter.ndim > 1 else 0.0)


@pytest.mark.parametrize("slow", ["image_encoder", "text_encoder"])
def test_pretrained_encoders_use_a_lower_learning_rate(pairs, slow):
    network = toy_network(pairs)
    network.params = MODEL.model_copy(update={slow: "some/hub-id"})
    rates = {
        id(parameter): group["lr"]
        for group in network.parameter_groups(lr=0.5, encoder_lr_scale=0.1, weight_decay=0.2)
        for parameter in group["params"]
    }
    for name, parameter in network.named_parameters():
        assert rates[id(parameter)] == pytest.approx(0.05 if name.startswith(slow) else 0.5), name


def test_refuses_weights_with_a_changed_bit(pairs, tmp_path):
    """safetensors alone reads other numbers."""
    toy_network(pairs).save(tmp_path / "run")
    weights = tmp_path / "run/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    assert has_intact_weights(tmp_path / "run")
    weights.write_bytes(content)
    assert not has_intact_weights(tmp_path / "run")
    with pytest.raises(ArtifactError, match=r"run: no usable model: model\.safetensors differs from its digest.*repro"):
        Segmenter.load(tmp_path / "run")


def test_loads_a_model_of_an_earlier_version_without_a_digest(pairs, tmp_path):
    toy_network(pairs).save(tmp_path / "run")
    path = tmp_path / "run/config.json"
    config = json.loads(path.read_text())
    assert config.pop("sha256") == hashlib.sha256((tmp_path / "run/model.safetensors").read_bytes()).hexdigest()
    path.write_text(json.dumps(config))
    assert Segmenter.load(tmp_path / "run").params == MODEL
    assert has_intact_weights(tmp_path / "run")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"[]"),
        ("config.json", b"null"),
        ("config.json", b'{"format": 3, "passes": "many"}'),
        ("config.json", b"[" * 100_000),
        ("tokenizer/tokenizer.json", b"[]"),
        ("tokenizer/tokenizer.json", b"{}"),
        ("tokenizer/tokenizer_config.json", b"[]"),
        ("tokenizer/tokenizer_config.json", b'{"model_max_length": "x", "tokenizer_class": 7}'),
        ("image_encoder/config.json", b'{"model_type": []}'),
        ("image_encoder/config.json", b'{"model_type": "resnet", "depths": "x"}'),
        ("text_encoder/config.json", b'{"model_type": "bert", "hidden_size": -1}'),
    ],
)
def test_refuses_mutated_configurations_in_one_line(pairs, tmp_path, file, content):
    """transformers and tokenizers raise a dozen types of exceptions for them."""
    toy_network(pairs).save(tmp_path / "run")
    (tmp_path / "run" / file).write_bytes(content)
    with pytest.raises(ArtifactError, match="run: no usable model") as caught:
        Segmenter.load(tmp_path / "run")
    assert "\n" not in str(caught.value)
