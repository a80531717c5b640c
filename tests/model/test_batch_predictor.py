from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_pairs import SIZE_PX, TRAIN, rows_of, stirred_network, toy_batches, toy_network, toy_pairs, toy_params

from l2l_core.core.masks import decode_rle
from l2l_core.data.augment import mirror_sentence
from l2l_core.data.pairs import Batch, Pairs
from l2l_core.errors import ArtifactError
from l2l_core.model.batch_predictor import BatchPredictor, at_size, batched_rows, chunks_of
from l2l_core.model.segmenter import Output, Pyramid, Segmenter

ROOT = Path(__file__).resolve().parents[2]
PROPOSALS = toy_params().proposals
FP32, BF16 = TRAIN, TRAIN.model_copy(update={"precision": "bf16"})


@pytest.fixture
def pairs(tmp_path):
    return toy_pairs(tmp_path / "images", 5)[0]


class Stub(nn.Module):
    """Replaces the network. Its logits are the image's first channel, an optional ramp from left to right, and a
    function of sentence and prior. Records its inputs."""

    def __init__(self, ramp: float = 0.0, told=lambda batch, row: 0.0) -> None:
        super().__init__()
        self.ramp, self.told, self.num_passes = ramp, told, 1
        self.asked: list[Batch] = []
        self.encoded: list[Tensor] = []

    predict_logits = Segmenter.predict_logits

    def tokenize(self, batch: Batch) -> dict[str, Tensor]:
        return {}

    def encode_image(self, image: Tensor) -> Pyramid:
        self.encoded.append(image)
        return Pyramid([image.float()], image.float(), image.float())

    def decode(self, pyramid: Pyramid, batch: Batch, tokens: dict[str, Tensor]) -> Output:
        self.asked.append(batch)
        logits = pyramid.levels[0][:, :1] / 64 - 2 + self.ramp * torch.linspace(-1, 1, batch.image.shape[-1])
        told = torch.tensor([self.told(batch, row) for row in range(len(batch.sentence))])
        return Output(logits + told[:, None, None, None], batch.proposal)


def predictor(network: nn.Module) -> BatchPredictor:
    return BatchPredictor(network, torch.device("cpu"), "fp32")  # type: ignore[arg-type]


def masks_of(asked: BatchPredictor, batches, batch_size=2, *, with_prior=True) -> list[bytes]:
    (found,) = asked.masks(batches, batch_size, [with_prior], "test")
    return found


# --- passes


class Echo(nn.Module):
    """A network whose mask logit is the proposal's logit plus one; it runs the given number of passes."""

    def __init__(self, passes: int) -> None:
        super().__init__()
        self.num_passes = passes

    predict_logits = Segmenter.predict_logits

    def decode(self, pyramid: Pyramid, batch: Batch, tokens: dict[str, Tensor]) -> Output:
        seen = F.interpolate(batch.proposal, batch.image.shape[-2:], mode="nearest")
        return Output(torch.logit(seen) + 1.0, batch.proposal)


@pytest.mark.parametrize("passes", [1, 2, 4])
def test_each_pass_uses_the_previous_mask_as_its_proposal(pairs, passes):
    """Every pixel has the logit of the proposal plus one per pass. The caller's batch does not change."""
    batch = toy_batches(pairs)(np.arange(5))
    batch = replace(batch, proposal=batch.proposal.clamp(0.02, 0.9))
    given = batch.proposal.clone()
    found = Echo(passes).predict_logits(Pyramid([], batch.image, batch.image), batch, {})
    expected = F.interpolate(torch.logit(given) + passes, batch.image.shape[-2:], mode="nearest")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(batch.proposal, given)


def test_saves_the_number_of_passes_with_the_network(pairs, tmp_path):
    network, batches = toy_network(pairs).eval(), toy_batches(pairs)
    once = BatchPredictor.of(network, FP32).logits(batches(np.arange(2)))
    network.num_passes = 3
    network.save(tmp_path)
    loaded = Segmenter.load(tmp_path)
    assert loaded.num_passes == 3
    thrice = BatchPredictor.of(loaded, FP32).logits(batches(np.arange(2)))
    torch.testing.assert_close(thrice, BatchPredictor.of(network, FP32).logits(batches(np.arange(2))))
    assert not torch.allclose(once, thrice)


