"""Batch-invariant kernels for CUDA devices: Triton and Gluon, one op a file, each with a torch reference of the same order.

The ops are functions on tensors that differentiate like torch's own; where no GPU or no Triton is present they run their
references. Import them from their files: `from miles_plan.kernels.cuda.matmul import matmul`. `enable` puts them under a
transformers model, `hooks_megatron` and `hooks_sglang` under those; `verify` checks them on the GPU at hand. docs/kernels.md
has each op's order of the sum in one table.
"""
