"""Planned stages, and time, memory and size estimates against hand-computed values."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo
from toy_pairs import TRAIN, toy_params

from l2l_core.model import batch_predictor
from l2l_core.preflight import estimate
from l2l_core.preflight.estimate import Costs, Counts, Machine, MemoryCosts, Sizes, checkpoint_bytes, plan, stage_names
from l2l_core.pseudo_labels import reinforce
from l2l_core.training import workers

ROOT = Path(__file__).parents[2]
COUNTS = Counts(
    sentences=1000, labeled=50, unlabeled=800, evaluated=100,
    labeled_images=20, unlabeled_images=400, evaluated_images=40,
)  # fmt: skip
COSTS = Costs(
    start_s=1, network_start_s=5, read_s=2, decode_s=0.5, proposal_s=0.01, step_s=0.1, predict_s=0.002, label_s=0.02,
    mask_s=0.001, policy_step_s=0.03,
)  # fmt: skip
SIZES = Sizes(index=7000, mask=150.0, model=1_000_000)


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("dataset", ["data/refshapes", "data/other"])
def test_lists_the_stages_that_dvc_would_run(tmp_path, monkeypatch, number, dataset):
    for name in ("dvc.yaml", "stages/dvc.yaml", "data/dvc.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"round": number, "dataset": dataset}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    with Repo() as repo:
        graph = repo.index.graph  # edges point from a stage to its dependencies
        stages = repo.stage.collect("report", with_deps=True)
        before = {stage.addressing: {other.addressing for other in graph.successors(stage)} for stage in stages}
    short = {name: name.rpartition(":")[2] for name in before}
    names = stage_names(toy_params().model_copy(update={"round": number}), draws_refshapes=dataset == "data/refshapes")
    assert sorted(names) == sorted(short.values())
    for name, others in before.items():
        assert all(names.index(short[other]) < names.index(short[name]) for other in others)


def seconds(number: int = 2, machine: Machine | None = None, **sections: dict[str, object]) -> dict[str, float | None]:
    settings = {
        "warmup": {"steps": 400},
        "retrain": {"steps": 800, "num_passes": 2, "labeled_share": 0.25},
        "distill": {"steps": 300},
        "evaluate": {"batch_size": 64},
        "train": {"batch_size": 32},
    }
    params = toy_params(**{name: settings.get(name, {}) | sections.get(name, {}) for name in {*settings, *sections}})
    params = params.model_copy(update={"round": number})
    return {
        stage.name: stage.seconds for stage in plan(params, COUNTS, COSTS, SIZES, draws_refshapes=True, machine=machine)
    }


SELECT = {"method": "reinforce", "candidates": ["teacher", "prior"], "folds": 2, "fold_steps": 300}
SELECT |= {"fold_update": "continue", "fold_update_steps": 150, "policy_steps": 400}


def test_time_estimates_match_hand_computed_values():
    found = seconds(select=SELECT)
    assert found["ingest"] == 1 + 2
    assert found["split"] == found["query"] == found["priors"] == 1
    assert found["proposals"] == pytest.approx(1 + 1000 * 0.01)
    # All images fit into the cache: each is decoded once, in 0.5 s.
    assert found["warmup"] == pytest.approx(5 + 2 * (40 + 20 * 0.5))
    assert found["crossfit-0"] == pytest.approx(5 + 2 * (30 + 20 * 0.5))
    assert found["crossfit@1"] == pytest.approx(5 + 2 * (15 + 420 * 0.5))
    # Each of 850 sentences: three views in one pass, the candidates, two masks. Then the policy.
    assert found["select@1"] == pytest.approx(5 + 850 * (3 * 0.002 + 0.02 + 2 * 0.001) + 400 * 0.03 + 420 * 0.5)
    assert found["select@2"] == pytest.approx(5 + 850 * (6 * 0.002 + 0.02 + 2 * 0.001) + 400 * 0.03 + 420 * 0.5)
    assert found["retrain@1"] == found["retrain@2"] == pytest.approx(5 + 80 + 420 * 0.5)
    # 100 sentences fill two batches of 64.
    assert found["predict"] == pytest.approx(5 + 3 * (128 * 0.002 + 100 * 0.001) + 2 * 40 * 0.5)
    later = pytest.approx(5 + 2 * (128 * 2 * 0.002 + 100 * 0.001) + 40 * 0.5)
    assert found["predict@1"] == found["predict@2"] == later
    assert found["distill"] == pytest.approx(5 + 30 + 420 * 0.5)
    assert found["predict-distilled"] == pytest.approx(5 + 128 * 2 * 0.002 + 100 * 0.001 + 40 * 0.5)
    assert found["refshapes"] is found["evaluate"] is found["report"] is None
    assert "crossfit@2" not in found


def test_time_of_a_run_without_rounds_matches_hand_computed_values():
    """The distilled model trains on the labels alone, and makes one pass."""
    found = seconds(0)
    assert found["distill"] == pytest.approx(5 + 30 + 20 * 0.5)
    assert found["predict-distilled"] == pytest.approx(5 + 128 * 0.002 + 100 * 0.001 + 40 * 0.5)


def test_decodes_images_beyond_the_cache_at_every_draw(monkeypatch):
    """A cache of 10 images, or of 5 for each of two streams."""
    size_px = toy_params().model.image_size_px
    monkeypatch.setattr(estimate, "IMAGE_CACHE_BYTES", 10 * 3 * size_px**2)
    found = seconds(select=SELECT)
    # Half of the labeled images are cached and decoded once; half of the 400 x 32 draws hit the other images.
    assert found["warmup"] == pytest.approx(5 + 2 * (40 + 0.5 * (10 + 400 * 32 / 2)))
    labeled, unlabeled = 800 * 8, 800 * 24
    decoded = 5 + labeled * 15 / 20 + 5 + unlabeled * 395 / 400
    assert found["retrain@1"] == pytest.approx(5 + 80 + 0.5 * decoded)


def test_short_training_decodes_only_the_drawn_images():
    assert seconds(warmup={"steps": 1}, train={"batch_size": 7})["warmup"] == pytest.approx(5 + 2 * (0.1 + 7 * 0.5))


def test_grabcut_estimate_includes_decoding_every_image():
    fixed = {"renderer": "grabcut", "ring": 0.1, "core": 0.0}
    assert seconds(proposals=fixed)["proposals"] == pytest.approx(1 + 1000 * 0.01 + 460 * 0.5)


def test_fit_renders_the_labeled_sentences_for_every_tried_value():
    """The box, the first cut, five more rings and three more cores, for at most 200 labeled sentences."""
    fixed = {"renderer": "grabcut", "ring": "fit", "core": "fit"}
    labeled = min(200, COUNTS.labeled)
    assert seconds(proposals=fixed)["proposals"] == pytest.approx(1 + (1000 + labeled * 10) * 0.01 + 460 * 0.5)


SAM_COSTS = replace(COSTS, sam_image_s=2.0, sam_prompt_s=0.3)


def test_sam_renders_every_sample_and_encodes_every_image_once(monkeypatch):
    """1,000 sentences with two samples about 460 images; a stage with PyTorch starts in 5 s."""
    by_sam = {"proposals": {"renderer": "sam", "model": "m"}, "priors": {"samples": 2}}
    assert seconds(**by_sam)["proposals"] is None  # not measured
    monkeypatch.setattr(sys.modules[__name__], "COSTS", SAM_COSTS)
    assert seconds(**by_sam)["proposals"] == pytest.approx(5 + 460 * 2.0 + 2000 * 0.3)


def test_select_estimate_includes_sam_if_it_is_used(monkeypatch):
    """A prompt for each of 850 sentences; semires prompts each of 400 unlabeled images with 32 x 32 points."""
    plain = seconds(select=SELECT)["select@1"]
    with_sam = SELECT | {"candidates": ["teacher", "sam"]}
    assert seconds(select=with_sam, proposals={"model": "m"})["select@1"] is None
    monkeypatch.setattr(sys.modules[__name__], "COSTS", SAM_COSTS)
    assert seconds(select=SELECT, proposals={"model": "m"})["select@1"] == plain
    found = seconds(select=with_sam, proposals={"model": "m"})["select@1"]
    assert found == pytest.approx(plain + 420 * 2.0 + 850 * 0.3)
    semires = SELECT | {"method": "semires"}
    plain = seconds(select=semires)["select@1"]
    found = seconds(select=semires, proposals={"model": "m"})["select@1"]
    assert found == pytest.approx(plain + 400 * 2.0 + 400 * 1024 * 0.3)


def test_memory_estimates_include_sam():
    needs = replace(NEEDS, sam=7_000, sam_gpu=80_000)
    without, by_sam = (
        memory(needs=needs, proposals={"size_px": 10, **changes}, select=SELECT | {"candidates": ["teacher", "sam"]})
        for changes in ({}, {"renderer": "sam", "model": "m"})
    )
    assert by_sam["proposals"] == (without["proposals"][0] - 100 + 500 + 7_000, 80_000)
    plain = memory(needs=needs)["select@1"]
    assert by_sam["select@1"] == (plain[0] + 7_000, plain[1] + 80_000)


NEEDS = MemoryCosts(
    start=100, network_start=500, read=70, train=10_000, predict=4_000, state=6.0, train_gpu=90_000, predict_gpu=40_000
)  # fmt: skip


def memory(
    at_once: int = 1, needs: MemoryCosts = NEEDS, machine: Machine | None = None, **sections: dict[str, object]
) -> dict[str, tuple]:
    params = toy_params(**({"proposals": {"size_px": 10}, "select": SELECT} | sections)).model_copy(update={"round": 2})
    stages = plan(params, COUNTS, None, SIZES, draws_refshapes=True, needs=needs, at_once=at_once, machine=machine)
    return {stage.name: (stage.ram_bytes, stage.gpu_bytes) for stage in stages}


LABELS = 2 * 800 * 350
"""Two copies of the pseudo-labels, as large as in the size of `select`."""


def test_memory_estimates_match_hand_computed_values():
    found = memory(at_once=2)
    tables = 1000 * (4 * 10**2 + 1000)
    network = 500 + tables + 1_000_000  # a process, its tables, the weights
    image = 3 * 32 * 32
    assert found["ingest"] == found["split"] == found["query"] == found["priors"] == (100 + 70, None)
    assert found["proposals"] == (100 + tables + 24 * 1000 * 10**2, None)
    assert found["warmup"] == found["crossfit-0"] == (2 * (network + 10_000 + 20 * image), 90_000)
    assert found["crossfit@1"] == (2 * (network + 10_000 + 420 * image), 90_000)
    assert found["retrain@1"] == found["retrain@2"] == found["crossfit@1"]
    assert found["distill"] == (network + 10_000 + 420 * image, 90_000)
    assert found["select@1"] == found["select@2"] == (network + 4_000 + 400 * image + 2 * 6 * 850 + LABELS, 40_000)
    assert (
        found["predict"] == found["predict@2"] == found["predict-distilled"] == (network + 4_000 + 40 * image, 40_000)
    )
    assert found["report"] == found["evaluate"] == found["refshapes"] == (None, None)


def test_proposal_memory_is_limited_by_the_chunk_size():
    tables = 1000 * (4 * 200**2 + 1000)
    assert memory(proposals={"size_px": 200})["proposals"][0] == 100 + tables + 24 * 2**23


def test_decoded_images_take_at_most_the_cache_size(monkeypatch):
    """A cache of 30 images, split evenly between two streams."""
    monkeypatch.setattr(estimate, "IMAGE_CACHE_BYTES", 30 * 3 * 32 * 32)
    found, network = memory(), 500 + 1000 * 1400 + 1_000_000
    image = 3 * 32 * 32
    assert found["warmup"][0] == network + 10_000 + 20 * image
    assert found["retrain@1"][0] == network + 10_000 + 2 * 15 * image  # there are 20 labeled images
    assert found["predict"][0] == network + 4_000 + 30 * image
    beside = memory(at_once=2)  # the fold teachers share the cache as well
    assert beside["crossfit-0"][0] == 2 * (network + 10_000 + 15 * image)
    assert beside["crossfit@1"][0] == 2 * (network + 10_000 + 2 * 7 * image)


def test_memory_of_fixed_rules_excludes_fold_teachers_and_labeled_sentences():
    found = memory(select=SELECT | {"method": "topk"}, at_once=2)
    assert found["crossfit-0"] == found["crossfit@1"] == (100, None)
    assert found["retrain@1"][0] == 500 + 1000 * 1400 + 1_000_000 + 10_000 + 420 * 3 * 32 * 32
    ruled = 500 + 1000 * 1400 + 1_000_000 + 4_000 + 400 * 3 * 32 * 32 + 2 * 6 * 800 + LABELS
    assert found["select@1"] == (ruled, 40_000)


def test_memory_of_selection_holds_the_states_of_a_sample(monkeypatch):
    """Of 800 unlabeled sentences, the policy trains on at most 300."""
    monkeypatch.setattr(reinforce, "UNLABELED_SENTENCES", 300)
    fixed = memory(select=SELECT | {"method": "topk"})["select@1"][0]
    assert fixed == 500 + 1000 * 1400 + 1_000_000 + 4_000 + 400 * 3 * 32 * 32 + 2 * 6 * 300 + LABELS
    assert memory()["select@1"][0] == fixed + 2 * 6 * 50
    weighted = memory(select=SELECT | {"method": "semires"})["select@1"][0]
    assert weighted == fixed + 2 * 800 * 10**2  # two copies of the pixel weights


def test_memory_of_a_multimodal_model_is_unknown():
    assert memory(priors={"backend": "vllm", "model": "x"})["query"] == (None, None)


def test_fixed_rules_neither_query_fold_teachers_nor_train_a_policy():
    found = seconds(select=SELECT | {"method": "topk"})
    assert found["crossfit-0"] == 1
    assert found["select@1"] == pytest.approx(5 + 800 * (3 * 0.002 + 0.02 + 1 * 0.001) + 400 * 0.5)
    assert found["crossfit@1"] == 1


def test_cross_labeling_adds_fold_teachers_to_fixed_rules():
    """Everything else costs the same."""
    rule, crossed = SELECT | {"method": "topk"}, SELECT | {"method": "topk", "cross_label": True}
    added = {"crossfit-0": 5 + 2 * (30 + 20 * 0.5), "crossfit@1": 5 + 2 * (15 + 420 * 0.5)}
    assert seconds(select=crossed) == pytest.approx(seconds(select=rule) | added)
    beside = memory(select=SELECT, at_once=2)
    added_bytes = {name: beside[name] for name in beside if name.startswith(("crossfit", "retrain"))}
    assert memory(select=crossed, at_once=2) == memory(select=rule, at_once=2) | added_bytes


def test_time_of_fold_teachers_follows_fold_update():
    assert seconds(select=SELECT | {"fold_update": "freeze"})["crossfit@1"] == 1
    assert seconds(select=SELECT | {"fold_update": "retrain"})["crossfit@1"] == pytest.approx(5 + 2 * (30 + 210))


def test_online_teacher_adds_its_labeling_time_to_every_batch():
    found = seconds(select=SELECT | {"method": "mean_teacher"})
    assert found["retrain@1"] == pytest.approx(5 + 800 * (0.1 + 24 * 0.002) + 420 * 0.5)
    assert found["distill"] == pytest.approx(5 + 300 * (0.1 + 24 * 0.002) + 420 * 0.5)


@pytest.mark.parametrize(("backend", "expected"), [("replay", 1), ("none", 1), ("openai", None), ("vllm", None)])
def test_time_of_live_models_is_unknown(backend, expected):
    assert seconds(priors={"backend": backend, "model": "x"})["query"] == expected


def test_size_estimates_match_hand_computed_values():
    params = toy_params(proposals={"size_px": 10}, priors={"samples": 3}, select={"folds": 2})
    params = params.model_copy(update={"round": 2})
    found = {stage.name: stage for stage in plan(params, COUNTS, None, SIZES, draws_refshapes=False)}
    assert all(stage.seconds is None for stage in found.values())
    size = {name: stage.size_bytes for name, stage in found.items()}
    assert size["ingest"] == 7000
    assert size["split"] == 50 * 200
    assert size["query"] == size["priors"] == 3000 * 500
    assert size["proposals"] == 1000 * 100
    assert size["retrain@2"] == size["distill"] == 1_000_000
    assert size["warmup"] == size["crossfit-0"] == size["crossfit@1"] == 2_000_000
    assert size["select@1"] == 800 * 350
    # The supervised model once, each round's model with and without prior, the pseudo-labels of the rounds so far.
    assert size["predict"] == 100 * 3 * 200
    assert size["predict@1"] == 100 * 5 * 200 + 800 * 350
    assert size["predict@2"] == 100 * 7 * 200 + 2 * 800 * 350
    assert size["predict-distilled"] == 100 * 8 * 200 + 2 * 800 * 350
    assert size["report"] is None
    assert checkpoint_bytes(SIZES) == 8_000_000


def test_sizes_are_unknown_without_the_network():
    sizes = Sizes(index=1, mask=1.0, model=None)
    found = {stage.name: stage.size_bytes for stage in plan(toy_params(), COUNTS, None, sizes, draws_refshapes=False)}
    assert found["warmup"] is found["crossfit-0"] is found["retrain@1"] is checkpoint_bytes(sizes) is None


CPU, GPU = Machine(cores=4, threads=2, has_gpu=False), Machine(cores=4, threads=2, has_gpu=True)


def data_workers(count: int | str) -> dict[str, object]:
    return {"engine": TRAIN.engine.model_copy(update={"workers": count})}


def test_a_single_process_takes_the_measured_time():
    assert seconds(select=SELECT, machine=CPU) == seconds(select=SELECT)
    assert memory(machine=CPU) == memory()


@pytest.mark.parametrize(
    ("machine", "cluster", "faster", "predict_faster"),
    [
        (CPU, {"workers": 2}, 2, 1),  # 2 x 2 threads on 4 cores
        (CPU, {"workers": 3}, 2, 1),  # no more than the cores
        (CPU, {"workers": 4, "cpus_per_worker": 1}, 2, 0.5),  # the only worker with a chunk has half as many threads
        (CPU, {"workers": 3, "executor": "ray", "address": "auto"}, 3, 1),  # cores of other machines
        (CPU, {"workers": 9, "executor": "ray", "address": "auto"}, 8, 1),  # no more than chunks
        (CPU, {"workers": 8, "executor": "ray"}, 2, 1),  # a cluster of this machine has its cores
        (GPU, {"workers": 4, "cpus_per_worker": 1, "gpus_per_worker": 1}, 4, 1),  # a GPU each
    ],
)
def test_workers_divide_the_time_of_labeling_and_prediction(monkeypatch, machine, cluster, faster, predict_faster):
    """800 sentences to label are 8 chunks of two batches, 100 to evaluate one. One process scores the labeled."""
    monkeypatch.setattr(batch_predictor, "CHUNK_PAIRS", 100)
    batches = {"evaluate": {"batch_size": 50}}
    found = seconds(select=SELECT, cluster=cluster, machine=machine, train=data_workers(0), **batches)
    each = 3 * 0.002 + 0.02 + 2 * 0.001
    labeling, scoring = 800 * each + 400 * 0.5, 50 * each + 20 * 0.5
    assert found["select@1"] == pytest.approx(5 + labeling / faster + scoring + 400 * 0.03)
    assert found["predict"] == pytest.approx(5 + (3 * (100 * 0.002 + 100 * 0.001) + 2 * 40 * 0.5) / predict_faster)
    assert found["warmup"] == seconds()["warmup"]


def test_workers_divide_the_time_of_proposals_but_not_of_the_fit():
    """GrabCut uses no GPU: two workers with two threads each, on four cores."""
    fitted = {"renderer": "grabcut", "ring": "fit", "core": "fit"}
    found = seconds(proposals=fitted, cluster={"workers": 4}, machine=GPU)["proposals"]
    assert found == pytest.approx(1 + 50 * 10 * 0.01 + (1000 * 0.01 + 460 * 0.5) / 2)


def test_data_workers_decode_while_a_training_computes(monkeypatch):
    """Without room in the cache, 400 x 32 draws take 6,400 s to decode, and the steps 40 s. A GPU with four cores has
    three data workers."""
    monkeypatch.setattr(estimate, "IMAGE_CACHE_BYTES", 0)
    none, auto, eight = ({"train": data_workers(count)} for count in (0, "auto", 8))
    assert seconds(**none, machine=GPU)["warmup"] == pytest.approx(5 + 2 * (40 + 6400))
    assert seconds(**auto, machine=GPU)["warmup"] == pytest.approx(5 + 2 * 6400 / 3)
    assert seconds(**auto, machine=CPU)["warmup"] == pytest.approx(5 + 2 * (40 + 6400))
    assert seconds(**eight, machine=GPU)["warmup"] == pytest.approx(5 + 2 * 6400 / 4)  # no more than the cores
    online = seconds(**auto, machine=GPU, select=SELECT | {"method": "mean_teacher"})
    assert online["retrain@1"] == pytest.approx(5 + 800 * (0.1 + 24 * 0.002) + 800 * 32 * 0.5)


def test_each_data_worker_decodes_what_it_caches():
    """Each of three data workers decodes all 20 images once, at the same time; the steps take longer."""
    auto = {"train": data_workers("auto")}
    assert seconds(**auto, machine=GPU)["warmup"] == pytest.approx(5 + 2 * 40)
    assert seconds(**auto, machine=GPU, warmup={"steps": 20})["warmup"] == pytest.approx(5 + 2 * 20 * 0.5)


def test_memory_of_workers(monkeypatch):
    """A worker has the network, and the images of a chunk of 30 sentences. Each stage's own process stays."""
    monkeypatch.setattr(batch_predictor, "CHUNK_PAIRS", 30)
    batches = {"evaluate": {"batch_size": 10}}
    alone, image = memory(**batches), 3 * 32 * 32
    found = memory(**batches, cluster={"workers": 3}, machine=CPU)
    each = 500 + 1_000_000 + 4_000 + 30 * image
    assert found["select@1"] == (alone["select@1"][0] + 3 * each, 40_000)
    assert found["predict"] == (alone["predict"][0] + 3 * each, 40_000)
    assert found["proposals"] == (alone["proposals"][0] + 3 * (100 + 24 * 1000 * 10**2), None)
    assert found["warmup"] == alone["warmup"]
    most = memory(**batches, cluster={"workers": 9}, machine=CPU)
    assert most["predict"] == (alone["predict"][0] + 4 * each, 40_000)  # 100 sentences are four chunks
    own = memory(**batches, cluster={"workers": 3, "executor": "ray"}, machine=CPU)
    assert own["predict"] == found["predict"]
    elsewhere = memory(**batches, cluster={"workers": 3, "executor": "ray", "address": "auto"}, machine=CPU)
    assert elsewhere == alone


def test_memory_of_data_workers(monkeypatch):
    """Three batches of 7 samples and up to 20 images for each of two workers; the cache of 30 images is shared."""
    monkeypatch.setattr(estimate, "IMAGE_CACHE_BYTES", 30 * 3 * 32 * 32)
    train = {"batch_size": 7} | data_workers(2)
    alone, found = memory(machine=CPU, train={"batch_size": 7}), memory(machine=CPU, train=train)
    batches = 2 * 3 * 7 * (11 * 32**2 + 4 * 10**2)
    assert found["warmup"][0] == alone["warmup"][0] + batches + 10 * 3 * 32 * 32
    assert found["select@1"] == alone["select@1"]
    assert estimate.DATA_BATCHES == workers.AHEAD + 1
