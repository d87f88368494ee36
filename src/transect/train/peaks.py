"""How many floating-point operations a device can do per second, by what its maker says."""

import re

import torch

# Dense, in 1e12 per second, of one device as PyTorch counts them; products of bfloat16 and tf32 add up in float32.
# NVIDIA: data sheets of each product, tensor cores, half of what stands there "with sparsity"; GeForce: the appendices
# of the GA102, AD102 and GB202 white papers. AMD: data sheets, matrix cores; MI250(X) halved, as each of its two dies
# is a device. A type that the hardware does not multiply, or a number that was not found, is left out.
_PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bfloat16": 2250, "tf32": 1125, "float32": 75, "float64": 37},
    "H200 NVL": {"bfloat16": 835.5, "tf32": 417.5, "float32": 60, "float64": 60},
    "H200|GH200": {"bfloat16": 989.4, "tf32": 494.7, "float32": 67, "float64": 67},
    "H100 NVL": {"bfloat16": 835.5, "tf32": 417.5, "float32": 60, "float64": 60},
    "H100 PCIe": {"bfloat16": 756.5, "tf32": 378, "float32": 51, "float64": 51},
    "H100": {"bfloat16": 989.4, "tf32": 494.7, "float32": 67, "float64": 67},
    "H20": {"bfloat16": 148, "tf32": 74, "float32": 44, "float64": 1},
    "A100|A800": {"bfloat16": 312, "tf32": 156, "float32": 19.5, "float64": 19.5},
    "A40": {"bfloat16": 149.7, "tf32": 74.8, "float32": 37.4},
    "A30": {"bfloat16": 165, "tf32": 82, "float32": 10.3, "float64": 10.3},
    "A10": {"bfloat16": 125, "tf32": 62.5, "float32": 31.2},
    "RTX A6000": {"bfloat16": 154.8, "tf32": 77.4, "float32": 38.7},
    "L40S": {"bfloat16": 362.05, "tf32": 183, "float32": 91.6},
    "L40": {"bfloat16": 181.05, "tf32": 90.5, "float32": 90.5},
    "L4": {"bfloat16": 121, "tf32": 60, "float32": 30.3},
    "RTX 6000 Ada": {"bfloat16": 364.2, "tf32": 182.1, "float32": 91.1},
    "RTX 5090": {"bfloat16": 209.5, "tf32": 104.8, "float32": 104.8},
    "RTX 4090": {"bfloat16": 165.2, "tf32": 82.6, "float32": 82.6},
    "RTX 3090": {"bfloat16": 71, "tf32": 35.6, "float32": 35.6},
    "V100-SXM2|V100-SXM3": {"float32": 15.7, "float64": 7.8},
    "V100-PCIE": {"float32": 14, "float64": 7},
    "T4": {"float32": 8.1},
    "MI355X": {"bfloat16": 2516.6, "float32": 157.3, "float64": 78.6},
    "MI350X": {"bfloat16": 2306.9, "float32": 144.2, "float64": 72.1},
    "MI300X|MI325X": {"bfloat16": 1307.4, "tf32": 653.7, "float32": 163.4, "float64": 163.4},
    "MI250|MI250X": {"bfloat16": 191.5, "float32": 47.9, "float64": 47.9},
}


def peak_flops(name: str, precision: str) -> float | None:
    """FLOP/s of a device by its name, `torch.cuda.get_device_name`; None where it is not known.

    precision: bfloat16, float32, tf32 (float32 whose products may be rounded) or float64. Words of the name count
    whole, so that an A10G is no A10, nor a laptop's RTX 4090 the real one.
    """
    if re.search(r"\b(laptop|max-q|mobile|mig)\b", name, re.IGNORECASE):
        return None
    for pattern, peaks in _PEAKS.items():
        if re.search(rf"(?<![A-Za-z0-9])({pattern})(?![A-Za-z0-9])(?! D\b)", name, re.IGNORECASE):
            found = peaks.get(precision)
            return None if found is None else 1e12 * found
    return None


def device_peak(device: torch.device, precision: str) -> tuple[float | None, str]:
    """FLOP/s of this machine's device in a training precision, or None with the reason.

    float32 counts as tf32 where PyTorch is allowed to round its products.
    """
    hint = "give train.peak_flops"
    if device.type != "cuda":
        return None, f"the peak FLOP/s of a {device.type} device is not known; {hint}"
    if precision == "float32" and torch.get_float32_matmul_precision() != "highest":
        precision = "tf32"
    name = torch.cuda.get_device_name(device)
    peak = peak_flops(name, precision)
    return peak, "" if peak is not None else f"the peak FLOP/s of {name} in {precision} is not known; {hint}"
