from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, normalizers

from clapsep.audio import AudioError
from clapsep.bundle import Bundle
from clapsep.query import Query, QueryEncoder, QueryError, encoder_windows, int16_round_trip, repeat_pad
from tests.golden import Golden, relative_error
from tests.regenerate import signal

WORDS = ("dog", "rain", "siren", "piano", "noise", "footsteps")


@pytest.fixture
def encoder(tiny: Bundle) -> QueryEncoder:
    return QueryEncoder(tiny.clap, tiny.tokenizer, tiny.config)


def write(path: Path, samples: np.ndarray, sample_rate: int = 48_000) -> str:
    soundfile.write(path, samples, sample_rate, subtype="FLOAT")
    return str(path)


def embed_text(encoder: QueryEncoder, text: str) -> torch.Tensor:
    ids, mask = encoder.tokens([text])
    return encoder.clap.embed_text(ids, mask)[0]


def normalised(vector: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(vector, dim=-1)


class CountingClap:
    """Counts what reaches the towers."""

    def __init__(self, clap: torch.nn.Module) -> None:
        self._clap = clap
        self.texts: list[int] = []
        self.windows = 0

    def parameters(self):
        return self._clap.parameters()

    def embed_text(self, ids, mask):
        self.texts.append(len(ids))
        return self._clap.embed_text(ids, mask)

    def embed_audio(self, waveform):
        self.windows += len(waveform)
        return self._clap.embed_audio(waveform)


class TestQuery:
    def test_an_empty_query_is_refused_with_the_fields_that_could_be_set(self):
        with pytest.raises(QueryError, match="positive_text, negative_text, positive_audio, negative_audio"):
            Query()

    @pytest.mark.parametrize("value", ["", "  ", ("dog", ""), (None,), (3,)])
    def test_an_empty_value_is_refused_with_its_side(self, value):
        with pytest.raises(QueryError, match="negative_text"):
            Query(positive_text="dog", negative_text=value)

    def test_a_plain_string_is_one_value(self):
        assert Query(positive_text="dog") == Query(positive_text=("dog",))


class TestFamiliarity:
    def test_it_is_of_the_farthest_text_the_cosine_to_the_nearest_known_one(self, tiny):
        encoder = QueryEncoder(tiny.clap, tiny.tokenizer, tiny.config, vocabulary=["a dog", "rain"])
        known = torch.stack([embed_text(encoder, text) for text in encoder.vocabulary])
        asked = {text: float((known @ embed_text(encoder, text)).max()) for text in ("thunder", "a loud dog")}
        assert encoder.familiarity(Query("rain", "a dog")) == 1.0
        assert encoder.familiarity(Query(tuple(asked), "rain")) == round(min(asked.values()), 4) < 1.0

    def test_there_is_none_without_text_or_without_vocabulary(self, tiny, encoder):
        knowing = QueryEncoder(tiny.clap, tiny.tokenizer, tiny.config, vocabulary=["a dog"])
        assert knowing.familiarity(Query(positive_audio="dog.wav")) is None
        assert encoder.familiarity(Query("a dog")) is None


class TestConditions:
    def test_sides_are_concatenated_and_normalised_together(self, encoder):
        (condition,) = encoder.conditions([Query(positive_text="a dog", negative_text="rain")])
        expected = normalised(torch.cat([embed_text(encoder, "a dog"), embed_text(encoder, "rain")]))
        assert relative_error(condition, expected) < 1e-6

    def test_without_normalisation_each_side_keeps_norm_one(self, tiny):
        config = replace(tiny.config, condition_normalize=False)
        encoder = QueryEncoder(tiny.clap, tiny.tokenizer, config)
        (condition,) = encoder.conditions([Query(positive_text="a dog", negative_text="rain")])
        assert condition.view(2, -1).norm(dim=1).numpy() == pytest.approx([1, 1], abs=1e-6)

    @pytest.mark.parametrize("side", ["positive", "negative"])
    def test_a_missing_side_is_zeros(self, encoder, side):
        (condition,) = encoder.conditions([Query(**{f"{side}_text": "a dog"})])
        halves = dict(zip(("positive", "negative"), condition.chunk(2), strict=True))
        assert relative_error(halves.pop(side), embed_text(encoder, "a dog")) < 1e-6
        assert not halves.popitem()[1].any()

    def test_several_values_are_averaged_and_text_and_audio_summed(self, tiny, tmp_path):
        config = replace(tiny.config, condition_normalize=False)
        encoder = QueryEncoder(tiny.clap, tiny.tokenizer, config)
        names = ("a", "b")
        files = [write(tmp_path / f"{name}.wav", signal(name, 48_000, 1)) for name in names]
        texts = ("a dog", "footsteps")
        (condition,) = encoder.conditions([Query(positive_text=texts, positive_audio=tuple(files))])
        singles = [encoder.conditions([Query(positive_text=text)])[0] for text in texts]
        recordings = [encoder.conditions([Query(positive_audio=file)])[0] for file in files]
        expected = (singles[0] + singles[1]) / 2 + (recordings[0] + recordings[1]) / 2
        assert relative_error(condition, expected) < 1e-6

    def test_a_query_does_not_depend_on_its_neighbours_in_the_batch(self, encoder, tiny):
        long = "someone plays the piano in the rain, and a dog is barking at the traffic noise"
        queries = [Query(positive_text="dog"), Query(negative_text=long), Query("siren", "dog")]
        together = encoder.conditions(queries)
        for query, row in zip(queries, together, strict=True):
            alone = QueryEncoder(tiny.clap, tiny.tokenizer, tiny.config).conditions([query])[0]
            assert relative_error(alone, row) < 1e-6

    def test_no_queries_give_no_rows(self, encoder, tiny):
        assert encoder.conditions([]).shape == (0, tiny.config.condition_dim)


class TestText:
    def test_texts_are_padded_to_the_longest_and_no_further(self, encoder):
        ids, mask = encoder.tokens(["dog", "someone plays the piano"])
        lengths = mask.sum(1)
        assert ids.shape[1] == lengths.max()
        assert lengths[0] < lengths[1]
        assert (ids[mask == 0] == 1).all()
        assert (ids[:, 0] == 0).all()
        assert ids[0, lengths[0] - 1] == 2

    def test_a_text_that_is_too_long_is_refused_not_cut(self, tiny):
        tiny.tokenizer.enable_truncation(8)
        try:
            encoder = QueryEncoder(tiny.clap, tiny.tokenizer, tiny.config)
        finally:
            tiny.tokenizer.no_truncation()
        with pytest.raises(QueryError, match=r"tokens; the model reads at most 77"):
            encoder.conditions([Query(positive_text="dog " * 100)])

    def test_unfamiliar_words_are_refused_with_what_the_model_knows(self, tiny, word_tokenizer):
        encoder = QueryEncoder(tiny.clap, word_tokenizer, tiny.config, vocabulary=["dog", "rain"])
        encoder.conditions([Query(positive_text="dog")])
        with pytest.raises(QueryError, match=r"\(zither\); it knows: dog, rain") as error:
            encoder.conditions([Query(positive_text="dog", negative_text="rain zither")])
        assert "--allow-unfamiliar" in str(error.value)

    def test_a_text_without_words_is_refused(self, tiny, word_tokenizer):
        tokenizer = Tokenizer.from_str(word_tokenizer.to_str())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Lowercase(), normalizers.Replace(Regex(r"\W+"), " ")]
        )
        encoder = QueryEncoder(tiny.clap, tokenizer, tiny.config)
        encoder.conditions([Query("Dog!")])
        with pytest.raises(QueryError, match="no words"):
            encoder.conditions([Query("dog"), Query("?!")])

    def test_unfamiliar_words_run_when_allowed(self, tiny, word_tokenizer):
        encoder = QueryEncoder(tiny.clap, word_tokenizer, tiny.config, allow_unfamiliar=True)
        assert encoder.conditions([Query(positive_text="zither")]).isfinite().all()


