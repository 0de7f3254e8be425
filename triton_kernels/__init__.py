"""The portable GPU backend: one op per file, each a kernel and its launcher (installed as shedder.triton_kernels).

Launchers take checked tensors with any strides, choose block sizes by a fixed rule (nothing is
tuned at run time) and launch on the current stream of the current device.
"""