# --- masks


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 64])
def test_batched_masks_equal_single_masks_at_the_original_image_size(pairs, batch_size):
    network, batches = toy_network(pairs).eval(), toy_batches(pairs)
    last = next(module for module in network.decoder.head.modules() if isinstance(module, nn.Conv2d))
    torch.manual_seed(0)
    nn.init.normal_(last.weight, std=3.0)  # masks with some structure: strong logits around a mean of zero
    last.bias.data -= BatchPredictor.of(network, FP32).logits(batches(np.arange(5))).mean()
    found = masks_of(BatchPredictor.of(network, FP32), batches, batch_size)
    assert len(found) == len(pairs)
    foreground = 0.0
    for row, (height, width) in enumerate(pairs.hw.tolist()):
        batch = batches(rows_of(row))
        with torch.no_grad():
            logits = network(batch, network.tokenize(batch)).mask_logits
        alone = F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)[0, 0]
        wrong = (decode_rle(found[row], height, width) != (alone > 0).numpy()) & (alone.abs() > 1e-3).numpy()
        assert not wrong.any()
        foreground += (alone > 0).float().mean().item() / len(pairs)
    assert 0.05 < foreground < 0.95


def test_mask_of_known_logits_covers_the_bright_square(pairs):
    """The stub marks pixels above 128."""
    found = masks_of(predictor(Stub()), toy_batches(pairs))
    for row, (height, width) in enumerate(pairs.hw.tolist()):
        x1, y1, x2, y2 = (pairs.box[row] * [width, height, width, height]).round().astype(int)
        square = np.zeros((height, width), dtype=bool)
        square[y1:y2, x1:x2] = True
        mask = decode_rle(found[row], height, width)
        assert (mask & square).sum() / (mask | square).sum() > 0.85


def test_hiding_the_prior_equals_a_missing_prior(pairs):
    network = toy_network(pairs)
    bare = replace(
        pairs,
        prior_text=[""] * 5,
        box=np.zeros((5, 4), np.float32),
        has_box=np.zeros(5, bool),
        proposal=np.full((5, 16, 16), 26, np.uint8),  # 0.1 of 255
        proposal_score=np.zeros(5, np.float32),
    )
    asked = BatchPredictor.of(network, FP32)
    hidden = [asked.logits(toy_batches(pairs)(np.arange(5), None, np.ones(5, bool)))]
    hidden.append(asked.logits(toy_batches(bare)(np.arange(5))))
    assert torch.equal(*hidden)
    assert not torch.equal(hidden[0], asked.logits(toy_batches(pairs)(np.arange(5))))
    stub = Stub()
    masks_of(predictor(stub), toy_batches(pairs), with_prior=False)
    assert not any(batch.has_box.any() or any(batch.prior_text) for batch in stub.asked)
    stub = Stub()
    masks_of(predictor(stub), toy_batches(pairs), with_prior=True)
    assert all(batch.has_box.all() for batch in stub.asked)


def test_prediction_is_deterministic_and_keeps_the_weights(pairs):
    network = toy_network(pairs).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    asked, batches = BatchPredictor.of(network, FP32), toy_batches(pairs)
    first = masks_of(asked, batches)
    torch.manual_seed(5)
    assert masks_of(asked, batches) == first
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_half_precision_gives_nearly_the_same_logits(pairs):
    network, batch = stirred_network(pairs), toy_batches(pairs)(np.arange(5))
    full, half = BatchPredictor.of(network, FP32).logits(batch), BatchPredictor.of(network, BF16).logits(batch)
    assert half.dtype == torch.float32
    assert not torch.equal(full, half)
    assert (full - half).abs().mean() < 0.05 * full.abs().mean()


def test_a_loaded_run_gives_the_same_logits(pairs, tmp_path):
    network, batch = toy_network(pairs), toy_batches(pairs)(np.arange(5))
    network.save(tmp_path / "model")
    loaded = BatchPredictor.from_run(tmp_path / "model", FP32)
    assert torch.equal(loaded.logits(batch), BatchPredictor.of(network, FP32).logits(batch))
    with pytest.raises(ArtifactError, match="nowhere: not found"):
        BatchPredictor.from_run(tmp_path / "nowhere", FP32)


# --- one encoding per image


def shared_images(pairs: Pairs) -> Pairs:
    """Return 40 pairs of 5 images in mixed order."""
    rows = np.random.default_rng(0).permutation(np.repeat(np.arange(5), 8))
    words = [f"{pairs.sentence[row]} {'small ' * (place % 3)}" for place, row in enumerate(rows)]
    return replace(pairs.take(rows), sentence=words, sent_id=np.arange(40) * 3 + 1)


