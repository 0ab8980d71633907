"""The model against golden outputs of the published implementation, tensor by tensor."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clapsep.clap import Clap
from clapsep.config import BASE
from clapsep.convert import clap_tensors, clapsep_tensors
from clapsep.model import ClapSep
from clapsep.query import int16_round_trip, repeat_pad
from clapsep.spectral import LogMel, Resampler, Stft, mel_filters
from tests.golden import CONFIGS, Golden, checkpoint, relative_error
from tests.regenerate import signal, unit

SIZES = ("tiny", pytest.param("full", marks=pytest.mark.full))
PHASE_LIMITS = {"cos": 1e-4, "sin": 1e-4}
SHORT_SECONDS = 4.3


@dataclass(frozen=True)
class Published:
    """Our modules with the regenerated published weights."""

    clap: Clap
    model: ClapSep


def build(size: str, clap_file: dict[str, Tensor], clapsep_file: dict[str, Tensor]) -> Published:
    config = CONFIGS[size]
    towers, _ = clap_tensors(
        {key.removeprefix("module."): value for key, value in clap_file.items()}, config, "file a"
    )
    separator, _ = clapsep_tensors(clapsep_file, towers, config, "file b")
    clap, model = Clap(config), ClapSep(config)
    for module, tensors in ((clap, towers), (model, separator)):
        incompatible = module.load_state_dict(tensors, strict=False)
        assert all(key.endswith("num_batches_tracked") for key in incompatible.missing_keys)
        assert not incompatible.unexpected_keys
        module.eval().requires_grad_(False)
    return Published(clap, model)


@lru_cache(maxsize=1)  # one full-size model at a time
def published(size: str) -> Published:
    return build(size, checkpoint(size, "a"), checkpoint(size, "b"))


def mixtures(*names: str, seconds: float = 10.0) -> Tensor:
    return torch.from_numpy(np.stack([signal(name, 32_000, seconds) for name in names]))


def condition(size: str, positive: Tensor, negative: Tensor, normalize: bool = True) -> Tensor:
    both = torch.cat([positive, negative], dim=-1)
    return both / both.norm(dim=-1, keepdim=True).clamp(min=1e-12) if normalize else both


def embeds(size: str, *names: str) -> Tensor:
    return torch.from_numpy(np.stack([unit(name, CONFIGS[size].joint) for name in names]))


class Tap:
    """Collects named inputs and outputs of modules while its context lasts."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}
        self._handles = contextlib.ExitStack()

    def output(self, name: str, module: nn.Module) -> None:
        handle = module.register_forward_hook(lambda module, inputs, output: self.seen.update({name: output}))
        self._handles.callback(handle.remove)

    def input(self, name: str, module: nn.Module) -> None:
        handle = module.register_forward_hook(
            lambda module, inputs, output: self.seen.update({name: inputs[0]})
        )
        self._handles.callback(handle.remove)

    def __enter__(self) -> Tap:
        torch.set_grad_enabled(False)
        self._handles.callback(torch.set_grad_enabled, True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handles.close()


def run(model: ClapSep, mixture: Tensor, embed: Tensor) -> dict[str, Tensor]:
    """Every tensor the goldens may name."""
    branch, decoder = model.audio_branch, model.decoder_model
    with Tap() as tap:
        for name, module in model.named_modules():
            if module is not decoder.inverse_patch_embed:  # the golden is taken before un-stacking
                tap.output(name.replace("audio_branch.", "enc.").replace("decoder_model.", "dec."), module)
        tap.output("resampled", model.resampler)
        tap.output("enc.logmel", branch.log_mel)
        tap.input("enc.spec_padded", branch.log_mel)
        tap.input("enc.image", branch.patch_embed)
        tap.output("dec.inverse_patch_embed", decoder.inverse_patch_embed.proj)
        # Its weight is applied in two parts, so that the one without the query is shared.
        tap.input("dec.mask_net.0", decoder.mask_net[1])
        features = model.features(mixture)
        mask = model.mask(features, embed)
        predicted = model.separate(mixture, embed)
    spectrum, magnitude = features.spectrum, features.magnitude
    phase = spectrum / magnitude.clamp(min=1e-10)
    return tap.seen | {
        "mixture": mixture,
        "embed": embed,
        "stft.real": spectrum.real,
        "stft.imag": spectrum.imag,
        "mag": magnitude,
        "cos": phase.real,
        "sin": phase.imag,
        "mask": mask,
        "pred": predicted,
    }


def check(golden: Golden, seen: dict[str, Tensor]) -> None:
    for name in golden.shapes:
        golden.compare(name, seen[name])
    golden.assert_all(PHASE_LIMITS)


@pytest.mark.parametrize("size", SIZES)
def test_two_mixtures_with_both_queries_match_in_every_tensor(size: str) -> None:
    golden = Golden(f"{size}_i_batch2")
    embed = condition(size, embeds(size, "pos0", "pos1"), embeds(size, "neg0", "neg1"))
    seen = run(published(size).model, mixtures("mix0", "mix1"), embed)
    check(golden, seen)
    whole = next(key for key in golden.arrays if key.startswith(("pred_full", "pred_first")))
    expected = golden[whole]
    assert relative_error(seen["pred"][0, : expected.size].numpy(), expected) <= 1e-5
    blocks = seen["pred"].unflatten(1, (-1, 320)).square().mean(-1).sqrt()
    assert relative_error(blocks.numpy(), golden["pred:blk_rms"]) <= 1e-5


QUERIES = {
    "ii_zero_neg": lambda size: condition(size, embeds(size, "pos0"), 0 * embeds(size, "neg0")),
    "ii_zero_pos": lambda size: condition(size, 0 * embeds(size, "pos0"), embeds(size, "neg0")),
    "ii_zero_both": lambda size: condition(size, 0 * embeds(size, "pos0"), 0 * embeds(size, "neg0")),
    "ii_sum_pos": lambda size: condition(
        size, embeds(size, "pos0") + embeds(size, "pos2"), embeds(size, "neg0")
    ),
    "ii_unnormalised": lambda size: condition(
        size, embeds(size, "pos0"), embeds(size, "neg0"), normalize=False
    ),
}


@pytest.mark.parametrize("case", QUERIES)
@pytest.mark.parametrize("size", SIZES)
def test_missing_summed_and_unnormalised_queries_match(size: str, case: str) -> None:
    check(Golden(f"{size}_{case}"), run(published(size).model, mixtures("mix0"), QUERIES[case](size)))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("size", SIZES)
def test_short_mixture_matches(size: str, padded: bool) -> None:
    mixture = mixtures("short", seconds=SHORT_SECONDS)
    if padded:
        mixture = nn.functional.pad(mixture, (0, 320_000 - mixture.shape[1]))
    embed = condition(size, embeds(size, "pos0"), embeds(size, "neg0"))
    golden = Golden(f"{size}_iii_short_{'padded' if padded else 'unpadded'}")
    check(golden, run(published(size).model, mixture, embed))


@pytest.mark.parametrize("size", SIZES)
def test_long_mixture_in_published_chunks_matches(size: str) -> None:
    golden = Golden(f"{size}_iv_long_app")
    wave = signal("long", 32_000, 25, peak=2.5)
    padded = np.pad(wave, (0, golden.meta["samples_out"] - wave.size)) * np.float32(golden.meta["scale"])
    chunks = torch.from_numpy(padded).view(3, -1)
    embed = condition(size, embeds(size, "pos0"), embeds(size, "neg0")).expand(3, -1)
    with torch.inference_mode():
        predicted = published(size).model.separate(chunks, embed).reshape(1, -1)
    check(golden, {"pred": predicted, "mixture_scaled_padded": torch.from_numpy(padded)})


@pytest.mark.parametrize("size", SIZES)
def test_text_tower_matches_padded_and_unpadded(size: str) -> None:
    golden = Golden(f"{size}_vi_clap_text")
    clap = published(size).clap
    ids, mask = torch.from_numpy(golden["input_ids"]), torch.from_numpy(golden["attention_mask"])
    with torch.inference_mode():
        together = clap.embed_text(ids, mask)
        alone = [
            clap.embed_text(row[None, : int(kept.sum())], kept[None, : int(kept.sum())])
            for row, kept in zip(ids, mask, strict=True)
        ]
    assert relative_error(together.numpy(), golden["embed"]) <= 1e-5
    assert relative_error(torch.cat(alone).numpy(), golden["embed"]) <= 1e-5


@pytest.mark.parametrize("size", SIZES)
def test_text_tower_matches_layer_by_layer(size: str) -> None:
    golden = Golden(f"{size}_vi_clap_text")
    clap = published(size).clap
    ids, mask = torch.from_numpy(golden["input_ids"]), torch.from_numpy(golden["attention_mask"])
    layers = clap.text_branch.encoder["layer"]
    with Tap() as tap:
        tap.output("embeddings", clap.text_branch.embeddings)
        for index, layer in enumerate(layers):
            tap.output(f"layer.{index}", layer)
        tap.output("pooled", clap.text_branch)
        tap.output("projected", clap.text_projection)
        clap.embed_text(ids, mask)
    seen = tap.seen
    seen["last"] = seen[f"layer.{len(layers) - 1}"]
    for name, value in seen.items():
        seen[name] = value * mask[..., None] if value.dim() == 3 else value
    check(golden, seen)


def test_front_end_matches() -> None:
    golden = Golden("frontend_vii_viii")
    encoder = BASE.encoder
    half = torch.from_numpy(golden["wave_half_s"])[None]
    resampler, log_mel, stft = Resampler(32_000, 48_000), LogMel(encoder), Stft(encoder.spectrogram)
    assert relative_error(resampler.kernel.numpy(), golden["resample_kernel"]) <= 1e-6
    assert relative_error(mel_filters(encoder).numpy(), golden["melW"]) <= 1e-6
    assert relative_error(resampler(half).numpy(), golden["resampled_half_s"]) <= 1e-6
    impulse = torch.zeros(1, 64)
    impulse[0, 20] = 1
    assert relative_error(resampler(impulse).numpy(), golden["resampled_impulse20_of_64"]) <= 1e-6
    for length in (1, 2, 3, 31, 32_001):
        assert resampler(torch.zeros(1, length)).shape[1] == golden[f"resampled_len_{length}"]

    def front_end(waveform: Tensor, frames: int | None = None) -> Tensor:
        power = stft(resampler(waveform)).abs().square()
        return log_mel(nn.functional.pad(power, (0, 0, 0, (frames or power.shape[1]) - power.shape[1])))

    assert relative_error(front_end(half).numpy(), golden["logmel_half_s"]) <= 1e-6
    mixture = mixtures("mix0")
    padded = front_end(mixture, 1024)
    assert relative_error(padded[0, 999:1005].numpy(), golden["logmel_10s_frames_999_1004"]) <= 1e-6
    spectrum = Stft(BASE.spectrogram)(half)
    check(
        golden,
        {
            "stft.real_half_s": spectrum.real,
            "stft.imag_half_s": spectrum.imag,
            "resampled_10s": resampler(mixture),
            "logmel_10s_padded1024": padded,
        },
    )


def test_inverse_stft_restores_the_signal() -> None:
    wave = mixtures("mix0", seconds=2.0)
    stft = Stft(BASE.spectrogram)
    assert (stft.inverse(stft(wave), wave.shape[1]) - wave).abs().max() <= 1e-6


def _without_lora(file: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * 0 if "lora_" in key else value for key, value in file.items()}


def _with_biases_of_file_a(file: dict[str, Tensor]) -> dict[str, Tensor]:
    clap_file = checkpoint("tiny", "a")
    return {
        key: clap_file[f"module.{key}"]
        if key.startswith("audio_branch.") and key.endswith(".bias")
        else value
        for key, value in file.items()
    }


@pytest.mark.parametrize("mutate", [_without_lora, _with_biases_of_file_a])
def test_goldens_bite_when_the_tuned_weights_are_ignored(mutate) -> None:
    model = build("tiny", checkpoint("tiny", "a"), mutate(checkpoint("tiny", "b"))).model
    embed = condition("tiny", embeds("tiny", "pos0"), embeds("tiny", "neg0"))
    with pytest.raises(AssertionError, match=r"relative L2 above the limit.*mask"):
        check(Golden("tiny_iii_short_padded"), run(model, _short_padded(), embed))


def test_goldens_bite_when_the_sides_are_swapped() -> None:
    swapped = condition("tiny", embeds("tiny", "neg0"), embeds("tiny", "pos0"))
    with pytest.raises(AssertionError, match=r"relative L2 above the limit.*mask"):
        check(Golden("tiny_iii_short_padded"), run(published("tiny").model, _short_padded(), swapped))


def _short_padded() -> Tensor:
    mixture = mixtures("short", seconds=SHORT_SECONDS)
    return nn.functional.pad(mixture, (0, 320_000 - mixture.shape[1]))


def test_mixture_longer_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than a window of 320000"):
        published("tiny").model.features(torch.zeros(1, 320_001))


@pytest.mark.parametrize("size", SIZES)
def test_audio_tower_matches_layer_by_layer(size: str) -> None:
    golden = Golden(f"{size}_v_clap_audio")
    clap = published(size).clap
    branch = clap.audio_branch
    seconds = {"q3": 3.0, "q4p9": 4.9, "q10": 10.0, "q14": 14.0}
    seen: dict[str, Tensor] = {}
    for query, length in seconds.items():
        wave = signal(query, 48_000, length, peak=1.3 if query == "q10" else None)
        start = golden.meta[query]["crop_start"] if query == "q14" else 0
        fed = torch.from_numpy(int16_round_trip(repeat_pad(wave[start : start + 480_000], 480_000)))[None]
        with Tap() as tap:
            tap.output(f"{query}:logmel", branch.log_mel)
            tap.input(f"{query}:image", branch.patch_embed)
            tap.output(f"{query}:norm", branch.norm)
            tap.input(f"{query}:latent", clap.audio_projection)
            tap.output(f"{query}:projected", clap.audio_projection)
            embedding = clap.embed_audio(fed)
        seen |= tap.seen
        seen |= {f"{query}:wave": torch.from_numpy(wave), f"{query}:fed": fed}
        assert relative_error(embedding.numpy(), golden[f"{query}:embed"]) <= 1e-5
    check(golden, seen)
