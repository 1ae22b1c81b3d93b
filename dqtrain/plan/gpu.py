"""What a plan knows of GPUs: sizes and peaks."""

from dataclasses import dataclass

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """What one GPU has and can do at its peak, in bytes and seconds."""

    memory: float
    bf16: float  # FLOP/s, dense, with fp32 sums
    fp32: float  # FLOP/s, without TF32, as torch multiplies fp32 by default
    bandwidth: float  # bytes/s of its memory
    nvlink: float  # bytes/s to the other GPUs of its node, one direction
    network: float  # bytes/s to other nodes: its share of the node's


GPUS = {
    # NVIDIA's data sheets; NVLink is half of the sheets' bidirectional sum; network: one adapter per GPU, as in DGX systems, unless said otherwise.
    "b200": Gpu(180 * GB, 2.25e15, 75e12, 8.0e12, 900e9, 50e9),
    "h200": Gpu(141 * GB, 989e12, 67e12, 4.8e12, 450e9, 50e9),
    "h100": Gpu(80 * GB, 989e12, 67e12, 3.35e12, 450e9, 50e9),  # SXM; 400 Gb/s
    "a100-80": Gpu(80 * GB, 312e12, 19.5e12, 2.04e12, 300e9, 25e9),  # SXM; 200 Gb/s
    "a100-40": Gpu(40 * GB, 312e12, 19.5e12, 1.56e12, 300e9, 25e9),
    "l40s": Gpu(48 * GB, 362e12, 91.6e12, 0.864e12, 32e9, 12.5e9),  # PCIe 4.0 x16, no NVLink; 100 Gb/s
    "a10": Gpu(24 * GB, 125e12, 31.2e12, 0.6e12, 32e9, 6.25e9),
}