@pytest.mark.parametrize("with_prior", [[True], [True, False]])
def test_encodes_each_image_once_for_all_its_sentences(pairs, with_prior, monkeypatch):
    monkeypatch.setattr("l2l_core.model.batch_predictor.IMAGES_AT_ONCE", 2)
    stub, batches = Stub(), toy_batches(shared_images(pairs))
    predictor(stub).masks(batches, 4, with_prior, "test", fill=False)
    encoded = torch.cat(stub.encoded)
    assert torch.equal(encoded, batches.pixels(np.arange(5)))
    assert sum(len(batch.sentence) for batch in stub.asked) == 40 * len(with_prior)


@pytest.mark.parametrize(("batch_size", "at_once"), [(1, 1), (3, 3), (16, 16), (64, 16)])
def test_encodes_at_most_batch_size_images_at_once(pairs, batch_size, at_once):
    stub, batches = Stub(), toy_batches(shared_images(pairs))
    masks_of(predictor(stub), batches, batch_size)
    list(predictor(stub).views(batches, batch_size, "test"))
    assert {len(image) for image in stub.encoded} == {at_once}
    assert {len(batch.sentence) for batch in stub.asked} == {batch_size}


def test_views_encode_each_image_and_its_flip_once(pairs, monkeypatch):
    monkeypatch.setattr("l2l_core.model.batch_predictor.IMAGES_AT_ONCE", 2)
    stub, batches = Stub(), toy_batches(shared_images(pairs))
    rows = np.concatenate([rows for rows, _ in predictor(stub).views(batches, 4, "test")])
    assert sorted(rows) == list(range(40))
    image = batches.pixels(np.array([0, 1, 2, 3, 4, 4]))  # the last batch is padded by a repeated image
    expected = [part for two in image.split(2) for part in (two, two.flip(-1))]
    assert all(torch.equal(*both) for both in zip(stub.encoded, expected, strict=True))
    assert sum(len(batch.sentence) for batch in stub.asked) == 3 * 40


@pytest.mark.parametrize("batch_size", [3, 4, 64])
def test_chunks_are_whole_images_and_give_the_masks_of_all_pairs(pairs, monkeypatch, batch_size):
    """Each chunk alone, with its own images only, gives the masks and the views that all pairs together give."""
    monkeypatch.setattr("l2l_core.model.batch_predictor.CHUNK_PAIRS", 10)
    shared, asked = shared_images(pairs), BatchPredictor.of(stirred_network(pairs), FP32)
    chunks = chunks_of(shared, batch_size)
    assert sorted(np.concatenate(chunks).tolist()) == list(range(40))
    assert (np.diff(shared.image_row[np.concatenate(chunks)]) >= 0).all()
    # Five images of eight pairs; a chunk has at least 9, 8 or 64 pairs, or ends where one of so many would have ended.
    assert [len(rows) for rows in chunks] == {3: [16, 8, 8, 8], 4: [8] * 5, 64: [40]}[batch_size]
    (whole,) = asked.masks(toy_batches(shared), batch_size, [True], None)
    prob = dict(views_by_sentence(asked, shared, batch_size))
    for rows in chunks:
        some = shared.only(rows)
        assert len(some.image_path) == len(set(shared.image_row[rows]))
        (masks,) = asked.masks(toy_batches(some), batch_size, [True], None)
        assert masks == [whole[row] for row in rows]
        for sent_id, view in views_by_sentence(asked, some, batch_size):
            np.testing.assert_array_equal(view, prob[sent_id])
    assert len(set(whole)) > 5


def views_by_sentence(asked: BatchPredictor, pairs: Pairs, batch_size: int):
    for _, views in asked.views(toy_batches(pairs), batch_size, None):
        yield from zip(views.sent_id.tolist(), views.prob, strict=True)


@pytest.mark.parametrize("passes", [1, 2])
def test_padded_batch_results_depend_only_on_their_own_pair(pairs, passes):
    """With 39 other pairs of 5 images or alone, the mask and the probabilities of every view are equal."""
    shared, network = shared_images(pairs), stirred_network(pairs)
    network.num_passes = passes
    asked = BatchPredictor.of(network, FP32)
    together = asked.masks(toy_batches(shared), 16, [True, False], "test")
    views = {
        int(row): (view, place)
        for rows, view in asked.views(toy_batches(shared), 16, "test")
        for place, row in enumerate(rows)
    }
    assert len(set(together[0])) > 5  # otherwise the comparison is trivial
    for row in (0, 7, 39):
        alone = toy_batches(shared.take(rows_of(row)))
        assert asked.masks(alone, 16, [True, False], "test") == [[masks[row]] for masks in together]
        ((_, single),) = asked.views(alone, 16, "test")
        view, place = views[row]
        for name in ("sent_id", "image", "prob", "prob_flipped", "prob_no_prior", "proposal", "words"):
            np.testing.assert_array_equal(getattr(single, name)[0], getattr(view, name)[place], err_msg=name)


