"""What the arithmetic and the memory traffic of a token would cost: estimates, never measured.

The constants are of a 45 nm process and sum up other people's measurements:

    arithmetic   SpikingBrain (arXiv:2509.05276, section 3, citing Yao et al., Nat. Commun. 15:4464)
    memory       Horowitz, "Computing's energy problem", ISSCC 2014: a 64-bit read of DRAM takes
                 1.3 to 2.6 nJ; the lower figure, by the byte

Arithmetic alone makes spikes look one or two orders of magnitude better than they are: reading the
weights costs more than adding them, and wherever bytes do not shrink, neither does the bill.
"""

from typing import Any

PICOJOULES = {
    "fp16 multiply-accumulate": 1.5,
    "int8 multiply-accumulate": 0.23,
    "int8 addition": 0.03,
    "byte of DRAM": 1300 / 8,
}


def energy_estimate(total: dict[str, Any]) -> dict[str, Any]:
    """Nanojoules a token in the layers that spike, by the ways to run them.

    Args:
        total: From `respike.spiking.census.totals` of sites with packed weights and counts.
    """
    macs, stored = total["multiply_accumulates"], total["weight_bytes"]
    mac16, mac8, add8, byte = PICOJOULES.values()
    ways = {
        "dense fp16": (macs * mac16, 2 * macs * byte),
        "dense, integer weights": (macs * mac8, stored * byte),
        "events, multiplied by their count": (
            total["events"] * mac8,
            total["weight_bytes_touched"] * byte,
        ),
    }
    for coding, additions in total["additions"].items():
        shifted = total["bit_sparsity"][coding]["zero_point"]  # then even silent inputs fire
        touched = stored if shifted else total["weight_bytes_touched"]
        ways[f"spikes, {coding}"] = (additions * add8, touched * byte)
    return {
        "what": "estimate, layers that spike only, no activations, no attention",
        "picojoules": PICOJOULES,
        "nanojoules_a_token": {
            way: {"arithmetic": arithmetic / 1000, "weights_from_dram": memory / 1000}
            for way, (arithmetic, memory) in ways.items()
        },
    }
