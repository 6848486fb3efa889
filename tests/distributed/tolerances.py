"""How far a layout may be from the oracle, by dtype, and why.

Every bound is 3 to 10 times the largest difference that all cells of the full matrix show: room for other processors'
kernels, and far below what a mistake makes (a norm's gradient that is not reduced: 1e-1; a replica whose gradient
counts half: 1e-1).
"""

from __future__ import annotations

from tests.distributed.differences import Differences

# fp32 has 24 bits: 6e-8. The loss is a mean of sums of a hundred terms, each a few roundings deep, and comes out
# within 2 or 3 units in the last place. A gradient passes through five layers twice and is summed over tokens in
# another order at every layout: tens of units relative to the tensor's largest element. The norm is a root of a sum
# of squares, whose errors cancel mostly. Adam divides one gradient by the root of another (eps 1e-3 is as large as
# they are) and adds up over the steps.
FP32 = {"loss": 1e-6, "norm": 5e-6, "weight": 3e-5, "exp_avg": 3e-5, "exp_avg_sq": 3e-5}

# After 20 steps the errors of the steps have added up as random ones do, with the root of their number.
FP32_LONG_LOSS = 2e-6

# bf16 has 8 bits, fp16 11: 4e-3 and 5e-4 for each rounding of an activation. The loss averages over tokens and is
# computed in fp32 from logits in that dtype. Single elements of the weights say little: where a gradient is a small
# difference of large terms, its relative error has no bound. One cell passes a sharp spot at step 10, where one
# process is off by 6e-2 (bf16) and 2e-2 (fp16) as well, layouts by up to 7e-2 and 5e-2; elsewhere norms agree to 4e-2
# and 6e-3. So the loss and the norm are judged, and the loss against the spread of seeds as well.
HALF = {"bfloat16": {"loss": 2e-2, "norm": 0.2}, "fp16": {"loss": 3e-3, "norm": 0.1}}


def excesses(found: Differences, bounds: dict[str, float]) -> list[str]:
    """What lies beyond its bound, in words."""
    return [
        f"{name} is off by {found.numbers[name]:.2g}, more than {bound:.2g}"
        + (f" (worst: {found.worst[name]})" if name in found.worst else "")
        for name, bound in bounds.items()
        # The comparison is written so that NaN is an excess.
        if not found.numbers[name] <= bound
    ]
