"""GPUs to plan for without having one: what their makers publish, and how much of it a run is taken to reach.

Peaks are of dense products in bfloat16 that sum in float32, without sparsity, which data sheets often print: half of
those numbers. Sources are the makers' data sheets and white papers: H100, H200, B200, A100 (SXM), L40S, L4, RTX A6000
and RTX 3090 (GA102), RTX 4090 (AD102), RTX 5090 (GB202), MI300X (CDNA 3).

dqx has measured none of these cards. `OPERATIONS` and `BANDWIDTH` are assumptions: training Llama 3 reached 38 to 43 %
of the peak of H100s (arXiv:2407.21783, section 3.3), and reading memory comes closer to its peak than computing does.
Small batches, attention and Python can halve the speed; an estimate may be wrong by a factor of two. `plan_tflops`
takes a speed that was measured.
"""

from __future__ import annotations

from dataclasses import dataclass

OPERATIONS = 0.4  # of the peak of operations that a run is taken to reach
BANDWIDTH = 0.7  # of that of reading memory


@dataclass(frozen=True)
class Gpu:
    """A card's published peaks."""

    tflops: float  # 10^12 operations per second, bfloat16, dense
    memory_gb: float  # 10^9 bytes
    bandwidth: float  # 10^12 bytes per second


#: By what is typed: `plan_gpu=h100`.
GPUS = {
    "h100": Gpu(989, 80, 3.35),
    "h200": Gpu(989, 141, 4.8),
    "b200": Gpu(2250, 180, 8.0),
    "a100": Gpu(312, 80, 2.04),
    "a100_40gb": Gpu(312, 40, 1.56),
    "l40s": Gpu(362, 48, 0.864),
    "l4": Gpu(121, 24, 0.3),
    "a6000": Gpu(155, 48, 0.768),
    "3090": Gpu(71, 24, 0.936),
    "4090": Gpu(165, 24, 1.008),
    "5090": Gpu(210, 32, 1.792),
    "mi300x": Gpu(1307, 192, 5.3),
}
