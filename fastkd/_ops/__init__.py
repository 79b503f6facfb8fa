"""Code shared by all ops: arguments, autograd, fake kernels and transforms."""