class TestAudio:
    @pytest.mark.parametrize(
        ("name", "seconds", "peak"), [("q3", 3, None), ("q4p9", 4.9, None), ("q10", 10, 1.3)]
    )
    def test_a_recording_of_up_to_a_window_equals_the_golden(self, encoder, tmp_path, name, seconds, peak):
        golden = Golden("tiny_v_clap_audio")
        uri = write(tmp_path / "query.wav", signal(name, 48_000, seconds, peak=peak))
        (condition,) = encoder.conditions([Query(positive_audio=uri)])
        assert relative_error(condition.chunk(2)[0], golden[f"{name}:embed"]) < 1e-5
        # The 16-bit round trip is part of the golden, and shows.
        assert relative_error(condition.chunk(2)[0], golden[f"{name}:embed_noquant"]) > 1e-5

    def test_windows_of_a_longer_recording_equal_the_goldens_crops(self, encoder, tmp_path):
        golden = Golden("tiny_v_clap_audio")
        wave = signal("q14", 48_000, 14)
        window, crop = 480_000, golden.meta["q14"]["crop_start"]
        centre = (len(wave) - window) // 2
        for start, name in [(0, "embed_first"), (centre, "embed_centre"), (crop, "embed")]:
            uri = write(tmp_path / f"{name}.wav", wave[start : start + window])
            (condition,) = encoder.conditions([Query(positive_audio=uri)])
            assert relative_error(condition.chunk(2)[0], golden[f"q14:{name}"]) < 1e-5, name

    def test_a_longer_recording_is_the_average_of_windows_that_cover_it(self, encoder, tmp_path):
        wave = signal("q14", 48_000, 14)
        whole = encoder.conditions([Query(positive_audio=write(tmp_path / "whole.wav", wave))])[0]
        parts = [
            encoder.conditions(
                [Query(positive_audio=write(tmp_path / f"{start}.wav", wave[start : start + 480_000]))]
            )
            for start in (0, len(wave) - 480_000)
        ]
        assert relative_error(whole, normalised(parts[0][0] + parts[1][0])) < 1e-6

    def test_channels_are_averaged_and_any_rate_is_resampled(self, encoder, tmp_path):
        wave = signal("q3", 48_000, 3)
        mono = encoder.conditions([Query(positive_audio=write(tmp_path / "mono.wav", wave))])[0]
        stereo = write(tmp_path / "stereo.wav", np.stack([1.5 * wave, 0.5 * wave], axis=1))
        assert relative_error(encoder.conditions([Query(positive_audio=stereo)])[0], mono) < 1e-5
        # Band-limited, so that 32 kHz holds all of it.
        low = np.sin(2 * np.pi * 440 * np.arange(144_000) / 48_000).astype(np.float32) * 0.3
        high_rate = encoder.conditions([Query(positive_audio=write(tmp_path / "48.wav", low))])[0]
        low_rate = np.sin(2 * np.pi * 440 * np.arange(96_000) / 32_000).astype(np.float32) * 0.3
        low_rate = encoder.conditions([Query(positive_audio=write(tmp_path / "32.wav", low_rate, 32_000))])[0]
        # Resampling leaves the empty bands at another level of next to nothing.
        assert torch.cosine_similarity(low_rate, high_rate, dim=0) > 0.99

    def test_an_unreadable_recording_is_named(self, encoder, tmp_path):
        for uri in (str(tmp_path / "absent.wav"), "nosuchscheme://x.wav"):
            with pytest.raises(AudioError, match=r"absent|nosuchscheme"):
                encoder.conditions([Query(positive_audio=uri)])

    @given(st.integers(1, 300), st.integers(1, 100), st.lists(st.integers(1, 120), min_size=1))
    @settings(max_examples=200, deadline=None)
    def test_windows_cover_every_sample_in_order(self, length, window, cuts):
        samples = np.arange(length, dtype=np.float32)
        places = np.unique(np.clip(np.cumsum(cuts), 0, length))
        windows = list(encoder_windows(iter(np.split(samples, places)), window))
        assert all(len(part) == min(window, length) for part in windows)
        assert len(windows) == -(-length // window)
        assert np.array_equal(np.unique(np.concatenate(windows)), samples)
        assert windows[-1][-1] == length - 1

    def test_repeats_are_whole_and_the_rest_is_silence(self):
        assert repeat_pad(np.array([1.0, 2.0, 3.0]), 8).tolist() == [1, 2, 3, 1, 2, 3, 0, 0]

    def test_the_round_trip_clips_and_truncates_toward_zero(self):
        steps = int16_round_trip(np.array([2.0, -2.0, 1.9 / 32767, -1.9 / 32767], dtype=np.float32)) * 32767
        assert steps == pytest.approx([32767, -32767, 1, -1])


class TestCache:
    def test_what_was_embedded_once_is_not_embedded_again(self, tiny, tmp_path):
        counting = CountingClap(tiny.clap)
        encoder = QueryEncoder(counting, tiny.tokenizer, tiny.config)
        uri = write(tmp_path / "query.wav", signal("q3", 48_000, 1))
        queries = [Query("dog", "rain", uri), Query("rain"), Query("rain", negative_audio=uri)]
        first = encoder.conditions(queries)
        assert (counting.texts, counting.windows) == ([1, 1], 1)
        assert torch.equal(encoder.conditions(queries), first)
        assert (counting.texts, counting.windows) == ([1, 1], 1)

    def test_a_changed_recording_is_embedded_again(self, encoder, tmp_path):
        uri = write(tmp_path / "query.wav", signal("q3", 48_000, 1))
        before = encoder.conditions([Query(positive_audio=uri)])
        write(tmp_path / "query.wav", signal("other", 48_000, 1.5))
        assert relative_error(encoder.conditions([Query(positive_audio=uri)]), before) > 1e-3

    def test_the_cache_is_bounded_and_a_batch_larger_than_it_still_works(self, tiny):
        counting = CountingClap(tiny.clap)
        encoder = QueryEncoder(counting, tiny.tokenizer, tiny.config, cache_size=2)
        words = ["dog", "rain", "siren", "piano"]
        conditions = encoder.conditions([Query(word) for word in words])
        assert conditions.isfinite().all()
        assert len(encoder._cache) == 2
        encoder.conditions([Query("piano")])
        assert counting.texts == [1] * 4
        encoder.conditions([Query("dog")])
        assert counting.texts == [1] * 5

    def test_threads_get_the_same_answers(self, tiny):
        encoder = QueryEncoder(tiny.clap, tiny.tokenizer, tiny.config, cache_size=3)
        words = ["dog", "rain", "siren", "piano", "noise", "footsteps"]
        expected = {word: encoder.conditions([Query(word)])[0] for word in words}
        failures: list[str] = []

        def work(offset: int) -> None:
            for step in range(12):
                word = words[(offset + step) % len(words)]
                if relative_error(encoder.conditions([Query(word)])[0], expected[word]) > 1e-6:
                    failures.append(word)

        threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_what_was_asked_before_changes_no_bit(self, tiny):
        alone, after = (
            QueryEncoder(tiny.clap, tiny.tokenizer, tiny.config, vocabulary=WORDS) for _ in range(2)
        )
        after.familiarity(Query("rain"))
        after.conditions([Query(("a loud dog in the street", "siren")), Query(tuple(WORDS))])
        for word in WORDS:
            query = Query(word, "a loud dog in the street")
            assert torch.equal(after.conditions([query]), alone.conditions([query]))
