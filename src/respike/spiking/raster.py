"""Pictures of spikes: channels over tokens, and one token over its time steps."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from torch import Tensor

from respike.models.decoder import Decoder
from respike.models.spiking import SITES, spike_sites, watch_sites
from respike.ops.codings import code_steps, encode

CHANNELS, TOKENS = 192, 96
NAMES = {"qkv": "into q, k, v", "o": "into o", "mlp": "into gate, up", "down": "into down"}


def record(decoder: Decoder, tokens: Tensor, layer: int) -> dict[str, Tensor]:
    """Counts (T, I) of each site of a layer on ``tokens`` (T,)."""
    found: dict[str, Tensor] = {}
    sites = list(spike_sites(decoder))

    def see(index: int, x: Tensor) -> None:
        site = sites[index]
        if site.layer == layer and site.neuron is not None:
            found[site.name] = site.neuron.fire(x)[0][0].cpu()

    with torch.inference_mode(), watch_sites(decoder, see):
        decoder.hidden(tokens[None].to(decoder.embedding.device), chunk_tokens=len(tokens))
    return found


def draw_tokens(counts: dict[str, Tensor], layer: int, path: Path) -> None:
    """Channels down, tokens across, a panel for each site; colour is the count."""
    figure, axes = pyplot.subplots(1, len(SITES), figsize=(14, 5.2), sharey=True)
    for axis, (name, table) in zip(axes, counts.items(), strict=True):
        shown = table[:TOKENS, :CHANNELS].T
        image = axis.imshow(
            shown.numpy(), aspect="auto", interpolation="nearest", cmap="seismic", vmin=-16, vmax=16
        )
        silent = float((table == 0).float().mean())
        axis.set_title(f"{NAMES[name]}: {100 * silent:.0f} % silent", size=9)
        axis.set_xlabel("token")
    axes[0].set_ylabel("channel")
    figure.colorbar(image, ax=axes, pad=0.01, label="spike count (colour ends at 16)")
    figure.suptitle(f"Spike counts of layer {layer}; white is silence", size=10)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def draw_steps(counts: dict[str, Tensor], layer: int, token: int, path: Path) -> None:
    """Channels down, time steps across: one token's counts as signed-bitwise spikes."""
    steps = code_steps(
        min(int(c[token].min()) for c in counts.values()),
        max(int(c[token].max()) for c in counts.values()),
        "signed-bitwise",
    )
    figure, axes = pyplot.subplots(1, len(SITES), figsize=(10, 5.2), sharey=True)
    for axis, (name, table) in zip(axes, counts.items(), strict=True):
        spikes = encode(table[token], "signed-bitwise", steps)
        axis.imshow(
            spikes[:, :CHANNELS].T.numpy(),
            aspect="auto",
            interpolation="nearest",
            cmap="bwr",
            vmin=-1,
            vmax=1,
        )
        empty = float((spikes == 0).float().mean())
        axis.set_title(f"{NAMES[name]}: {100 * empty:.0f} % empty", size=9)
        axis.set_xticks(range(steps), [str(1 << (steps - 1 - t)) for t in range(steps)], size=6)
        axis.set_xlabel("time step, by its weight")
    axes[0].set_ylabel("channel")
    title = f"Token {token} in layer {layer}: signed-bitwise spikes over {steps} time steps"
    figure.suptitle(title, size=10)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