def test_an_unpadded_single_pair_matches_the_batch_up_to_rounding(pairs):
    shared, network = shared_images(pairs), stirred_network(pairs)
    batch = toy_batches(shared)(np.arange(40))
    asked = BatchPredictor.of(network, FP32)
    together = asked.logits(batch)
    alone = torch.cat([asked.logits(toy_batches(shared)(rows_of(row))) for row in range(40)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5 * together.abs().max().item())


# --- views


def test_views_of_a_flip_equivariant_network_agree(pairs):
    ((_, views),) = predictor(Stub()).views(toy_batches(pairs), 8, "test")
    np.testing.assert_array_equal(views.prob, views.prob_flipped)
    np.testing.assert_array_equal(views.prob, views.prob_no_prior)
    assert views.prob.shape == (5, SIZE_PX, SIZE_PX)


def test_flipped_map_is_flipped_back(pairs):
    """Logits are image + ramp. In the flipped view, the ramp runs in the opposite direction after flipping back."""
    ((_, views),) = predictor(Stub(ramp=1.5)).views(toy_batches(pairs), 8, "test")
    image = toy_batches(pairs)(np.arange(5)).image[:, 0].numpy() / 64 - 2
    ramp = 1.5 * np.linspace(-1, 1, SIZE_PX)
    np.testing.assert_allclose(views.prob, 1 / (1 + np.exp(-(image + ramp))), rtol=1e-5)
    np.testing.assert_allclose(views.prob_flipped, 1 / (1 + np.exp(-(image - ramp))), rtol=1e-5)


def test_views_query_plain_flipped_and_without_prior(pairs):
    stub = Stub()
    list(predictor(stub).views(toy_batches(pairs), 8, "test"))
    asked, mirrored, without = stub.asked
    assert asked.sentence == without.sentence == [*pairs.sentence, *pairs.sentence[-1:] * 3]  # padded to 8
    assert mirrored.sentence == [mirror_sentence(text) for text in asked.sentence]
    assert mirrored.sentence != asked.sentence
    assert torch.equal(mirrored.proposal, asked.proposal.flip(-1))
    assert mirrored.has_box.all()
    assert not without.has_box.any()


def test_views_with_and_without_prior_differ(pairs):
    stub = Stub(told=lambda batch, row: 2.0 * batch.has_box[row] + len(batch.sentence[row]) / 10)
    views = [view for _, view in predictor(stub).views(toy_batches(pairs), 2, "test")]
    assert [len(view.sent_id) for view in views] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate([view.sent_id for view in views]), pairs.sent_id)
    logit = [np.log(prob) - np.log1p(-prob) for prob in (views[0].prob, views[0].prob_no_prior)]
    np.testing.assert_allclose(logit[0] - logit[1], 2.0, atol=1e-3)


def test_views_contain_proposal_score_and_word_count(pairs):
    pairs = replace(pairs, sentence=["cup", "a  cup on the left", "", "one two", "x"], proposal_score=np.arange(5) / 5)
    ((_, views),) = predictor(Stub()).views(toy_batches(pairs), 8, "test")
    assert views.words.tolist() == [1, 5, 0, 2, 1]
    np.testing.assert_allclose(views.proposal_score, np.arange(5) / 5, rtol=1e-6)
    small = views.proposal.reshape(5, 16, 2, 16, 2).mean((2, 4))
    np.testing.assert_allclose(small.mean((1, 2)) * 255, pairs.proposal.mean((1, 2)), rtol=0.02)
    assert np.corrcoef(small.ravel(), pairs.proposal.ravel())[0, 1] > 0.95


# --- helpers


@pytest.mark.parametrize(("count", "size"), [(0, 3), (1, 3), (6, 3), (7, 3)])
def test_batched_rows_cover_all_rows_in_order(count, size):
    batches = list(batched_rows(count, size, "test"))
    assert [row for batch in batches for row in batch.tolist()] == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])


def test_at_size_interpolates_logits_bilinearly():
    """Bilinear interpolation between pixel centers: 0 and 4 stretched to four pixels give 0, 1, 3, 4."""
    stretched = at_size(torch.tensor([[[0.0, 4.0]]]), 1, 4)
    np.testing.assert_allclose(stretched, [[0.0, 1.0, 3.0, 4.0]])
    same = torch.randn(1, 7, 5)
    np.testing.assert_array_equal(at_size(same, 7, 5), same[0].numpy())
