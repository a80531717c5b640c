from l2l_core.core.seeding import derive_seed


def test_seeds_of_different_run_names_differ():
    seeds = {derive_seed(seed, run_name) for seed in range(20) for run_name in ("warmup", "retrain-1", "retrain-2")}
    assert len(seeds) == 60
    assert derive_seed(7, "warmup") == derive_seed(7, "warmup")
