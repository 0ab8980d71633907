from __future__ import annotations

from benchmarks.queries import clip, measure, model_of


def test_one_job_and_single_jobs_make_the_same_stems():
    model, condition_dim = model_of("default")
    one, three = measure(model, condition_dim, seconds=4, rounds=1, counts=(1, 3))
    assert one["difference"] == 0
    assert three["difference"] < 1e-6
    assert (one["queries"], three["queries"]) == (1, 3)
    assert abs(clip(model.sample_rate, 4)).max() > 0.01
