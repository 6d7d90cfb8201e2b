"""What multiplies a quantized linear: the simulation, or a kernel that works on the codes.

kernel.py     a linear whose product is computed on codes, and what such a product is asked for: `Product`
int8.py       integers by `torch._int_mm`
fp8.py        E4M3 by `torch._scaled_mm`
choice.py     `backend=`: which kernel each linear gets, what is wrong with that, and putting it into a model
"""
